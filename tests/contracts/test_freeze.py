"""Contract: in every model of the zoo a freeze holds past train() and an optimiser, and is undone to the bit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from renorm.errors import NoBatchNorm, UsageError
from renorm.freeze import freeze_, unfreeze_
from renorm.groups import check_groups, parameter_groups
from renorm.policy import POLICIES, apply_policy_, policy_table
from renorm.recalibrate import recalibrate_
from renorm.sites import find_sites, parameters_of
from tests import zoo
from tests.contracts.photograph import bits, differences, photograph

# torch.compile looks at `.grad` of what is no leaf, and means to hide the warning that it gets
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

NORMLESS = {"no-norm"}
usable = pytest.mark.parametrize("case", [p for p in zoo.cases(without=("lazy",)) if p.id not in NORMLESS])
# Keras copies itself by its own saved configuration; a compiled model and a process group cannot be pickled at all
picklable = pytest.mark.parametrize(
    "case", [p for p in zoo.cases(without=("lazy", "keras", "group", "compiled")) if p.id not in NORMLESS]
)


def held(model: nn.Module) -> dict[str, Any]:
    """The bits of the statistics, counters and affine of every norm layer."""
    found: dict[str, Any] = {}
    for site in find_sites(model):
        found |= {f"{site.name}: {n}": bits(t) for n, t in site.module._buffers.items() if t is not None}
        found |= {f"{site.name}: {n}": bits(t) for n, t in site.affine.items()}
        found |= {f"{site.name}: statistics {i}": bits(t) for i, t in enumerate(site.tensors or ())}
    return found


def logits_of(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = (
            (output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None))
            if not isinstance(output, tuple)
            else output[0]
        )
    return output


def train_on(case: zoo.Case, model: nn.Module, steps: int = 2) -> None:
    """A plain loop as users write it: train(), forward, backward, an optimiser with momentum and weight decay."""
    model.train()
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    optimiser = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.1) if parameters else None
    for step in range(steps):
        batch = case.batch(seed=step)
        output = model(batch, training=True) if _keras(model) else case.call(model, batch)
        loss = logits_of(output).float().square().sum()
        if optimiser is not None and loss.requires_grad:
            optimiser.zero_grad(set_to_none=False)
            loss.backward()
            optimiser.step()


def _keras(model: nn.Module) -> bool:
    return hasattr(model, "_flatten_layers")


@usable
def test_training_moves_nothing_that_is_frozen(case: zoo.Case) -> None:
    model = case.settled()
    freeze_(model)
    before = held(model)
    if "group" in case.tags:  # DistributedDataParallel waits for every gradient that it was promised: one step
        train_on(case, model, steps=1)
    else:
        train_on(case, model)
    assert held(model) == before


@usable
def test_class_keys_and_hooks_stay_and_undoing_brings_every_bit_back(case: zoo.Case) -> None:
    model = case.settled()
    before, keys = photograph(model), list(model.state_dict())
    handle = freeze_(model)
    inside = photograph(model)
    telling = ("class", "hooks", "state_dict")
    assert [k for k in differences(before, inside) if k.endswith(telling)] == []
    assert list(model.state_dict()) == keys
    assert handle.is_open
    handle.restore_()
    assert not handle.is_open
    assert differences(before, photograph(model)) == []
    handle.restore_()
    unfreeze_(model)
    assert differences(before, photograph(model)) == []


@usable
def test_undone_the_model_is_in_the_mode_last_asked_for(case: zoo.Case) -> None:
    model, twin = case.settled(), case.settled()
    handle = freeze_(model)
    for each in (model, twin):
        each.eval()
        each.train()
    handle.restore_()
    assert [m.training for m in model.modules()] == [m.training for m in twin.modules()]


@usable
def test_a_freeze_normalises_in_training_as_in_evaluation(case: zoo.Case) -> None:
    model = case.settled()
    if "keras" in case.tags or case.name in ("dropout", "functional", "no-statistics", "quantisation-aware"):
        pytest.skip("something beside the norm layers differs between the modes")
    with torch.no_grad():
        model.eval()
        wanted = logits_of(case.call(model, case.batch()))
        freeze_(model)
        model.train()
        if "many" in case.tags:
            _silence_dropout(model)
        got = logits_of(case.call(model, case.batch()))
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def _silence_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if "Drop" in type(module).__name__:
            module.eval()


@picklable
@pytest.mark.parametrize("way", ["copy", "pickle"])
def test_a_copy_is_frozen_and_can_be_let_go_by_itself(case: zoo.Case, way: str) -> None:
    model = case.settled()
    handle = freeze_(model)
    inside = photograph(model)
    twin = copy.deepcopy(model) if way == "copy" else pickle.loads(pickle.dumps(model))
    before = held(twin)
    train_on(case, twin)
    assert held(twin) == before
    unfreeze_(twin)
    assert differences(inside, photograph(model)) == []
    assert handle.is_open
    assert all("train" not in module.__dict__ for module in twin.modules())
    movable = [site for site in find_sites(twin) if site.tracks and site.name not in case.idle]
    train_on(case, twin)
    assert not movable or held(twin) != before


@usable
def test_a_frozen_model_can_be_recalibrated_and_stays_frozen(case: zoo.Case) -> None:
    if not any(site.kind == "batch" and site.tensors for site in find_sites(case.build())):
        pytest.skip("holds no statistics")
    model = case.settled()
    handle = freeze_(model)
    start = held(model)
    adaptation = recalibrate_(model, [case.batch(6), case.batch(6, 1)], prior=0, forward=case.forward)
    before = held(model)
    train_on(case, model, steps=1)
    assert held(model) == before
    adaptation.restore_()
    assert held(model) == start
    handle.restore_()


@usable
def test_each_policy_moves_what_it_says_and_is_undone(case: zoo.Case) -> None:
    model = case.settled()
    before = photograph(model)
    for policy in POLICIES.values():
        try:
            handle = apply_policy_(model, policy)
        except (UsageError, NoBatchNorm):
            assert differences(before, photograph(model)) == []
            continue
        table = policy_table(model)
        assert {row.part for row in table if row.moves and row.part != "statistics"} <= policy.trains
        asking = [name for name, p in parameters_of(model).items() if p.requires_grad]
        assert len(asking) == sum(row.moves for row in table if row.part != "statistics")
        check_groups(model, parameter_groups(model, 0.1) if asking else [])
        moving = {row.name.partition("@")[0] for row in table if row.part == "statistics" and row.moves}
        assert policy.statistics == "moving" or not moving
        assert len(moving) <= 1 or not policy.last
        handle.restore_()
        assert differences(before, photograph(model)) == [], policy.name
