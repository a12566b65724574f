"""state: a model comes out of a look, a failure or an undo with the bits it went in with."""

from __future__ import annotations

import gc
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from renorm.errors import OpenChange
from renorm.moments import Moments
from renorm.sites import find_sites
from renorm.state import Undo, evaluating, preserving
from tests import zoo
from tests.contracts.photograph import differences, photograph, process


def spoil(model: nn.Module) -> None:
    """Do to a model what methods and their bugs do."""
    model.train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.add_(1)
                module.running_var = module.running_var * 2
                module.num_batches_tracked.zero_()
                module.momentum = None
                module.eps = 1.0
                module.track_running_stats = False
                module.running_mean = None
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch.rand(3), np.random.rand(3), random.random()


def _spoil_and_fail(model: nn.Module, error: type[BaseException]) -> None:
    with preserving(model):
        spoil(model)
        raise error("enough")


@pytest.fixture
def model() -> nn.Module:
    made = zoo.named("bn2d").build()
    made[0].weight.requires_grad_(False)
    made[3].train()
    return made


def test_what_is_preserved_comes_out_as_it_went_in(model: nn.Module) -> None:
    before, around = photograph(model), process()
    with preserving(model):
        spoil(model)
        assert differences(before, photograph(model))
    assert differences(before, photograph(model)) == []
    assert process() == around


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_it_does_after_any_failure(model: nn.Module, error: type[BaseException]) -> None:
    before, around = photograph(model), process()
    with pytest.raises(error, match="enough"):
        _spoil_and_fail(model, error)
    assert differences(before, photograph(model)) == []
    assert process() == around


def test_parameters_are_preserved_where_asked(model: nn.Module) -> None:
    before = photograph(model)
    with preserving(model, parameters=True), torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    assert differences(before, photograph(model)) == []


def test_nan_and_negative_zero_are_bits_too(model: nn.Module) -> None:
    with torch.no_grad():
        model[1].running_mean.copy_(torch.tensor([float("nan"), -0.0, 1.0, float("inf")]))
    before = photograph(model)
    with preserving(model):
        spoil(model)
    assert differences(before, photograph(model)) == []


def test_a_graph_made_before_can_still_go_backward_after(model: nn.Module) -> None:
    x = torch.randn(4, 3, 6, 6, requires_grad=True)
    loss = model(x).square().sum()
    with preserving(model), torch.no_grad():
        model[1].running_mean.data.add_(1)
    loss.backward()
    assert x.grad is not None


def test_wrapped_models_are_preserved_inside() -> None:
    wrapped = zoo.named("averaged").build()
    before = photograph(wrapped)
    with preserving(wrapped):
        spoil(wrapped.module)
    assert differences(before, photograph(wrapped)) == []


def test_evaluating_switches_every_module_and_gradients_and_gives_each_its_own_mode_back(model: nn.Module) -> None:
    before, around = photograph(model), process()
    with evaluating(model):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
    assert differences(before, photograph(model)) == []
    assert process() == around


def test_evaluating_does_not_call_a_train_of_the_models_own() -> None:
    class Loud(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> Any:
            raise AssertionError("nobody asked for this")

    model = Loud(2)
    with evaluating(model):
        assert not model.training
    assert model.training


def change(model: nn.Module, label: str, names: tuple[str, ...] = ("1", "4")) -> Undo:
    """A change at some sites, to be undone."""
    sites = [site for site in find_sites(model) if site.name in names]
    undo = Undo(label, {site.name: site.module for site in sites})
    for site in sites:
        site.write_(Moments.of(torch.randn(20, 4) + 2))
        site.module.num_batches_tracked.add_(1)
    return undo


def test_an_undo_restores_the_state_at_its_own_call(model: nn.Module) -> None:
    before = photograph(model)
    undo = change(model, "first")
    assert undo.is_open
    assert differences(before, photograph(model))
    undo.restore_()
    assert not undo.is_open
    assert differences(before, photograph(model)) == []


def test_undos_nest(model: nn.Module) -> None:
    states = [photograph(model)]
    undos = []
    for label in ("first", "second", "third"):
        undos.append(change(model, label))
        states.append(photograph(model))
    for undo, state in zip(reversed(undos), reversed(states[:-1]), strict=True):
        undo.restore_()
        assert differences(state, photograph(model)) == []


def test_an_undo_out_of_order_is_refused_by_name_and_changes_nothing(model: nn.Module) -> None:
    first, second = change(model, "the first change"), change(model, "the second change", names=("4",))
    before = photograph(model)
    with pytest.raises(
        OpenChange, match="undoing the first change was asked for, but the second change came after it at '4'"
    ):
        first.restore_()
    assert differences(before, photograph(model)) == []
    second.restore_()
    first.restore_()


def test_changes_at_different_sites_do_not_block_each_other(model: nn.Module) -> None:
    before = photograph(model)
    first, second = change(model, "first", names=("1",)), change(model, "second", names=("4",))
    first.restore_()
    second.restore_()
    assert differences(before, photograph(model)) == []


def test_restoring_twice_does_nothing_the_second_time(model: nn.Module) -> None:
    undo = change(model, "first")
    undo.restore_()
    model[1].running_mean.data.add_(5)
    after = photograph(model)
    undo.restore_()
    assert differences(after, photograph(model)) == []


def test_a_change_that_was_closed_stands_and_blocks_nothing(model: nn.Module) -> None:
    before = photograph(model)
    first, second = change(model, "first"), change(model, "second")
    second.close()
    second.restore_()
    first.restore_()
    assert differences(before, photograph(model)) == []


def test_a_change_whose_undo_nobody_holds_blocks_nothing(model: nn.Module) -> None:
    before = photograph(model)
    first = change(model, "first")
    change(model, "forgotten")
    gc.collect()
    first.restore_()
    assert differences(before, photograph(model)) == []


def test_a_module_with_several_slots_is_undone_whole() -> None:
    model = zoo.named("slots").build()
    before = photograph(model)
    undo = Undo("both", {site.name: site.module for site in find_sites(model)})
    for site in find_sites(model):
        site.write_(Moments.of(torch.randn(9, 4)))
    undo.restore_()
    assert differences(before, photograph(model)) == []
