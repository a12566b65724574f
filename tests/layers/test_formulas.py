"""Each layer's numbers against its slow float64 twin, and its options' bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from renorm.errors import UsageError
from renorm.layers.base import catalogue
from renorm.moments import Observed
from renorm.recalibrate import recalibrate_
from tests.layers.catalogue import images, lived
from tests.reference import layers as twin

SHAPES = [(6, 4, 3, 5), (7, 4), (5, 4, 6)]
F64 = torch.float64
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def made(name: str, shape: tuple[int, ...], **options: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The layer, a batch, and what the twin needs: the same as NumPy arrays."""
    layer, x = lived(name, dtype=F64, **options), images(*shape, dtype=F64, seed=2)
    held = {
        key: getattr(layer, key).detach().numpy().copy() for key in ("running_mean", "running_var", "weight", "bias")
    }
    return layer, x, {"mean": held["running_mean"], "var": held["running_var"], **_affine(held)}


def _affine(held: dict[str, Any]) -> dict[str, Any]:
    return {key: held[key] for key in ("weight", "bias")}


def close(got: torch.Tensor, wanted: Any) -> None:
    np.testing.assert_allclose(got.detach().numpy(), wanted, rtol=1e-9, atol=1e-9)


@every_shape
def test_batch_norm(shape: tuple[int, ...]) -> None:
    layer, x, held = made("batch", shape, momentum=0.2)
    close(layer(x), twin.batch(x.numpy(), held["weight"], held["bias"]))
    columns = twin.columns(x.numpy())
    close(layer.running_mean, [twin.moved(m, v.mean(), 0.2) for m, v in zip(held["mean"], columns, strict=True)])
    close(layer.running_var, [twin.moved(s, v.var(ddof=1), 0.2) for s, v in zip(held["var"], columns, strict=True)])
    held = {**held, "mean": layer.running_mean.numpy(), "var": layer.running_var.numpy()}
    close(layer.eval()(x), twin.by_moments(x.numpy(), **held))


@every_shape
def test_frozen(shape: tuple[int, ...]) -> None:
    layer, x, held = made("frozen", shape)
    for mode in (True, False):
        close(layer.train(mode)(x), twin.by_moments(x.numpy(), **held))
    assert int(layer.num_batches_tracked) == 7
    assert not any(p.requires_grad for p in layer.parameters())
    assert all(p.requires_grad for p in catalogue()["frozen"](4, train_affine=True).parameters())


@every_shape
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(
    ("options", "share"), [({}, 0.5), ({"source_weight": 0.8}, 0.8), ({"prior": 14}, None), ({"source_weight": 0}, 0.0)]
)
def test_blended(shape: tuple[int, ...], mode: bool, options: dict[str, Any], share: float | None) -> None:
    layer, x, held = made("blended", shape, **options)
    share = 14 / (14 + shape[0]) if share is None else share
    close(layer.train(mode)(x), twin.blended(x.numpy(), share=share, **held))


@every_shape
@pytest.mark.parametrize("mode", [True, False])
def test_shrink(shape: tuple[int, ...], mode: bool) -> None:
    layer, x, held = made("shrink", shape)
    share = twin.shrink_share(x.numpy(), held["var"])
    close(layer.train(mode)(x), twin.shrink(x.numpy(), share=share, **held))


@every_shape
def test_shrink_holds_what_recalibrating_with_prior_auto_would(shape: tuple[int, ...]) -> None:
    layer, x, _ = made("shrink", shape)
    model = nn.Sequential(nn.BatchNorm2d(4) if x.dim() == 4 else nn.BatchNorm1d(4)).double().eval()
    model[0].load_state_dict({k: v for k, v in layer.state_dict().items()})
    adaptation = recalibrate_(model, [x])
    share = layer.source_share(x, layer.running_mean, layer.running_var)
    assert float(share) == pytest.approx(adaptation.weights["0"], rel=1e-9)
    biased = Observed.of(x).values
    count = biased.count / (biased.count - 1)
    model[0].running_var.div_(torch.as_tensor(count))  # what is stored is unbiased, what normalises a batch is not
    torch.testing.assert_close(layer.eval()(x), model(x), rtol=1e-5, atol=1e-5)


def test_shrink_trusts_more_images_more_and_one_not_at_all() -> None:
    layer = lived("shrink").eval()
    x = images(256, 4, 3, 3)
    shares = [float(layer.source_share(x[:n], layer.running_mean, layer.running_var)) for n in (1, 2, 8, 64, 256)]
    assert shares[0] == 1.0
    assert shares == sorted(shares, reverse=True)
    assert 0.1 < shares[-1] < 0.2
    norm = nn.BatchNorm2d(4).eval()
    norm.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x[:1]), norm(x[:1]))


@every_shape
@pytest.mark.parametrize(
    ("batches", "r_max", "d_max"), [(0, 1.0, 0.0), (4_999, 1.0, 0.0), (24_999, 2.1428, 4.99975), (99_999, 3.0, 5.0)]
)
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_batch_renorm(shape: tuple[int, ...], batches: int, r_max: float, d_max: float, scale: float) -> None:
    layer, x, held = made("batch_renorm", shape)
    layer.num_batches_tracked.fill_(batches)
    got = layer(x * scale)
    if batches == 24_999:
        r_max, d_max = 1 + 2 * 20_000 / 35_001, 5 * 20_000 / 20_001
    close(got, twin.batch_renorm((x * scale).numpy(), r_max=r_max, d_max=d_max, **held))


def test_an_open_batch_renorm_trains_as_it_evaluates() -> None:
    layer, x, _ = made("batch_renorm", (6, 4, 3, 5), r_max=100, d_max=100)
    layer.num_batches_tracked.fill_(90_000)
    before = layer.eval()(x)
    torch.testing.assert_close(layer.train()(x), before)


@every_shape
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_stochastic(shape: tuple[int, ...], p: float) -> None:
    layer, x, held = made("stochastic", shape, p=p)
    torch.manual_seed(4)
    chosen = torch.rand(4) < p
    torch.manual_seed(4)
    close(layer(x), twin.stochastic(x.numpy(), chosen=chosen.numpy(), **held))


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        (
            "blended",
            {"source_weight": 1.2},
            r"source_weight is the share of what the layer holds, in \[0, 1\]; got 1\.2",
        ),
        ("blended", {"prior": -1}, r"prior is the number of images that what the layer holds counts as; got -1"),
        ("blended", {"prior": 1, "source_weight": 0.5}, r"takes a source_weight or a prior"),
        ("shrink", {"floor": 1.1}, r"floor is the least share of what the layer holds, in \[0, 1\]; got 1\.1"),
        ("shrink", {"noise": -1}, r"noise is what a squared standard error counts, 0 or more; got -1"),
        ("stochastic", {"p": 2}, r"p is the probability that a channel is normalised by the batch, in \[0, 1\]; got 2"),
        ("batch_renorm", {"r_max": 0.5}, r"r is clipped to \[1/r_max, r_max\] and d to ±d_max; got r_max=0\.5"),
        (
            "batch_renorm",
            {"start": 10, "r_end": 5},
            r"the bounds open from `start` on, until r_end and d_end; got 10, 5",
        ),
    ],
)
def test_an_option_out_of_its_bounds_is_refused(name: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        catalogue()[name](4, **options)
