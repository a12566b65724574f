"""Contract: any model of the zoo takes every layer of the catalogue, keeps what it promises, and comes back to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from renorm.errors import NoBatchNorm, UsageError
from renorm.layers.base import Tracking, catalogue
from renorm.sites import find_sites, unwrap
from renorm.surgery import convert_
from tests import zoo
from tests.contracts.photograph import differences, photograph, process

REFUSED = {
    "root": (UsageError, "this model is itself the batch norm"),
    "no-norm": (NoBatchNorm, "convert_ needs batch norm layers that hold running statistics"),
    "tokens": (NoBatchNorm, "convert_ needs batch norm layers"),
    "lazy": (UsageError, "is lazy and has seen no input yet"),
    "slots": (UsageError, "TwoSets, holds several sets of statistics"),
    "bn-lstm": (UsageError, "StepNorm, holds several sets of statistics"),
    "bn-gru": (UsageError, "StepNorm, holds several sets of statistics"),
    "keras-sequential": (UsageError, "is Keras' own, whose graph calls it by name"),
    "keras-functional": (UsageError, "is Keras' own"),
    "keras-within-torch": (UsageError, "the layer at '4' is Keras' own"),
}
usable = [p for p in zoo.cases() if p.id not in REFUSED]
WIDELY = ("batch", "per_domain", "shrink", "stochastic")  # over the whole zoo; the others where layers differ most
CLOSELY = ("bn1d", "bn2d", "sync", "no-affine", "frozen-four", "timm-norm-act")
PAIRS = [(p.values[0], name) for p in usable for name in sorted(catalogue()) if name in WIDELY or p.id in CLOSELY]


def outputs(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = (
        output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else vars(output).values()
    )
    return [part for part in parts if isinstance(part, Tensor)]


def ran(case: zoo.Case, model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return outputs(case.call(model, case.batch()))


@pytest.mark.parametrize(("case", "name"), PAIRS, ids=str)
def test_it_evaluates_as_before_where_that_is_promised_and_comes_back_whole(case: zoo.Case, name: str) -> None:
    model = case.build()
    wanted = [] if case.name == "mixed-modes" else ran(case, model)
    before, around, keys = photograph(model), process(), list(model.state_dict())
    conversion = convert_(model, name)
    kind = catalogue()[name]
    layers = [m for m in unwrap(model).modules() if isinstance(m, kind)]
    assert set(conversion.converted) | set(conversion.kept) == {
        n for n, k, _ in case.places(case.build()) if k == "batch"
    }
    assert len(layers) >= len(conversion.converted) * (name != "batch")
    assert set(conversion.distance) == set(conversion.converted)
    assert process() == around
    if kind.keeps:
        tolerance = 3e-2 if "narrow" in case.tags else 2e-3 if "many" in case.tags else 1e-4
        assert max(conversion.distance.values(), default=0.0) <= tolerance
        if case.name not in ("quantisation-aware", "mixed-modes"):  # where running it once changes what comes next
            torch.testing.assert_close(ran(case, model), wanted, rtol=tolerance, atol=tolerance)
        if issubclass(kind, Tracking):
            assert [k for k in model.state_dict() if ".extra." not in k and k in keys] == [
                k for k in keys if k in model.state_dict()
            ]
    conversion.restore_()
    if case.name != "quantisation-aware":  # its observers moved with the batch
        assert differences(before, photograph(model)) == []
    assert list(model.state_dict()) == keys
    conversion.restore_()


@pytest.mark.parametrize("case", usable)
def test_going_there_and_back_gives_the_very_values(case: zoo.Case) -> None:
    model = case.build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kinds = {s.name: type(s.module) for s in find_sites(model)}
    there = convert_(model, "stochastic")
    back = convert_(model, "batch")
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    for site in find_sites(model):
        assert kinds[site.name] not in plain or type(site.module) is kinds[site.name]
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    back.restore_()
    there.restore_()
    assert list(model.state_dict()) == list(before)


@pytest.mark.parametrize("name", WIDELY)
@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_cannot_be_converted_is_refused_and_untouched(case: str, name: str) -> None:
    model = zoo.named(case).build()
    before = photograph(model)
    error, match = REFUSED[case]
    if name == "batch" and case == "root":
        assert convert_(model, name).converted == ()
        return
    with pytest.raises(error, match=match):
        convert_(model, name)
    assert differences(before, photograph(model)) == []
