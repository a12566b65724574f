"""affine: batch norm in evaluation is one scale and shift, which compose and can be taken back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from renorm.affine import Affine
from renorm.errors import UsageError
from tests.reference import affine as twin

seeds = st.integers(0, 2**31)


def some(seed: int, channels: int = 3) -> Affine:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(channels, generator=generator, dtype=torch.float64) * 2 + 0.1
    sign = torch.randint(0, 2, (channels,), generator=generator) * 2 - 1
    return Affine(scale * sign, torch.randn(channels, generator=generator, dtype=torch.float64))


def data(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (2, 3, 4, 2), (2, 3, 2, 2, 2)])
def test_the_map_of_a_batch_norm_equals_its_twin_and_torch(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape)
    mean, bias = rng.normal(size=(2, 3))
    var, weight = rng.uniform(0.1, 2, size=(2, 3))
    got = Affine.of(*map(torch.tensor, (mean, var, weight, bias)), 1e-3)(torch.tensor(x)).numpy()
    np.testing.assert_allclose(got, twin.batch_norm(x, mean, var, weight, bias, 1e-3), rtol=1e-10, atol=1e-12)
    theirs = nn.functional.batch_norm(*map(torch.tensor, (x, mean, var, weight, bias)), eps=1e-3)
    np.testing.assert_allclose(got, theirs, rtol=1e-10, atol=1e-12)


def test_a_norm_without_affine_is_scale_one_and_shift_zero_after_normalising() -> None:
    mean, var = torch.tensor([2.0]), torch.tensor([3.0])
    full = Affine.of(mean, var, torch.ones(1), torch.zeros(1), 1.0)
    bare = Affine.of(mean, var, None, None, 1.0)
    torch.testing.assert_close(bare, full)
    assert float(bare.scale) == 0.5
    assert float(bare.shift) == -1


@given(seeds, seeds, seeds)
def test_composing_maps_equals_applying_them_in_turn(a: int, b: int, c: int) -> None:
    first, second, x = some(a), some(b), data(c, 4, 3, 2)
    torch.testing.assert_close(first.then(second)(x), second(first(x)))


@given(seeds, seeds, seeds)
def test_composing_is_associative(a: int, b: int, c: int) -> None:
    first, second, third = some(a), some(b), some(c)
    torch.testing.assert_close(first.then(second).then(third), first.then(second.then(third)))


@given(seeds, seeds)
def test_the_inverse_takes_a_map_back_from_either_side(a: int, c: int) -> None:
    there, x = some(a), data(c, 4, 3)
    torch.testing.assert_close(there.inverse()(there(x)), x)
    torch.testing.assert_close(there(there.inverse()(x)), x)
    torch.testing.assert_close(there.then(there.inverse()), Affine(torch.ones(3).double(), torch.zeros(3).double()))


def test_a_map_without_inverse_is_refused_with_the_count() -> None:
    with pytest.raises(UsageError, match=r"2 of 3 scales are 0"):
        Affine(torch.tensor([0.0, 1.0, 0.0]), torch.zeros(3)).inverse()


def test_channels_may_lie_last() -> None:
    x = data(1, 4, 5, 3)
    torch.testing.assert_close(some(1)(x, axis=-1), some(1)(x.movedim(-1, 1)).movedim(1, -1))


def test_every_sample_may_have_a_map_of_its_own() -> None:
    x = data(2, 2, 3, 4)
    first, second = some(1), some(2)
    both = Affine(torch.stack([first.scale, second.scale]), torch.stack([first.shift, second.shift]))
    torch.testing.assert_close(both(x), torch.cat([first(x[:1]), second(x[1:])]))
