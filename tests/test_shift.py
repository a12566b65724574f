"""shift: distances are those of their definitions, zero exactly where moments agree, symmetric where they say so."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from renorm.moments import Moments
from renorm.shift import LayerShift, Shift
from tests.reference import shift as twin

means = st.floats(-3, 3)
variances = st.floats(0.05, 20)


def one(mean: float, var: float) -> Moments:
    return Moments(math.inf, torch.tensor([mean], dtype=torch.float64), torch.tensor([var], dtype=torch.float64))


PAIRS = [(0.0, 1.0, 0.5, 1.0), (1.0, 4.0, -2.0, 0.25), (0.0, 1.0, 0.0, 9.0), (-1.0, 0.2, 0.3, 0.4)]


@pytest.mark.parametrize("name", Shift._fields)
@pytest.mark.parametrize("pair", PAIRS)
def test_every_distance_equals_its_definition(name: str, pair: tuple[float, float, float, float]) -> None:
    ms, vs, mt, vt = pair
    got = getattr(Shift.between(one(ms, vs), one(mt, vt)), name)
    assert float(got) == pytest.approx(getattr(twin, name)(ms, vs, mt, vt), rel=1e-5, abs=1e-9)


@given(means, variances, st.floats(0, 1e-1))
def test_equal_moments_are_at_distance_zero(mean: float, var: float, eps: float) -> None:
    shift = Shift.between(one(mean, var), one(mean, var), eps=eps)
    assert [float(d) for d in shift] == [0, 0, 0, 0]
    assert shift.moved == 0


@given(means, variances, means, variances)
def test_different_moments_are_not(ms: float, vs: float, mt: float, vt: float) -> None:
    shift = Shift.between(one(ms, vs), one(mt, vt))
    if abs(ms - mt) > 1e-3 or abs(math.log(vs / vt)) > 1e-3:
        assert shift.sym_kl > 0
        assert shift.wasserstein2 > 0
        assert shift.moved > 0
        assert shift.mean_gap > 0 or shift.log_sd_ratio != 0


@given(means, variances, means, variances)
def test_what_turning_source_and_target_round_does(ms: float, vs: float, mt: float, vt: float) -> None:
    there, back = Shift.between(one(ms, vs), one(mt, vt)), Shift.between(one(mt, vt), one(ms, vs))
    torch.testing.assert_close(there.sym_kl, back.sym_kl)  # symmetric by name
    torch.testing.assert_close(there.log_sd_ratio, -back.log_sd_ratio)  # signed
    in_units = math.sqrt(vs), math.sqrt(vt)  # the others are symmetric once their units are taken off
    torch.testing.assert_close(there.mean_gap * in_units[0], back.mean_gap * in_units[1])
    torch.testing.assert_close(there.wasserstein2 * in_units[0], back.wasserstein2 * in_units[1])


@given(means, variances, means, variances, st.floats(-50, 50), st.floats(0.1, 30))
def test_distances_do_not_depend_on_the_units_of_the_values(
    ms: float, vs: float, mt: float, vt: float, offset: float, scale: float
) -> None:
    plain = Shift.between(one(ms, vs), one(mt, vt))
    other = Shift.between(one(ms * scale + offset, vs * scale**2), one(mt * scale + offset, vt * scale**2))
    for a, b in zip(plain, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_eps_is_added_to_both_variances() -> None:
    assert float(Shift.between(one(0, 0.0), one(1, 0.0), eps=0.25).mean_gap) == 2
    assert float(Shift.between(one(0, 1.0), one(0, 3.0), eps=1.0).log_sd_ratio) == pytest.approx(math.log(2) / 2)


def test_dead_channels_stay_finite() -> None:
    shift = Shift.between(one(0, 0.0), one(0, 0.0))
    assert [float(d) for d in shift] == [0, 0, 0, 0]
    assert all(math.isfinite(float(d)) for d in Shift.between(one(0, -1e-9), one(0.1, 1.0)))


def test_a_layer_is_the_mean_over_channels_of_what_moved_whichever_way() -> None:
    source = Moments(math.inf, torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    target = Moments(9, torch.tensor([1.0, -3.0], dtype=torch.float64), torch.tensor([math.e**2, math.e**-2]).double())
    shift = Shift.between(source, target)
    assert shift.layer.mean_gap == pytest.approx(2)
    assert shift.layer.log_sd_ratio == pytest.approx(1)  # one doubled, one halved: they do not cancel
    assert isinstance(shift.layer, LayerShift)
    assert all(isinstance(d, float) for d in shift.layer)


def test_moved_is_the_squared_gap_and_squared_log_ratio_with_a_bound_for_each_channel() -> None:
    source = Moments(math.inf, torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    target = Moments(9, torch.tensor([0.5, 0.0, 100.0]).double(), torch.tensor([1.0, math.e**2, 1.0]).double())
    assert Shift.between(source, target).moved == pytest.approx((0.25 + 1 + 4) / 3, rel=1e-6)


def test_channels_do_not_mix() -> None:
    rng = np.random.default_rng(5)
    ms, mt = torch.tensor(rng.normal(size=(2, 4)))
    vs, vt = torch.tensor(rng.uniform(0.2, 3, size=(2, 4)))
    whole = Shift.between(Moments(math.inf, ms, vs), Moments(7, mt, vt))
    for c in range(4):
        single = Shift.between(one(float(ms[c]), float(vs[c])), one(float(mt[c]), float(vt[c])))
        for a, b in zip(whole, single, strict=True):
            torch.testing.assert_close(a[c : c + 1], b)
