"""BatchNorm itself: first use decides its width, padding counts for nothing, the essay's checkpoint loads."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from renorm import layers
from renorm.errors import UsageError
from renorm.layers.batch import BatchNorm, BNLayer
from renorm.sites import find_sites, is_lazy
from tests.layers.catalogue import images, lived
from tests.reference import layers as twin


def test_the_essays_first_line_works() -> None:
    layer = layers.BNLayer(128)
    y = layer(torch.randn(32, 128))
    torch.testing.assert_close(y.mean(0), torch.zeros(128), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(0, correction=0), torch.ones(128), atol=1e-3, rtol=0)
    assert BNLayer is BatchNorm
    assert "σ_new" in BatchNorm.__doc__
    assert torch.equal(BNLayer(4, "relu")(images(6, 4)), BNLayer(4, act="relu")(images(6, 4)))


def test_a_checkpoint_of_the_essays_wrapper_loads() -> None:
    wrapper = nn.Module()
    wrapper.bn = lived("batch")
    layer = BatchNorm(4)
    layer.load_state_dict(wrapper.state_dict())
    assert all(torch.equal(v, wrapper.bn.state_dict()[k]) for k, v in layer.state_dict().items())
    model, holder = nn.Sequential(BatchNorm(4)), nn.Sequential(wrapper)
    model.load_state_dict(holder.state_dict())


@pytest.mark.parametrize("axis", [1, -1])
def test_without_a_width_the_first_input_decides(axis: int) -> None:
    model = nn.Sequential(BatchNorm(axis=axis), nn.ReLU())
    (site,) = find_sites(model)
    assert is_lazy(site)
    assert site.channels == 0
    x = images(6, 4, 3, 4).movedim(1, axis)
    model(x)
    (site,) = find_sites(model)
    assert (site.channels, is_lazy(site)) == (4, False)
    assert model[0].weight.shape == (4,)
    copy.deepcopy(model)(x)
    assert type(model[0]) is BatchNorm


def test_a_layer_without_a_width_takes_it_from_a_checkpoint() -> None:
    layer = BatchNorm()
    layer.load_state_dict(lived("batch").state_dict())
    assert layer.num_features == 4
    x = images(6, 4, 3, 3)
    assert torch.equal(layer.eval()(x), lived("batch").eval()(x))
    plain = BatchNorm(affine=False)
    plain(x)
    assert plain.num_features == 4


def padded(lengths: list[int], fill: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences of these lengths (N, C, T) with `fill` after their end, their mask (N, T), and the real values (1, C, all)."""
    x = images(len(lengths), 3, max(lengths), dtype=torch.float64)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    real = torch.cat([row[:, :length] for row, length in zip(x, lengths, strict=True)], 1)[None]
    return torch.where(mask[:, None], x, fill), mask, real


@given(st.lists(st.integers(1, 6), min_size=2, max_size=5), st.sampled_from([0.0, 7.0, float("nan")]))
def test_padding_moves_nothing(lengths: list[int], fill: float) -> None:
    x, mask, real = padded(lengths, fill)
    layer, other = BatchNorm(3, dtype=torch.float64), BatchNorm(3, dtype=torch.float64)
    got, wanted = layer(x, mask=mask), other(real)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(layer, key), getattr(other, key))
    real_now = torch.cat([row[:, :length] for row, length in zip(got, lengths, strict=True)], 1)[None]
    torch.testing.assert_close(real_now, wanted)


def test_weights_count_as_their_twin_says() -> None:
    x, weight = images(5, 4, 6, dtype=torch.float64), torch.rand(5, 6, dtype=torch.float64)
    layer = lived("batch", dtype=torch.float64, momentum=1.0)
    got = layer(x, weight=weight)
    mean, biased, unbiased = twin.weighed(x.numpy(), weight.numpy())
    wanted = twin.by_moments(x.numpy(), mean, biased, layer.weight.detach().numpy(), layer.bias.detach().numpy())
    np.testing.assert_allclose(got.detach().numpy(), wanted, rtol=1e-9)
    np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-9)
    np.testing.assert_allclose(layer.running_var.numpy(), unbiased, rtol=1e-9)
    again = lived("batch", dtype=torch.float64, momentum=1.0)
    again(x, weight=weight * 3)
    torch.testing.assert_close(again.running_var, layer.running_var)


def test_a_mask_may_name_samples_alone_and_stand_beside_weights() -> None:
    x = images(6, 4, 3, 3)
    layer, other = lived("batch"), lived("batch")
    keep = torch.tensor([True, True, False, True, False, True])
    got, wanted = layer(x, mask=keep, weight=torch.full((6, 3, 3), 2.0)), other(x[keep])
    torch.testing.assert_close(got[keep], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.running_var, other.running_var)


def test_masked_gradients_are_those_of_the_formula() -> None:
    layer = lived("batch", 3, torch.float64)
    layer.track_running_stats = False
    x, mask, _ = padded([4, 2, 3], 1.0)
    x = x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: layer(x, mask=mask), (x, *layer.parameters()))


def test_channels_last_data_with_a_mask() -> None:
    x, mask, _ = padded([4, 2, 3], 1.0)
    layer, other = BatchNorm(3, dtype=torch.float64), BatchNorm(3, axis=-1, dtype=torch.float64)
    torch.testing.assert_close(other(x.movedim(1, -1), mask=mask).movedim(-1, 1), layer(x, mask=mask))


@pytest.mark.parametrize("mask", [torch.zeros(5, 6, dtype=torch.bool), torch.arange(30).view(5, 6) == 7])
def test_where_nothing_or_one_value_counts_the_held_statistics_normalise_and_stay(mask: Tensor) -> None:
    layer, x = lived("batch"), images(5, 4, 6)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    wanted = copy.deepcopy(layer).eval()(x)
    torch.testing.assert_close(layer(x, mask=mask), wanted)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


def test_in_evaluation_a_mask_has_no_effect() -> None:
    layer, x = lived("batch").eval(), images(5, 4, 6)
    assert torch.equal(layer(x, mask=torch.zeros(5, 6)), layer(x))


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("shape", [(5, 7), (4, 6), (5, 4, 6), ()])
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...], mode: bool) -> None:
    layer, x = lived("batch").train(mode), images(5, 4, 6)
    match = r"was given a mask of shape \(.*\) for an input of shape \(5, 4, 6\); it needs \(5, 6\)"
    with pytest.raises(UsageError, match=match):
        layer(x, mask=torch.ones(shape))


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(UsageError, match="was given a weight below 0; a weight says how much a position counts"):
        lived("batch")(images(5, 4, 6), weight=-torch.ones(5, 6))
