"""moments: any split of the same values measures the same, blends keep their ends, every number has its slow twin."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from renorm.errors import BatchError, UsageError
from renorm.moments import Moments, Observed, image_means, merge_all
from tests.reference import moments as twin

seeds = st.integers(0, 2**31)
shares = st.floats(0, 1, allow_nan=False)


def values(seed: int, samples: int, mean: float = 2e4) -> NDArray[np.float64]:
    """(samples, 3, 2) values of standard deviation 1 around `mean`."""
    return np.random.default_rng(seed).normal(mean, 1.0, size=(samples, 3, 2))


def some(seed: int, channels: int = 3) -> Moments:
    rng = np.random.default_rng(seed)
    mean, var = rng.normal(0, 2, channels), rng.uniform(0.1, 3, channels)
    return Moments(int(rng.integers(2, 50)), torch.tensor(mean), torch.tensor(var))


def close(got: Moments, wanted: Moments, tolerance: float = 1e-9) -> None:
    assert got.count == wanted.count
    torch.testing.assert_close(got.mean, wanted.mean, rtol=tolerance, atol=0)
    torch.testing.assert_close(got.var, wanted.var, rtol=tolerance, atol=1e-12)


@given(seeds, st.lists(st.integers(1, 63), max_size=6), st.sampled_from([0.0, -5e3, 2e4]))
def test_merging_any_split_equals_measuring_at_once(seed: int, cuts: list[int], mean: float) -> None:
    x = values(seed, 64, mean)
    parts = [part for part in np.split(x, sorted(cuts)) if len(part)]
    wanted = twin.of(x)
    got = merge_all(Moments.of(torch.tensor(part)) for part in parts)
    assert got.count == wanted.count
    np.testing.assert_allclose(got.mean, wanted.mean, rtol=1e-9)
    np.testing.assert_allclose(got.var, wanted.var, rtol=1e-9)


@given(seeds, seeds, seeds)
def test_merging_is_associative_and_commutative(a: int, b: int, c: int) -> None:
    first, second, third = (Moments.of(torch.tensor(values(s, 2 + s % 9))) for s in (a, b, c))
    close(first.merge(second).merge(third), first.merge(second.merge(third)))
    close(first.merge(second), second.merge(first))


@pytest.mark.parametrize("shape", [(7, 3), (7, 3, 5), (4, 3, 2, 5), (2, 3, 2, 3, 2), (1, 3, 4)])
def test_every_rank_is_measured_as_its_twin_does(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(1).normal(3, 2, shape)
    got, wanted = Moments.of(torch.tensor(x)), twin.of(x)
    assert got.count == wanted.count
    np.testing.assert_allclose(got.mean, wanted.mean, rtol=1e-12)
    np.testing.assert_allclose(got.var, wanted.var, rtol=1e-12)
    assert got.mean.dtype == got.var.dtype == torch.float64


@given(seeds, seeds)
def test_what_was_merged_can_be_taken_away(a: int, b: int) -> None:
    one, other = some(a), some(b)
    close(one.merge(other).without(other), one, 1e-6)


@pytest.mark.parametrize("axis", [1, -1, 2, 0])
def test_channels_may_lie_on_any_axis(axis: int) -> None:
    x = np.random.default_rng(2).normal(size=(5, 4, 3))
    got, wanted = Moments.of(torch.tensor(x), axis=axis), twin.of(x, axis=axis)
    np.testing.assert_allclose(got.mean, wanted.mean, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(got.var, wanted.var, rtol=1e-12)


def test_a_vector_is_one_channel() -> None:
    got = Moments.of(torch.tensor([1.0, 2.0, 6.0]))
    assert got.mean.tolist() == [3.0]
    assert got.count == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.uint8])
def test_narrow_values_are_measured_in_float64(dtype: torch.dtype) -> None:
    x = (torch.rand(50, 3, 4) * 200).to(dtype)
    wanted = twin.of(x.double().numpy())
    np.testing.assert_allclose(Moments.of(x).mean, wanted.mean, rtol=1e-12)
    np.testing.assert_allclose(Moments.of(x).var, wanted.var, rtol=1e-12)


def test_measuring_follows_torch_in_what_is_biased_and_what_is_not() -> None:
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    norm = torch.nn.BatchNorm1d(3, momentum=1.0).double()
    norm(x)
    moments = Moments.of(x)
    torch.testing.assert_close(moments.unbiased, norm.running_var)
    torch.testing.assert_close(moments.var, x.var((0, 2), correction=0))
    torch.testing.assert_close(moments.sd, moments.var.sqrt())
    np.testing.assert_allclose(moments.unbiased, twin.unbiased(twin.of(x.numpy())), rtol=1e-12)


def test_the_unbiased_variance_of_one_value_or_of_known_statistics_is_the_variance() -> None:
    one = Moments.of(torch.ones(1, 3))
    assert one.unbiased.tolist() == [0, 0, 0]
    known = Moments(math.inf, torch.zeros(2), torch.ones(2))
    assert known.unbiased.tolist() == [1, 1]


def test_measuring_does_not_hold_on_to_the_graph() -> None:
    x = torch.randn(4, 2, requires_grad=True)
    assert not Moments.of(x * 2).mean.requires_grad
    assert not image_means(x * 2).requires_grad


def test_no_values_are_refused_with_the_shape() -> None:
    with pytest.raises(BatchError, match=r"shape \(0, 3\).*no values"):
        Moments.of(torch.empty(0, 3))


def test_statistics_of_unknown_count_do_not_merge() -> None:
    known = Moments(math.inf, torch.zeros(3), torch.ones(3))
    for pair in ((known, some(1)), (some(1), known)):
        with pytest.raises(UsageError, match=r"unknown count.*`blend`"):
            pair[0].merge(pair[1])


@given(seeds, seeds, shares, st.booleans())
def test_blending_equals_its_twin(a: int, b: int, weight: float, cross_term: bool) -> None:
    source, target = some(a), some(b)
    got = source.blend(target, source_weight=weight, cross_term=cross_term)
    mean, var = twin.blend(_twin(source), _twin(target), weight, cross_term)
    np.testing.assert_allclose(got.mean, mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(got.var, var, rtol=1e-9, atol=1e-12)
    assert got.count == target.count


@given(seeds, seeds, st.booleans())
def test_a_blend_at_its_ends_is_the_source_or_the_target_bit_for_bit(a: int, b: int, cross_term: bool) -> None:
    source, target = some(a), some(b)
    for weight, wanted in ((1.0, source), (0.0, target)):
        got = source.blend(target, source_weight=weight, cross_term=cross_term)
        assert torch.equal(got.mean, wanted.mean)
        assert torch.equal(got.var, wanted.var)


@given(seeds, seeds, shares)
def test_blending_lies_between_its_ends_and_the_cross_term_only_adds(a: int, b: int, weight: float) -> None:
    source, target = some(a), some(b)
    plain = source.blend(target, source_weight=weight, cross_term=False)
    full = source.blend(target, source_weight=weight)
    low, high = torch.minimum(source.var, target.var), torch.maximum(source.var, target.var)
    assert ((plain.var >= low * (1 - 1e-12)) & (plain.var <= high * (1 + 1e-12))).all()
    assert (full.var >= plain.var).all()
    assert torch.equal(full.mean, plain.mean)


@given(seeds, seeds)
def test_blending_by_counts_equals_merging(a: int, b: int) -> None:
    source, target = some(a), some(b)
    share = source.count / (source.count + target.count)
    blended, merged = source.blend(target, source_weight=share), source.merge(target)
    torch.testing.assert_close(blended.mean, merged.mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(blended.var, merged.var, rtol=1e-9, atol=1e-12)


def test_every_channel_may_have_a_weight_of_its_own() -> None:
    source, target = some(1), some(2)
    got = source.blend(target, source_weight=torch.tensor([0.0, 1.0, 0.5]))
    assert got.mean[0] == target.mean[0]
    assert got.mean[1] == source.mean[1]
    wanted, _ = twin.blend(_twin(source), _twin(target), 0.5)
    assert got.mean[2] == pytest.approx(wanted[2])


@pytest.mark.parametrize("weight", [-0.1, 1.5, math.nan])
def test_a_weight_outside_its_range_is_refused(weight: float) -> None:
    with pytest.raises(UsageError, match=rf"share of the source in \[0, 1\]; got {weight}"):
        some(1).blend(some(2), source_weight=weight)


@pytest.mark.parametrize("shape", [(7, 3), (7, 3, 5), (4, 3, 2, 5), (1, 3, 2, 2)])
def test_an_observation_has_the_values_and_the_images_of_its_twin(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(3).normal(2, 1, shape)
    got, images = Observed.of(torch.tensor(x)), twin.of_images(x)
    assert got.images.count == shape[0] == images.count
    np.testing.assert_allclose(got.values.mean, twin.of(x).mean, rtol=1e-12)
    np.testing.assert_allclose(got.images.mean, images.mean, rtol=1e-12)
    np.testing.assert_allclose(got.images.var, images.var, rtol=1e-9, atol=1e-15)


@given(seeds, st.integers(1, 15))
def test_observations_of_any_split_merge_to_the_observation_of_all(seed: int, cut: int) -> None:
    x = torch.tensor(values(seed, 16))
    whole, parts = Observed.of(x), Observed.of(x[:cut]).merge(Observed.of(x[cut:]))
    close(parts.values, whole.values)
    close(parts.images, whole.images)


def test_the_standard_error_counts_images_not_positions() -> None:
    x = np.random.default_rng(4).normal(size=(9, 2, 1)).repeat(50, axis=2)  # 50 equal positions say no more than one
    seen = Observed.of(torch.tensor(x))
    var = torch.tensor([4.0, 0.25], dtype=torch.float64)
    wanted = twin.standard_error(twin.of_images(x), var.numpy())
    np.testing.assert_allclose(seen.standard_error(var), wanted, rtol=1e-12)


def test_one_image_has_an_infinite_standard_error() -> None:
    assert Observed.of(torch.randn(1, 2, 30)).standard_error(torch.ones(2)).tolist() == [math.inf, math.inf]


def test_means_of_narrow_images_are_taken_in_float32() -> None:
    x = torch.full((2, 1, 4096), 300.0, dtype=torch.float16)
    assert image_means(x).tolist() == [[300.0], [300.0]]
    assert image_means(x).dtype == torch.float32
    assert image_means(torch.ones(3, dtype=torch.float16)).shape == (3, 1)
    assert image_means(x.double()).dtype == torch.float64


def test_moments_move_between_devices_as_a_value() -> None:
    here = some(1)
    moved = here.to("meta")
    assert (moved.mean.device.type, moved.var.device.type) == ("meta", "meta")
    assert moved.count == here.count
    assert here.mean.device.type == "cpu"


def _twin(moments: Moments) -> twin.Reference:
    return twin.Reference(int(moments.count), moments.mean.numpy(), moments.var.numpy())
