"""costs: no fact takes more forwards than it says, and the doctor spends no more than it is allowed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from renorm.costs import PASSES, price
from renorm.doctor import diagnose
from renorm.errors import UsageError
from renorm.facts import Facts
from renorm.profile import profile
from renorm.rules.base import catalogue
from tests.contracts.photograph import differences, photograph

ASKED = [fact for fact in PASSES if fact not in ("file", "graph", "settings", "optimizers", "loop")]


class Counted(nn.Sequential):
    """A small trained network that counts its forwards."""

    forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        result: Tensor = super().forward(x)
        return result


def network() -> Counted:
    torch.manual_seed(0)
    model = Counted(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.momentum = None
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    with torch.no_grad():
        for seed in range(8):
            model(images(64, seed=seed))
    model.eval().forwards = 0
    norm.momentum = 0.1
    return model


def images(count: int, *, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * scale


SIZES = ([30] * 4, [40], [100], [12] * 10)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["fits", "shifted"])
@pytest.mark.parametrize("fact", ASKED)
def test_no_fact_takes_more_than_it_says(fact: str, scale: float, sizes: list[int]) -> None:
    model = network()
    source = profile(model, [(images(64), torch.arange(64) % 4)]) if fact == "look" else None
    model.forwards = 0
    facts = Facts(model, [images(n, seed=n + i, scale=scale) for i, n in enumerate(sizes)], source)
    getattr(facts, fact)
    assert model.forwards <= price([fact]) * len(sizes)
    assert facts.spent <= price([fact])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["fits", "shifted"])
@pytest.mark.parametrize("passes", [0, 1, 2, 3, 5, 9, 20, 60])
def test_the_doctor_spends_no_more_than_it_may(passes: int, scale: float, sizes: list[int]) -> None:
    model = network()
    before = photograph(model)
    batches = [images(n, seed=n + i, scale=scale) for i, n in enumerate(sizes)]
    found = diagnose(model, batches, passes=passes)
    ran, model.forwards = model.forwards, 0
    assert ran <= passes * len(sizes)
    assert differences(before, photograph(model)) == []
    dear = {rule.id for rule in catalogue().values() if rule.passes() > passes and _asks_batches(rule.needs)}
    assert dear - {"BN303"} <= set(found.skipped)  # which takes nothing where there is no shift to explain
    assert bool(found.notes) == bool(found.skipped or found.estimate is None)
    assert bool(found.distances) == (passes >= 1)
    if passes == 60:
        assert found.skipped == ()
        assert str(found) == str(diagnose(model, batches))


def _asks_batches(needs: tuple[str, ...]) -> bool:
    return not {"loop", "file", "graph", "optimizers", "parting"} & set(needs)


def test_what_is_skipped_is_named_and_a_shift_is_seen_in_one_pass() -> None:
    found = diagnose(network(), [images(64, scale=3.0)], passes=1)
    assert "BN302" in {finding.rule for finding in found.findings}
    assert {"BN301", "BN303"} <= set(found.skipped)
    assert "more than 1 passes" in found.notes[0]
    assert "the estimate of accuracy" in found.notes[0]


def test_without_batches_nothing_is_skipped() -> None:
    found = diagnose(network(), passes=0)
    assert (found.skipped, found.notes) == ((), ())


def test_a_budget_below_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="passes is the most passes"):
        diagnose(network(), passes=-1)
