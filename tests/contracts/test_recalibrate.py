"""Contract: recalibrating any model of the zoo writes what was measured, nothing else, and can be undone to the bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from renorm.errors import NoBatchNorm, OpenChange
from renorm.observe import observe
from renorm.recalibrate import recalibrate_
from renorm.sites import find_sites
from tests import zoo
from tests.contracts.photograph import differences, photograph, process

BIASED = {  # Keras stores the variance that it normalises by
    *(("keras-sequential", name) for name in ("bn", "inner.deep")),
    *(("keras-functional", name) for name in ("first", "twice")),
    ("keras-within-torch", "4"),
}


def statistics(model: nn.Module) -> dict[str, Any]:
    held = {s.name: s.statistics() for s in find_sites(model) if s.kind == "batch"}
    return {name: moments for name, moments in held.items() if moments is not None}


def allowed(key: str) -> bool:
    """Whether recalibrating may change what a photograph shows under this key."""
    held = (
        "running_mean",
        "running_var",
        "num_batches_tracked",
        "moving_mean",
        "moving_variance",
        "means",
        "variances",
    )
    return key.endswith(held)


@pytest.mark.parametrize("case", zoo.with_batch_norm())
def test_only_statistics_change_and_undoing_brings_every_bit_back(case: zoo.Case) -> None:
    model = case.settled()
    before, around, keys = photograph(model), process(), list(model.state_dict())
    adaptation = recalibrate_(model, case.batches(), forward=case.forward)
    changed = [key for key in differences(before, photograph(model)) if key != "state_dict"]
    assert changed
    assert [key for key in changed if not allowed(key)] == []
    assert list(model.state_dict()) == keys
    assert process() == around
    assert adaptation.samples == sum(zoo.SIZES)
    adaptation.restore_()
    assert differences(before, photograph(model)) == []
    adaptation.restore_()
    assert differences(before, photograph(model)) == []


@pytest.mark.parametrize("case", zoo.with_batch_norm())
def test_without_a_prior_a_site_holds_what_was_measured_and_idle_sites_what_they_held(case: zoo.Case) -> None:
    model = case.build()
    seen = observe(model, case.batches(), under="batch", forward=case.forward)
    before = statistics(model)
    adaptation = recalibrate_(model, case.batches(), prior=0, forward=case.forward)
    assert set(adaptation.unvisited) == set(case.idle)
    assert set(adaptation.shifts) == set(case.reached(model)) - set(case.silent)
    narrow = "narrow" in case.tags
    for name, held in statistics(model).items():
        if name in case.idle:
            assert torch.equal(held.mean, before[name].mean)
            assert torch.equal(held.var, before[name].var)
            continue
        wanted = seen[name].values
        var = wanted.var if (case.name, name) in BIASED else wanted.unbiased
        torch.testing.assert_close(held.mean, wanted.mean, rtol=2e-2 if narrow else 1e-6, atol=1e-2 if narrow else 1e-6)
        torch.testing.assert_close(held.var, var, rtol=2e-2 if narrow else 1e-6, atol=1e-6)


@pytest.mark.parametrize("case", zoo.with_batch_norm())
def test_a_model_in_any_mode_stays_in_it(case: zoo.Case) -> None:
    model = case.settled()
    for module in model.modules():
        module.training = random.random() < 0.5
    modes = [module.training for module in model.modules()]
    recalibrate_(model, case.batches(), forward=case.forward)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("case", zoo.with_batch_norm())
def test_a_loader_that_fails_midway_leaves_every_bit(case: zoo.Case) -> None:
    def failing() -> Iterator[Any]:
        yield from case.batches()[:2]
        torch.rand(3)
        raise OSError("the disk is gone")

    model = case.settled()
    before, around = photograph(model), process()
    with pytest.raises(OSError, match="the disk is gone"):
        recalibrate_(model, failing(), forward=case.forward)
    assert differences(before, photograph(model)) == []
    assert process() == around


@pytest.mark.parametrize("case", zoo.with_batch_norm())
def test_two_recalibrations_are_undone_in_turn_only(case: zoo.Case) -> None:
    model = case.settled()
    first = recalibrate_(model, case.batches(), prior=0, forward=case.forward)
    between = photograph(model)
    second = recalibrate_(model, [case.batch(9, seed=7)], prior=0, forward=case.forward)
    with pytest.raises(OpenChange, match="undoing recalibrate_ was asked for, but recalibrate_ came after it at"):
        first.restore_()
    second.restore_()
    assert differences(between, photograph(model)) == []
    first.restore_()


@pytest.mark.parametrize("name", zoo.WITHOUT)
def test_models_without_batch_norm_are_refused_and_stay(name: str) -> None:
    case = zoo.named(name)
    model = case.build()
    before = photograph(model)
    with pytest.raises(NoBatchNorm, match="recalibrate_ needs batch norm layers that hold running statistics"):
        recalibrate_(model, case.batches())
    assert differences(before, photograph(model)) == []


def test_a_shuffling_loader_leaves_the_random_numbers_where_they_were() -> None:
    case = zoo.named("bn2d")
    model = case.build()
    loader = DataLoader(TensorDataset(case.batch(20), torch.zeros(20, dtype=torch.long)), batch_size=8, shuffle=True)
    around = process()
    recalibrate_(model, loader, check=loader)
    assert process() == around
