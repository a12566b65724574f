"""verify: how far two models lie apart, on any nest of outputs, and where they part first."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from renorm import verify
from renorm.errors import BatchError, UsageError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Flatten()
    )
    return model.append(nn.Linear(5 * 4 * 4, 3)).eval()


BATCHES = [torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(s)) for s in range(2)]


def test_a_model_and_its_copy_do_not_differ() -> None:
    model = net()
    gap = verify(model, copy.deepcopy(model), BATCHES)
    assert (gap.max_abs, gap.mean_abs, gap.agreement, gap.first_site, gap.samples) == (0.0, 0.0, 1.0, None, 12)


@pytest.mark.parametrize("index", [1, 4])
def test_the_first_site_that_differs_is_named(index: int) -> None:
    a, b = net(), net()
    with torch.no_grad():
        b[index].running_mean += 0.5
    gap = verify(a, b, BATCHES)
    assert gap.first_site == str(index)
    with torch.no_grad():
        out_a, out_b = (torch.cat([m(x) for x in BATCHES]) for m in (a, b))
    assert gap.max_abs == pytest.approx(float((out_a - out_b).abs().max()))
    assert gap.mean_abs == pytest.approx(float((out_a - out_b).abs().mean()), rel=1e-5)
    assert gap.agreement == pytest.approx(float((out_a.argmax(1) == out_b.argmax(1)).float().mean()))


def test_a_difference_after_the_last_norm_layer_has_no_site() -> None:
    a, b = net(), net()
    with torch.no_grad():
        b[6].bias += 1
    gap = verify(a, b, BATCHES)
    assert gap.first_site is None
    assert gap.max_abs == pytest.approx(1, rel=1e-5)


class Nest(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        return {"logits": x, "more": [x + self.by, (x,)]}


def test_every_tensor_of_a_nest_counts() -> None:
    gap = verify(Nest(0.0), Nest(2.0), [torch.zeros(3, 4)])
    assert gap.max_abs == 2.0
    assert gap.mean_abs == pytest.approx(2 / 3)


def test_equal_nan_is_no_difference_and_a_lone_nan_is_an_infinite_one() -> None:
    class Broken(Nest):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / self.by - self.by / x  # 0/0 in the first column where by is 0

    assert verify(Broken(0.0), Broken(0.0), [torch.zeros(2, 2)]).max_abs == 0.0
    assert verify(Nest(math.nan), Nest(1.0), [torch.ones(2, 2)]).max_abs == math.inf


def test_outputs_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(UsageError, match=r"the two models give different outputs: tensors of shape .*; compare models"):
        verify(nn.Linear(4, 2), nn.Linear(4, 3), [torch.zeros(1, 4)])
    with pytest.raises(BatchError, match="verify was given batches, but there was none"):
        verify(net(), net(), iter(()))
