"""Accuracy without labels: every witness against its slow twin, the interval against coins, and real networks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from renorm.accuracy import (
    FAR,
    FEWEST,
    Accuracy,
    Home,
    Look,
    Signals,
    combined,
    estimate,
    half_width,
    look,
    mean_moved,
    signals,
    spread,
)
from renorm.calls import Caller
from renorm.doctor import diagnose
from renorm.errors import UsageError
from renorm.facts import Facts
from renorm.models import load_model
from renorm.profile import Profile, profile
from tests.data import shared
from tests.reference import accuracy as twin
from tests.test_doctor import images, trained


def logits(count: int, classes: int, seed: int, *, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classifier() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(*trained(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


@given(st.integers(2, 60), st.integers(2, 5), st.integers(0, 99))
def test_home_is_what_its_twin_measures(count: int, classes: int, seed: int) -> None:
    said = logits(count, classes, seed)
    labels = torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))
    assert Home.of(said, labels) == pytest.approx(twin.home(said.numpy(), labels.numpy()), abs=1e-9)


@given(st.integers(1, 40), st.integers(2, 5), st.integers(0, 99), st.floats(0, 2))
def test_the_estimate_is_what_its_twin_says(count: int, classes: int, seed: int, moved: float) -> None:
    source, pooled, mixed = (logits(count, classes, seed + k).softmax(1) for k in range(3))
    alone = signals(Look(source, pooled, None), moved=moved)
    assert combined(alone) == pytest.approx(twin.estimate(source.numpy(), [pooled.numpy()], moved, FAR, None))
    home = Home(0.8, 0.9, 0.55)
    known = signals(Look(source, pooled, mixed), moved=moved, home=home)
    assert combined(known) == pytest.approx(
        twin.estimate(source.numpy(), [pooled.numpy(), mixed.numpy()], moved, FAR, 0.55)
    )
    assert known.difference == pytest.approx(min(max(0.8 - (0.9 - known.confidence), 0), 1))


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 5), st.integers(FEWEST, 10_000))
def test_an_estimate_is_a_share_within_its_interval(sure: float, agree: float, moved: float, samples: int) -> None:
    found = estimate(Signals(sure, agree, None, None, None, moved), samples=samples)
    assert min(sure, agree) - 1e-12 <= found.value <= max(sure, agree) + 1e-12
    assert 0 <= found.interval[0] <= found.value <= found.interval[1] <= 1
    assert found.lost is None


def test_sureness_is_believed_at_home_and_agreement_far_from_it() -> None:
    near, far = (combined(Signals(0.9, 0.3, None, None, None, moved)) for moved in (0.0, 10.0))
    assert near == 0.9
    assert far == pytest.approx(0.3, abs=0.05)


def test_the_interval_narrows_with_samples_down_to_what_the_witnesses_do_not_know() -> None:
    widths = [half_width(0.5, samples, 0.1) for samples in (50, 500, 5_000_000)]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] == pytest.approx(0.1, abs=1e-3)
    assert half_width(0.5, 100, 0.0) == pytest.approx(1.645 * 0.05)


def test_the_interval_widens_as_the_moments_move() -> None:
    assert spread(0.0, (0.1, 0.4)) == pytest.approx(0.1)
    assert spread(FAR, (0.1, 0.4)) == pytest.approx(0.25)
    assert spread(100.0, (0.1, 0.4)) == pytest.approx(0.4, abs=1e-6)
    near, far = (estimate(Signals(0.8, 0.8, None, None, None, moved), samples=10**6) for moved in (0.0, 1.0))
    assert near.interval[0] > far.interval[0]


def test_what_is_lost_is_against_the_source() -> None:
    home = Home(0.9, 0.95, 0.5)
    found = estimate(Signals(0.8, 0.8, 0.8, 0.8, 0.8, 0.01), samples=100, home=home)
    assert found.lost == pytest.approx(0.9 - found.value)


def test_looking_changes_nothing_and_sees_three_models() -> None:
    model, batches = classifier(), [images(64, scale=2.0), images(64, scale=2.0, seed=5)]
    held = {name: value.clone() for name, value in model.state_dict().items()}
    known = profile(model, [(images(100, seed=7), torch.arange(100) % 4)])
    seen = look(model, batches, Caller(), known)
    assert all(value.equal(held[name]) for name, value in model.state_dict().items())
    assert seen.source.shape == (128, 4)
    assert seen.mixed is not None
    assert not seen.source.equal(seen.pooled)
    assert not seen.pooled.equal(seen.mixed)
    assert seen.source.sum(1) == pytest.approx(torch.ones(128))


def test_outputs_that_are_no_rows_of_logits_are_refused_and_not_estimated() -> None:
    maps = trained()
    with pytest.raises(UsageError, match="one row a sample"):
        look(maps, [images(64)], Caller())
    diagnosis = diagnose(maps, [images(64)])
    assert (diagnosis.kind, diagnosis.estimate) == (None, None)


def test_too_few_samples_broken_statistics_and_no_data_are_not_estimated() -> None:
    model = classifier()
    assert diagnose(model, [images(FEWEST - 1)]).estimate is None
    assert diagnose(model).estimate is None
    assert diagnose(model, [images(FEWEST)]).estimate is not None
    model[1].running_var[0] = math.nan
    assert diagnose(model, [images(64)]).estimate is None


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match=r"logits \(N, K\) and labels \(N,\); got"):
        Home.of(torch.zeros(3, 2), torch.zeros(2))


def test_a_profile_keeps_the_threshold_and_an_older_one_has_none(tmp_path: object) -> None:
    model = classifier()
    x, y = images(100, seed=7), torch.arange(100) % 4
    known = profile(model, [(x[:50], y[:50]), (x[50:], y[50:])])
    path = f"{tmp_path}/p.safetensors"
    known.save(path)
    loaded = Profile.load(path)
    with torch.no_grad():
        assert Home.known(loaded) == pytest.approx(Home.of(model(x), y), abs=1e-6)
    assert Home.known(profile(model, [x])) is None
    assert Home.known(None) is None


def test_the_mean_over_no_site_is_nought() -> None:
    assert (mean_moved([]), mean_moved([1.0, 2.0])) == (0.0, 1.5)


def test_a_real_network_that_lost_accuracy_is_told_without_labels() -> None:
    weights, nets = shared("weights/resnet8_cifar10.pt"), shared("nets.py")
    with np.load(shared("cifar10_lossless_test200.npz")) as file:
        home = torch.from_numpy(file["images"]).permute(0, 3, 1, 2).float(), torch.from_numpy(file["labels"]).long()
    model = load_model(f"{nets}:resnet8", checkpoint=weights)
    known = profile(model, [home])
    flat = (home[0] - 128) * 0.15 + 128
    with torch.no_grad():
        truth = float((model(flat).argmax(1) == home[1]).double().mean())
    found = Facts(model, [flat], known).accuracy
    assert isinstance(found, Accuracy)
    assert found.interval[0] <= truth <= found.interval[1]
    assert found.lost is not None
    assert found.lost > 0.2
