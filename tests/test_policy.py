"""policy: the presets move what their table says, the docs print that table, and the report of a model is true."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from renorm.errors import NoBatchNorm, UnknownName, UsageError
from renorm.freeze import freeze_, unfreeze_
from renorm.policy import POLICIES, Policy, apply_policy_, policy_table, preset, presets_table
from renorm.sites import find_sites, parameters_of
from tests import zoo
from tests.contracts.photograph import bits, differences, photograph

PAGE = Path(__file__).parents[1] / "docs" / "policies.md"


@pytest.fixture
def model() -> nn.Module:
    return zoo.named("bn2d").build()


def moved(model: nn.Module, case: str = "bn2d") -> set[str]:
    """What a step of plain training moves, measured: parameters by name, and statistics by site."""
    parts = {s.name: [bits(t) for t in s.tensors] for s in find_sites(model) if s.tensors}
    weights = {name: bits(p) for name, p in parameters_of(model).items()}
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    loss = model(zoo.named(case).batch()).square().sum()
    if loss.requires_grad:
        loss.backward()
    optimiser.step()
    found = {name for name, p in parameters_of(model).items() if bits(p) != weights[name]}
    return found | {s.name for s in find_sites(model) if s.tensors and [bits(t) for t in s.tensors] != parts[s.name]}


STATISTICS, AFFINE = {"1", "4"}, {"1.weight", "1.bias", "4.weight", "4.bias"}
HEAD, REST = {"8.weight", "8.bias"}, {"0.weight", "0.bias", "3.weight", "3.bias"}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("all", STATISTICS | AFFINE | HEAD | REST),
        ("frozen", HEAD | REST),
        ("frozen-statistics", AFFINE | HEAD | REST),
        ("recalibrate-then-freeze", AFFINE | HEAD | REST),
        ("statistics-only", STATISTICS),
        ("affine-only", STATISTICS | AFFINE),
        ("affine-and-head", STATISTICS | AFFINE | HEAD),
        ("last-only", {"4", "4.weight", "4.bias"} | HEAD),
        ("head-only", HEAD),
        ("few-labels", HEAD),
    ],
)
def test_training_moves_what_the_preset_says_and_no_more(model: nn.Module, name: str, wanted: set[str]) -> None:
    apply_policy_(model, name)
    told = {row.name for row in policy_table(model) if row.moves}
    found = moved(model)
    # a bias before a batch norm in training has the gradient 0, and moves by its decay alone
    assert found == wanted
    assert told == wanted


def test_every_preset_is_under_test() -> None:
    (mark,) = [m for m in test_training_moves_what_the_preset_says_and_no_more.pytestmark if m.name == "parametrize"]
    assert {name for name, _ in mark.args[1]} == set(POLICIES)


def test_the_docs_print_the_table_of_presets() -> None:
    assert presets_table() in PAGE.read_text(encoding="utf-8"), (
        "put renorm.policy.presets_table() into docs/policies.md"
    )


def test_a_policy_of_ones_own() -> None:
    model = zoo.named("other-kinds").build()
    apply_policy_(model, Policy(name="mine", statistics="source", trains=frozenset({"affine"})))
    assert {row.name.partition(".")[0] for row in policy_table(model) if row.moves} == {"1", "4", "7", "10"}
    assert preset(POLICIES["all"]) is POLICIES["all"]


def test_layer_norm_models_have_policies_too() -> None:
    model = zoo.named("tokens").build()
    apply_policy_(model, "affine-and-head")
    assert moved(model, "tokens") == {"1.weight", "1.bias", "4.weight", "7.weight", "9.weight", "9.bias"}


def test_a_norm_inside_the_head_belongs_to_the_head(model: nn.Module) -> None:
    apply_policy_(model, "head-only", head=["4", "8"])
    assert moved(model) == HEAD | {"4", "4.weight", "4.bias"}


def test_a_policy_never_gives_what_was_not_there(model: nn.Module) -> None:
    model[0].weight.requires_grad_(False)
    before = photograph(model)
    handle = apply_policy_(model, "all")
    assert not model[0].weight.requires_grad
    handle.restore_()
    assert differences(before, photograph(model)) == []


def test_one_policy_at_a_time_and_freezes_inside_it(model: nn.Module) -> None:
    before = photograph(model)
    handle = apply_policy_(model, "affine-only")
    with pytest.raises(UsageError, match="'head-only' was asked for, but another one still stands at '0'"):
        apply_policy_(model, "head-only")
    inner = freeze_(model, include="1")
    assert moved(model) == {"4", "4.weight", "4.bias"}
    inner.restore_()
    handle.restore_()
    apply_policy_(model, "head-only")
    unfreeze_(model)
    model.eval()
    assert [k for k in differences(before, photograph(model)) if k.endswith(("mode", "class", "hooks"))] == []


def test_what_a_policy_cannot_do_is_refused_and_leaves_the_model(model: nn.Module) -> None:
    before = photograph(model)
    with pytest.raises(UnknownName, match="no policy 'affine'; did you mean"):
        apply_policy_(model, "affine")
    with pytest.raises(UnknownName, match="no part of a model 'heads'; did you mean 'head'"):
        Policy(name="mine", statistics="source", trains=frozenset({"heads"}))  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="no way of statistics 'sauce'; did you mean 'source'"):
        Policy(name="mine", statistics="sauce", trains=frozenset())  # type: ignore[arg-type]
    assert differences(before, photograph(model)) == []
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UsageError, match="trains affine, but none of its 4 parameters there asks for a gradient"):
        apply_policy_(model, "affine-only")
    with pytest.raises(UsageError, match="trains head, but no head was found; name it with head="):
        apply_policy_(zoo.named("root").build(), "head-only")
    frozen_copies = nn.Sequential(*list(zoo.named("frozen-hidden-eps").build())[:3])
    with pytest.raises(UsageError, match=r"there are no such parameters.*as buffers"):
        apply_policy_(frozen_copies, "affine-only")
    with pytest.raises(NoBatchNorm, match="'statistics-only' moves the statistics of norm layers; Sequential has none"):
        apply_policy_(zoo.named("tokens").build(), "statistics-only")


# ── the table of a model ──


def test_the_table_tells_why_something_stays() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.BatchNorm2d(3, momentum=0.0),
        nn.BatchNorm2d(3),
        nn.BatchNorm2d(3),
        zoo.animals.FrozenInFour(3),
        nn.Conv2d(3, 3, 1),
    )
    freeze_(model, include="2")
    freeze_(model, statistics=False, include="3")
    why = {row.name: (row.moves, row.why) for row in policy_table(model) if row.part == "statistics"}
    assert why == {
        "0": (False, "holds none: each batch normalises by its own, in evaluation too"),
        "1": (False, "momentum is 0, yet in training the batch normalises"),
        "2": (False, "frozen: train() does not reach it"),
        "3": (True, "train() moves them, though its affine is fixed"),
        "4": (False, "the layer never moves them"),
    }
    assert policy_table(model).counts == {"statistics": (1, 5), "affine": (4, 8), "rest": (2, 2)}
    assert "2.weight  affine      fixed  requires_grad is False" in str(policy_table(model))


@pytest.mark.parametrize("case", zoo.cases(without=("lazy", "keras", "functional", "group")))
def test_the_table_is_what_training_then_does(case: zoo.Case) -> None:
    model = case.build()
    told = {row.name: row.moves for row in policy_table(model) if row.part == "statistics"}
    before = {s.name: [bits(t) for t in s.tensors] for s in find_sites(model) if s.tensors}
    model.train()
    with torch.no_grad():
        case.call(model, case.batch())
    after = {s.name: [bits(t) for t in s.tensors] for s in find_sites(model) if s.tensors}
    for name, moves in told.items():
        if name not in case.idle:
            assert (before.get(name) != after.get(name)) == moves, name


def test_every_parameter_is_in_the_table_once() -> None:
    for name in ("timm-efficientnet", "shared", "keras-functional", "slots", "root"):
        model = zoo.named(name).build()
        listed = [row.name for row in policy_table(model) if row.part != "statistics"]
        assert len(listed) == len(set(listed))
        statistics = {id(t) for s in find_sites(model) for t in s.tensors or ()}
        assert len(listed) == len({id(p) for p in parameters_of(model).values()} - statistics)
