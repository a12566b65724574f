"""Contract: observing any model of the zoo measures what its twin does, and leaves model and process as they were."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from renorm.observe import observe
from renorm.sites import find_sites, unwrap
from tests import zoo
from tests.contracts.photograph import differences, photograph, process
from tests.reference import observing as twin


class Stop(KeyboardInterrupt):
    """Control-C, told from a real one."""


def interrupted_after(items: list[Any], error: BaseException) -> Iterator[Any]:
    yield from items
    np.random.rand()
    random.random()
    raise error


under = pytest.mark.parametrize("under", ["batch", "running"])


@under
@pytest.mark.parametrize("case", zoo.cases(without=("lazy", "slots")))
def test_observing_equals_its_twin(case: zoo.Case, under: str) -> None:
    if case.name == "no-statistics" and under == "running":
        pytest.skip("a layer without statistics normalises by the batch in evaluation too: its twin is the other one")
    model = case.build()
    got = observe(model, case.batches(), under=under, forward=case.forward)
    plain = unwrap(case.build())
    for module in list(plain.modules()):
        module._compiled_call_impl = None
    layers = {s.name: (s.module, s.axis) for s in find_sites(plain) if s.kind == "batch"}
    torch._dynamo.reset()
    with torch.compiler.set_stance("force_eager"):
        wanted = twin.observe(plain, layers, case.batches(), under=under, call=case.call)
    assert list(got) == case.reached(model) == list(wanted)
    tolerance = 3e-2 if "narrow" in case.tags else 2e-2 if case.name == "quantisation-aware" else 2e-5
    for name, seen in got.items():
        values, images = wanted[name]
        assert (seen.values.count, seen.images.count) == (values.count, images.count), name
        sd = np.sqrt(values.var + 1e-6)
        for moments, reference in ((seen.values, values), (seen.images, images)):
            np.testing.assert_allclose(moments.mean.numpy() / sd, reference.mean / sd, atol=tolerance, err_msg=name)
            np.testing.assert_allclose(
                moments.sd.numpy() / sd, np.sqrt(reference.var) / sd, atol=tolerance, err_msg=name
            )


@under
@pytest.mark.parametrize("case", zoo.cases(without=("lazy",)))
def test_observing_changes_nothing(case: zoo.Case, under: str) -> None:
    model = case.settled()
    before, around = photograph(model), process()
    observe(model, case.batches(), under=under, forward=case.forward)
    assert differences(before, photograph(model)) == []
    assert process() == around


@pytest.mark.parametrize("error", [OSError("the disk is gone"), Stop("control-C")], ids=["loader", "keyboard"])
@pytest.mark.parametrize("case", zoo.cases(without=("lazy",)))
def test_a_loader_that_stops_midway_leaves_nothing_changed(case: zoo.Case, error: BaseException) -> None:
    model = case.settled()
    before, around = photograph(model), process()
    with pytest.raises(type(error), match=str(error)):
        observe(model, interrupted_after(case.batches()[:2], error), under="batch", forward=case.forward)
    assert differences(before, photograph(model)) == []
    assert process() == around


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), Stop("control-C")], ids=["forward", "keyboard"])
@pytest.mark.parametrize("case", zoo.cases(without=("lazy", "keras")))
def test_a_forward_that_fails_midway_leaves_nothing_changed(case: zoo.Case, error: BaseException) -> None:
    model = case.settled()
    reached = [s.module for s in find_sites(model) if s.name in case.reached(model)]
    calls: list[torch.Tensor] = []

    def fail(*_: Any) -> None:
        calls.append(torch.rand(1))
        if len(calls) == 2:
            raise error

    (reached[-1] if reached else unwrap(model)).register_forward_hook(fail)
    before, around = photograph(model), process()
    with pytest.raises(type(error), match=str(error)):
        observe(model, case.batches() * 2, under="batch", forward=case.forward)
    assert differences(before, photograph(model)) == []
    assert process() == around


@under
@pytest.mark.parametrize("case", zoo.cases(without=("lazy", "keras", "compiled", "wrapped")))
def test_a_model_in_training_is_observed_as_in_evaluation_and_stays_in_training(case: zoo.Case, under: str) -> None:
    wanted = observe(case.build(), case.batches(), under=under, forward=case.forward)
    model = case.build().train()
    before = photograph(model)
    got = observe(model, case.batches(), under=under, forward=case.forward)
    assert differences(before, photograph(model)) == []
    assert list(got) == list(wanted)
    for name in got:
        assert torch.equal(got[name].values.mean, wanted[name].values.mean), name
        assert torch.equal(got[name].values.var, wanted[name].values.var), name


@pytest.mark.parametrize("case", zoo.cases(without=("lazy",)))
def test_what_was_not_reached_is_named_and_what_is_functional_counted(case: zoo.Case) -> None:
    model = case.build()
    seen = observe(model, case.batches(), under="running", forward=case.forward)
    assert set(seen.unvisited) == set(case.idle)
    assert seen.samples == sum(zoo.SIZES)
    assert seen.batches == len(zoo.SIZES)
    assert seen.functional == ("functional" in case.tags)


@pytest.mark.parametrize("case", zoo.cases(without=("lazy", "keras", "wrapped", "compiled")))
def test_a_copy_observes_the_same(case: zoo.Case) -> None:
    model = case.build()
    first = observe(model, case.batches(), under="batch", forward=case.forward)
    second = observe(copy.deepcopy(model), case.batches(), under="batch", forward=case.forward)
    for name in first:
        assert torch.equal(first[name].values.var, second[name].values.var)
