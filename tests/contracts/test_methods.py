"""Contract: every method of the catalogue measures any model of the zoo and leaves it as it was, also when it fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from renorm.calls import Caller
from renorm.methods.base import catalogue
from renorm.profile import Profile, profile
from renorm.sites import batch_sites
from tests import zoo
from tests.contracts.photograph import differences, photograph, process

every_method = pytest.mark.parametrize("name", sorted(catalogue()))


def batches(case: zoo.Case) -> list[Any]:
    """Tuples of one, so that a second input is not taken for labels."""
    return [(batch,) for batch in case.batches()]


def scores(output: Any) -> Tensor:
    """Class scores of whatever a model gives: the means of its first tensor over positions."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output.flatten(2).mean(2) if output.dim() > 2 else output


def prepared(case: zoo.Case) -> tuple[Any, Caller, Profile]:
    model = case.build()
    caller = Caller(forward=lambda model, batch: case.call(model, batch[0]), output=case.output or scores)
    return model, caller, profile(model, batches(case), forward=caller.forward, output=caller.output)


@every_method
@pytest.mark.parametrize("case", zoo.with_batch_norm())
def test_a_model_comes_out_as_it_went_in(case: zoo.Case, name: str) -> None:
    model, caller, known = prepared(case)
    before, around = photograph(model), process()
    sites = batch_sites(model, asked="the test")
    found = catalogue()[name]().estimate(model, batches(case), sites=sites, caller=caller, source=known)
    assert differences(before, photograph(model)) == []
    assert process() == around
    assert found.samples == 14
    assert found.batches == 3
    assert set(found.unvisited) == set(case.idle)
    assert set(found.moments) == {site.name for site in sites} - set(case.idle)
    assert found.moments.keys() == found.weights.keys()
    assert all(0 <= weight <= 1 for weight in found.weights.values())
    for site in sites:
        if site.name in found.moments:
            moments = found.moments[site.name]
            assert moments.mean.shape == moments.var.shape == (site.channels,)
            assert bool(torch.isfinite(moments.mean).all() & (moments.var >= 0).all())


@every_method
@pytest.mark.parametrize("case", zoo.with_batch_norm())
def test_a_batch_that_fails_leaves_every_bit(case: zoo.Case, name: str) -> None:
    class Failing:
        def __iter__(self) -> Iterator[Any]:
            yield from batches(case)[:2]
            torch.rand(3)
            raise KeyboardInterrupt

    model, caller, known = prepared(case)
    before, around = photograph(model), process()
    method, sites = catalogue()[name](), batch_sites(model, asked="the test")
    with pytest.raises(KeyboardInterrupt):
        method.estimate(model, Failing(), sites=sites, caller=caller, source=known)
    assert differences(before, photograph(model)) == []
    assert process() == around


@every_method
def test_it_says_what_it_stands_on(name: str) -> None:
    method = catalogue()[name]
    assert method.__doc__
    assert method.cites.startswith("@")
