"""The method "pooled": the source's share by images counted and by the noise in them; reading stops when it is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from renorm.calls import Caller
from renorm.errors import UsageError
from renorm.methods.base import Estimate
from renorm.methods.pooled import FLOOR, Pooled
from renorm.moments import Moments
from renorm.profile import profile
from renorm.recalibrate import recalibrate_
from renorm.sites import find_sites
from tests.reference import pooled as twin


def layer(channels: int = 4) -> nn.Sequential:
    """One batch norm that sees the input itself, with statistics that are not those it was made with."""
    model = nn.Sequential(
        nn.BatchNorm2d(channels), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)
    ).eval()
    torch.manual_seed(3)
    model[0].running_mean.uniform_(-1, 1)
    model[0].running_var.uniform_(0.5, 2)
    return model


def shifted(count: int, channels: int = 4) -> Tensor:
    torch.manual_seed(count)
    return torch.randn(count, channels, 5, 5) * 1.5 + torch.randn(count, channels, 1, 1) + 1


def estimate(images: Tensor, **options: Any) -> Estimate:
    model = layer()
    return Pooled(**options).estimate(model, [images], sites=find_sites(model), caller=Caller())


@pytest.mark.parametrize("count", [2, 16, 300])
def test_auto_is_its_formula(count: int) -> None:
    images = shifted(count)
    held = layer()[0]
    found = estimate(images)
    mean, var = (t.double().numpy() for t in (held.running_mean, held.running_var))
    share, want_mean, want_var = twin.blended(images.double().numpy(), mean, var, held.eps)
    assert found.weights["0"] == pytest.approx(share, rel=1e-4)
    np.testing.assert_allclose(found.moments["0"].mean, want_mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.moments["0"].var, want_var, rtol=1e-4)


def test_the_share_of_the_source_falls_with_more_images_to_a_floor() -> None:
    shares = [estimate(shifted(count)).weights["0"] for count in (4, 16, 64, 4000)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(FLOOR, abs=0.02)


@given(st.integers(0, 500), st.integers(2, 60))
def test_a_number_counts_the_source_as_that_many_images(prior: int, count: int) -> None:
    found = estimate(images := shifted(count), prior=prior)
    assert found.weights["0"] == prior / (prior + count)
    held = find_sites(layer())[0].statistics()
    assert held is not None
    want = held.blend(Moments.of(images), source_weight=prior / (prior + count), cross_term=False)
    torch.testing.assert_close(found.moments["0"].mean, want.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.moments["0"].var, want.var, rtol=1e-5, atol=1e-6)


def test_one_image_says_nothing_against_the_source() -> None:
    assert estimate(shifted(1)).weights["0"] == 1.0


def test_a_profile_holds_layers_that_hardly_moved() -> None:
    """With its own train/test gap known, a layer that moved less than that keeps most of its source."""
    model = layer()
    near = [
        torch.randn(500, 4, 5, 5) * model[0].running_var.sqrt().view(1, -1, 1, 1)
        + model[0].running_mean.view(1, -1, 1, 1)
    ]
    known = profile(model, [(near[0], torch.arange(500) % 3)])
    sites = find_sites(model)
    stay = Pooled().estimate(model, near, sites=sites, caller=Caller(), source=known).weights["0"]
    move = Pooled().estimate(model, [shifted(500)], sites=sites, caller=Caller(), source=known).weights["0"]
    assert stay > 0.9
    assert move < 0.2


def test_reading_stops_once_every_site_is_certain() -> None:
    batches = list(shifted(4000).split(50))
    found = recalibrate_(layer(), batches, tolerance=0.05)
    error = Moments.of(torch.cat(batches[: found.samples // 50]).mean((2, 3)))
    # in source sd, root mean square over channels
    held = layer()[0].running_var.double()
    assert math.sqrt(float((error.unbiased / error.count / held).mean())) <= 0.05
    assert found.samples < 1500
    assert recalibrate_(layer(), batches).samples == 4000


def test_a_certainty_that_was_not_reached_is_said() -> None:
    found = recalibrate_(layer(), [shifted(20)], tolerance=0.001)
    assert any("all 20 images were read" in note and "asked for 0.001" in note for note in found.notes)


@pytest.mark.parametrize("prior", [0, 16, "auto"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_ruined_channels_take_the_targets_moments_and_leave_the_others_alone(prior: Any, value: float) -> None:
    images = shifted(64)
    model, sound = layer(), layer()
    model[0].running_var[2] = value
    recalibrate_(model, [images], prior=prior)
    recalibrate_(sound, [images], prior=prior)
    assert bool(torch.isfinite(model[0].running_var).all())
    torch.testing.assert_close(model[0].running_var[2], images[:, 2].var(), rtol=1e-4, atol=1e-4)
    if prior != "auto":  # there the weight is of all channels together
        others = [0, 1, 3]
        torch.testing.assert_close(model[0].running_var[others], sound[0].running_var[others])
        torch.testing.assert_close(model[0].running_mean[others], sound[0].running_mean[others])


@pytest.mark.parametrize("prior", [-1, 0.5, True, "some"])
def test_a_prior_that_counts_nothing_is_refused(prior: Any) -> None:
    with pytest.raises(UsageError, match=r'prior is "auto" or the number of images.*got '):
        Pooled(prior=prior)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan")])
def test_a_tolerance_of_nothing_is_refused(tolerance: float) -> None:
    with pytest.raises(UsageError, match="tolerance is a standard error in source standard deviations, above 0"):
        Pooled(tolerance=tolerance)
