"""Contract: the norm layers of every model of the zoo are found, by name, kind and width, and nothing is touched."""

from __future__ import annotations

import math

import pytest
import torch

from renorm.sites import find_sites, unwrap
from tests import zoo
from tests.contracts.photograph import differences, photograph, process


@pytest.mark.parametrize("case", zoo.cases())
def test_the_sites_are_those_that_stand_there(case: zoo.Case) -> None:
    model = case.build()
    assert tuple((s.name, s.kind, s.channels) for s in find_sites(model)) == case.places(model)


@pytest.mark.parametrize("case", zoo.cases())
def test_finding_changes_nothing(case: zoo.Case) -> None:
    model = case.build()
    before, around = photograph(model), process()
    find_sites(model)
    assert differences(before, photograph(model)) == []
    assert process() == around


@pytest.mark.parametrize("case", zoo.cases(without=("lazy",)))
def test_batch_norms_tell_the_statistics_they_hold_and_others_none(case: zoo.Case) -> None:
    for site in find_sites(case.build()):
        held = site.statistics()
        if site.kind == "batch" and site.name not in case.silent:
            assert held is not None
            assert held.count == math.inf
            assert held.mean.shape == held.var.shape == (site.channels,)
            assert held.mean.dtype == held.var.dtype == torch.float64
            assert (held.var > 0).all()
            held.mean.add_(1)  # a copy: the layer does not notice
            again = site.statistics()
            assert again is not None
            assert not torch.equal(again.mean, held.mean)
        elif site.kind != "instance":
            assert held is None


@pytest.mark.parametrize("case", zoo.cases(only=("wrapped",)))
def test_a_wrapped_model_has_the_sites_of_the_model_inside(case: zoo.Case) -> None:
    model = case.build()
    inside = unwrap(model)
    assert type(inside) is torch.nn.Sequential
    assert [(s.name, s.module) for s in find_sites(model)] == [(s.name, s.module) for s in find_sites(inside)]
    assert unwrap(inside) is inside


@pytest.mark.parametrize("case", zoo.cases(without=("keras", "compiled", "wrapped", "slots")))
def test_a_name_leads_to_its_module(case: zoo.Case) -> None:
    model = case.build()
    for site in find_sites(model):
        assert model.get_submodule(site.name) is site.module
