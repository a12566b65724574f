"""Each layer's numbers against its slow float64 twin, and its options' bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from renorm.errors import BatchError, UsageError
from renorm.layers.base import catalogue
from renorm.moments import Observed
from renorm.recalibrate import recalibrate_
from tests.layers.catalogue import images, lived
from tests.reference import layers as twin

SHAPES = [(6, 4, 3, 5), (7, 4), (5, 4, 6)]
F64 = torch.float64
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def made(name: str, shape: tuple[int, ...], **options: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The layer, a batch, and what the twin needs: the same as NumPy arrays."""
    layer, x = lived(name, dtype=F64, **options), images(*shape, dtype=F64, seed=2)
    held = {
        key: getattr(layer, key).detach().numpy().copy() for key in ("running_mean", "running_var", "weight", "bias")
    }
    return layer, x, {"mean": held["running_mean"], "var": held["running_var"], **_affine(held)}


def _affine(held: dict[str, Any]) -> dict[str, Any]:
    return {key: held[key] for key in ("weight", "bias")}


def close(got: torch.Tensor, wanted: Any) -> None:
    np.testing.assert_allclose(got.detach().numpy(), wanted, rtol=1e-9, atol=1e-9)


@every_shape
def test_batch_norm(shape: tuple[int, ...]) -> None:
    layer, x, held = made("batch", shape, momentum=0.2)
    close(layer(x), twin.batch(x.numpy(), held["weight"], held["bias"]))
    columns = twin.columns(x.numpy())
    close(layer.running_mean, [twin.moved(m, v.mean(), 0.2) for m, v in zip(held["mean"], columns, strict=True)])
    close(layer.running_var, [twin.moved(s, v.var(ddof=1), 0.2) for s, v in zip(held["var"], columns, strict=True)])
    held = {**held, "mean": layer.running_mean.numpy(), "var": layer.running_var.numpy()}
    close(layer.eval()(x), twin.by_moments(x.numpy(), **held))


@every_shape
def test_frozen(shape: tuple[int, ...]) -> None:
    layer, x, held = made("frozen", shape)
    for mode in (True, False):
        close(layer.train(mode)(x), twin.by_moments(x.numpy(), **held))
    assert int(layer.num_batches_tracked) == 7
    assert not any(p.requires_grad for p in layer.parameters())
    assert all(p.requires_grad for p in catalogue()["frozen"](4, train_affine=True).parameters())


@every_shape
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(
    ("options", "share"), [({}, 0.5), ({"source_weight": 0.8}, 0.8), ({"prior": 14}, None), ({"source_weight": 0}, 0.0)]
)
def test_blended(shape: tuple[int, ...], mode: bool, options: dict[str, Any], share: float | None) -> None:
    layer, x, held = made("blended", shape, **options)
    share = 14 / (14 + shape[0]) if share is None else share
    close(layer.train(mode)(x), twin.blended(x.numpy(), share=share, **held))


@every_shape
@pytest.mark.parametrize("mode", [True, False])
def test_shrink(shape: tuple[int, ...], mode: bool) -> None:
    layer, x, held = made("shrink", shape)
    share = twin.shrink_share(x.numpy(), held["var"])
    close(layer.train(mode)(x), twin.shrink(x.numpy(), share=share, **held))


@every_shape
def test_shrink_holds_what_recalibrating_with_prior_auto_would(shape: tuple[int, ...]) -> None:
    layer, x, _ = made("shrink", shape)
    model = nn.Sequential(nn.BatchNorm2d(4) if x.dim() == 4 else nn.BatchNorm1d(4)).double().eval()
    model[0].load_state_dict({k: v for k, v in layer.state_dict().items()})
    adaptation = recalibrate_(model, [x])
    share = layer.source_share(x, layer.running_mean, layer.running_var)
    assert float(share) == pytest.approx(adaptation.weights["0"], rel=1e-9)
    biased = Observed.of(x).values
    count = biased.count / (biased.count - 1)
    model[0].running_var.div_(torch.as_tensor(count))  # what is stored is unbiased, what normalises a batch is not
    torch.testing.assert_close(layer.eval()(x), model(x), rtol=1e-5, atol=1e-5)


def test_in_bfloat16_shrink_finds_nearly_the_same_share() -> None:
    layer, x = lived("shrink"), images(16, 4, 9, 9, at=3.0)
    share, rough = (float(layer.source_share(v, layer.running_mean, layer.running_var)) for v in (x, x.bfloat16()))
    assert rough == pytest.approx(share, rel=0.02)


def test_shrink_trusts_more_images_more_and_one_not_at_all() -> None:
    layer = lived("shrink").eval()
    x = images(256, 4, 3, 3)
    shares = [float(layer.source_share(x[:n], layer.running_mean, layer.running_var)) for n in (1, 2, 8, 64, 256)]
    assert shares[0] == 1.0
    assert shares == sorted(shares, reverse=True)
    assert 0.1 < shares[-1] < 0.2
    norm = nn.BatchNorm2d(4).eval()
    norm.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x[:1]), norm(x[:1]))


@every_shape
@pytest.mark.parametrize(
    ("batches", "r_max", "d_max"), [(0, 1.0, 0.0), (4_999, 1.0, 0.0), (24_999, 2.1428, 4.99975), (99_999, 3.0, 5.0)]
)
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_batch_renorm(shape: tuple[int, ...], batches: int, r_max: float, d_max: float, scale: float) -> None:
    layer, x, held = made("batch_renorm", shape)
    layer.num_batches_tracked.fill_(batches)
    got = layer(x * scale)
    if batches == 24_999:
        r_max, d_max = 1 + 2 * 20_000 / 35_001, 5 * 20_000 / 20_001
    close(got, twin.batch_renorm((x * scale).numpy(), r_max=r_max, d_max=d_max, **held))


def test_an_open_batch_renorm_trains_as_it_evaluates() -> None:
    layer, x, _ = made("batch_renorm", (6, 4, 3, 5), r_max=100, d_max=100)
    layer.num_batches_tracked.fill_(90_000)
    before = layer.eval()(x)
    torch.testing.assert_close(layer.train()(x), before)


@every_shape
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_stochastic(shape: tuple[int, ...], p: float) -> None:
    layer, x, held = made("stochastic", shape, p=p)
    torch.manual_seed(4)
    chosen = torch.rand(4) < p
    torch.manual_seed(4)
    close(layer(x), twin.stochastic(x.numpy(), chosen=chosen.numpy(), **held))


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        (
            "blended",
            {"source_weight": 1.2},
            r"source_weight is the share of what the layer holds, in \[0, 1\]; got 1\.2",
        ),
        ("blended", {"prior": -1}, r"prior is the number of images that what the layer holds counts as; got -1"),
        ("blended", {"prior": 1, "source_weight": 0.5}, r"takes a source_weight or a prior"),
        ("shrink", {"floor": 1.1}, r"floor is the least share of what the layer holds, in \[0, 1\]; got 1\.1"),
        ("shrink", {"noise": -1}, r"noise is what a squared standard error counts, 0 or more; got -1"),
        ("stochastic", {"p": 2}, r"p is the probability that a channel is normalised by the batch, in \[0, 1\]; got 2"),
        ("batch_renorm", {"r_max": 0.5}, r"r is clipped to \[1/r_max, r_max\] and d to ±d_max; got r_max=0\.5"),
        (
            "batch_renorm",
            {"start": 10, "r_end": 5},
            r"the bounds open from `start` on, until r_end and d_end; got 10, 5",
        ),
    ],
)
def test_an_option_out_of_its_bounds_is_refused(name: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        catalogue()[name](4, **options)


@every_shape
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("k", [0.0, 0.5, 4.0])
def test_instance_aware(shape: tuple[int, ...], mode: bool, k: float) -> None:
    layer, x, held = made("instance_aware", shape, k=k)
    if mode:
        columns = twin.columns(x.numpy())
        held["mean"], held["var"] = np.array([v.mean() for v in columns]), np.array([v.var() for v in columns])
    got = layer.train(mode)(x)
    if len(shape) == 2:
        close(got, twin.by_moments(x.numpy(), **held))
    else:
        close(got, twin.instance_aware(x.numpy(), k=k, **held))


def test_instance_aware_leaves_a_common_image_alone_and_corrects_an_odd_one() -> None:
    layer = catalogue()["instance_aware"](4).eval()
    common, odd = torch.randn(1, 4, 16, 16), torch.randn(1, 4, 16, 16) * 3 + 5
    torch.testing.assert_close(layer(common), catalogue()["frozen"](4)(common), rtol=1e-4, atol=1e-4)
    assert float(layer(odd).detach().mean().abs()) < 0.5


@every_shape
@pytest.mark.parametrize("size", [1, 2, 3, 64])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_ghost_batch_is_what_small_batches_in_turn_are(
    shape: tuple[int, ...], size: int, momentum: float | None
) -> None:
    if size == 1 and len(shape) == 2:
        pytest.skip("one value per channel")
    layer, x, _ = made("ghost", shape, size=size, momentum=momentum)
    norm = lived("batch", dtype=F64, momentum=momentum)
    parts = list(x.split(size))
    if len(parts) > 1 and len(parts[-1]) < size:  # the rest joins the last whole one
        parts[-2:] = [torch.cat(parts[-2:])]
    torch.testing.assert_close(layer(x), torch.cat([norm(part) for part in parts]))
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(layer, key), getattr(norm, key))


def test_transferable_scales_by_its_twins_factor_and_evaluates_for_the_target() -> None:
    layer, x, held = made("transferable", (8, 4, 5))
    source, target = x[:4].numpy(), x[4:].numpy()
    factor = twin.transferable_factor(source, target)
    assert factor.mean() == pytest.approx(1)
    assert factor.max() > factor.min()
    weight, bias = held["weight"] * factor, held["bias"]
    close(layer(x), np.concatenate([twin.batch(source, weight, bias), twin.batch(target, weight, bias)]))
    ids = ["source", "target"] * 4
    mixed = layer(torch.stack([x[i // 2 + 4 * (i % 2)] for i in range(8)]), ids)
    torch.testing.assert_close(mixed[0::2], layer(x)[:4])
    norm = nn.BatchNorm1d(4, dtype=F64).eval()
    plain = layer.plain()
    norm.load_state_dict(
        dict(zip(("running_mean", "running_var", "num_batches_tracked", "weight", "bias"), plain, strict=True))
    )
    torch.testing.assert_close(layer.eval()(x), norm(x))
    assert not torch.equal(plain.weight, layer.weight)


def test_transferable_keeps_a_network_whose_domains_are_equal() -> None:
    layer = catalogue()["transferable"](4)
    x = images(4, 4, 3, 3)
    torch.testing.assert_close(layer(torch.cat([x, x]))[:4], nn.BatchNorm2d(4)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_the_parts_of_a_split_batch_are_apart_and_evaluation_is_the_main_one(splits: int) -> None:
    layer, x, held = made("split", (7, 4, 5), splits=splits)
    groups = [i * splits // 7 for i in range(7)]
    weight, bias = (torch.cat([getattr(layer, n)[None], getattr(layer.extra, n)]) for n in ("weight", "bias"))
    close(layer(x), twin.per_domain(x.numpy(), groups, weight.detach().numpy(), bias.detach().numpy()))
    torch.testing.assert_close(layer(x, groups), layer(x))
    held = {**held, "mean": layer.running_mean.numpy(), "var": layer.running_var.numpy()}
    close(layer.eval()(x), twin.by_moments(x.numpy(), **held))


@pytest.mark.parametrize(("name", "groups"), [("group", 4), ("layer", 1), ("instance", 4)])
def test_group_norms(name: str, groups: int) -> None:
    layer = lived(name, dtype=F64)
    x = images(3, 4, 2, 5, dtype=F64)
    weight, bias = (p.detach().numpy() for p in (layer.weight, layer.bias))
    for mode in (True, False):
        close(layer.train(mode)(x), twin.group(x.numpy(), groups, weight, bias))


@pytest.mark.parametrize("name", ["group", "layer", "instance"])
@pytest.mark.parametrize("options", [{}, {"groups": 2}])
def test_an_image_of_the_sources_statistics_comes_out_of_a_group_norm_as_before(
    name: str, options: dict[str, int]
) -> None:
    if options and name != "group":
        pytest.skip("has no such option")
    norm = lived("batch", dtype=F64).eval()
    x = torch.randn(1, 4, 9, 9, dtype=F64)
    x = (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True, correction=0)
    x = x * norm.running_var.sqrt().view(1, -1, 1, 1) + norm.running_mean.view(1, -1, 1, 1)
    loaded, taken = (catalogue()[name](4, dtype=F64, **options) for _ in range(2))
    loaded.load_state_dict(norm.state_dict())
    taken.take_(norm.plain())
    for layer in (loaded, taken):
        torch.testing.assert_close(layer(x), norm(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "error", "match"),
    [
        ("ghost", {"size": 0}, UsageError, "size is the number of images in a ghost batch, 1 or more; got 0"),
        ("split", {"splits": 0}, UsageError, "splits is the number of parts of a batch, 1 or more; got 0"),
        ("instance_aware", {"k": -1}, UsageError, "k is a number of standard errors, 0 or more; got -1"),
        ("group", {"groups": 3}, UsageError, "groups must divide the channels, 4; got 3"),
    ],
)
def test_more_options_out_of_their_bounds(
    name: str, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        catalogue()[name](4, **options)


@pytest.mark.parametrize("name", ["group", "layer", "instance"])
def test_a_group_norm_refuses_another_width(name: str) -> None:
    with pytest.raises(BatchError, match="has 4 channels along dimension 1 of its input, and was given the shape"):
        catalogue()[name](4)(torch.zeros(2, 5, 3, 3))
