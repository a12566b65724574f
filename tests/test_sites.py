"""sites: what is found where, what a site tells, and what it writes is what torch would have written."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from renorm.doctor import diagnose
from renorm.errors import NoBatchNorm, UsageError
from renorm.moments import Moments
from renorm.sites import Site, bare_convolutions, batch_sites, device_of, find_sites, is_lazy, select, unwrap, walk
from tests import animals, zoo


def site(module: nn.Module) -> Site:
    (found,) = find_sites(module)
    return found


def test_a_model_that_is_a_norm_is_one_site_without_a_name() -> None:
    assert site(nn.BatchNorm1d(3)).name == ""


def test_a_shared_norm_is_one_site_under_its_first_name() -> None:
    model = animals.SharedNorm()
    assert [s.name for s in find_sites(model)] == ["first"]
    assert site(model).module is model.second


@pytest.mark.parametrize(
    ("module", "kind", "axis"),
    [
        (nn.BatchNorm3d(4), "batch", 1),
        (nn.SyncBatchNorm(4), "batch", 1),
        (nn.InstanceNorm1d(4), "instance", 1),
        (nn.InstanceNorm2d(4, track_running_stats=True), "instance", 1),
        (nn.GroupNorm(2, 4), "group", 1),
        (nn.LayerNorm(4), "layer", -1),
        (nn.RMSNorm(4), "rms", -1),
        (animals.ToyRMSNorm(4), "rms", -1),
        (animals.FrozenInFour(4), "batch", 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_kind_width_and_axis(module: nn.Module, kind: str, axis: int) -> None:
    found = site(module)
    assert (found.kind, found.channels, found.axis) == (kind, 4, axis)


def test_layer_norm_over_several_dimensions_counts_them_all() -> None:
    assert site(nn.LayerNorm((2, 3))).channels == 6


def test_timm_norms_with_channels_first_say_so() -> None:
    layers = pytest.importorskip("timm.layers")
    found = [site(c(4)) for c in (layers.LayerNorm2d, layers.RmsNorm2d, layers.RmsNormAct2d)]
    assert [(s.kind, s.axis, s.channels) for s in found] == [("layer", 1, 4), ("rms", 1, 4), ("rms", 1, 4)]


def test_the_statistics_of_a_norm_that_splits_batches_are_all_found() -> None:
    layers = pytest.importorskip("timm.layers")
    assert [s.name for s in find_sites(layers.SplitBatchNorm2d(4, num_splits=2))] == ["", "aux_bn.0"]


@pytest.mark.parametrize(
    "module", [nn.Linear(3, 3), nn.Dropout(), nn.Identity(), animals.LookAlike(), nn.LocalResponseNorm(2)]
)
def test_what_is_no_norm_layer_is_no_site(module: nn.Module) -> None:
    assert find_sites(module) == []


def test_a_statistics_pair_that_does_not_fit_together_is_no_batch_norm() -> None:
    odd = nn.Module()
    odd.register_buffer("running_mean", torch.zeros(3))
    odd.register_buffer("running_var", torch.ones(3, 3))
    assert find_sites(odd) == []


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers_have_no_channels_until_they_have_seen_some() -> None:
    model = nn.LazyBatchNorm2d()
    assert (site(model).channels, is_lazy(site(model)), site(model).statistics()) == (0, True, None)
    model(torch.randn(2, 5, 3, 3))
    assert (site(model).channels, is_lazy(site(model))) == (5, False)


def test_a_keras_layer_that_was_not_built_is_a_site_without_statistics() -> None:
    keras = pytest.importorskip("keras")
    found = site(keras.layers.BatchNormalization())
    assert (found.kind, found.channels, found.statistics()) == ("batch", 0, None)


def test_eps_is_read_under_every_name_it_has() -> None:
    assert site(nn.BatchNorm1d(3, eps=1e-3)).eps == 1e-3
    assert site(animals.ToyRMSNorm(3, eps=1e-2)).eps == 1e-2


@pytest.mark.parametrize("unbiased_count", [2, 50])
def test_writing_moments_stores_what_torch_stores(unbiased_count: int) -> None:
    x = torch.randn(unbiased_count, 3)
    theirs, ours = nn.BatchNorm1d(3, momentum=1.0), nn.BatchNorm1d(3)
    theirs(x)
    kept = ours.running_mean
    site(ours).write_(Moments.of(x))
    assert ours.running_mean is kept
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_writing_what_was_held_changes_nothing() -> None:
    model = zoo.named("root").build()
    before = model.running_var.clone()
    held = site(model).statistics()
    assert held is not None
    assert held.count == math.inf
    site(model).write_(held)
    assert torch.equal(model.running_var, before)


def test_normalising_by_moments_gives_what_training_gives() -> None:
    x = torch.randn(8, 3, 4)
    model = nn.BatchNorm1d(3)
    wanted = model(x)
    model.eval()
    site(model).normalise_by_(Moments.of(x))
    torch.testing.assert_close(model(x), wanted)


def test_keras_keeps_the_biased_variance() -> None:
    pytest.importorskip("keras")
    x = torch.randn(4, 3, 1, 1)
    found = find_sites(zoo.named("keras-functional").build())[0]
    found.write_(Moments.of(x))
    held = found.statistics()
    assert held is not None
    torch.testing.assert_close(held.var.float(), x.var((0, 2, 3), correction=0))


def test_writing_where_nothing_is_held_is_refused() -> None:
    with pytest.raises(UsageError, match="written at '1', but the layer holds none"):
        find_sites(zoo.named("no-statistics").build())[0].write_(Moments.of(torch.randn(4, 4)))


def test_writing_another_number_of_channels_is_refused() -> None:
    with pytest.raises(UsageError, match="moments of 2 channels were to be written at '1', which has 4"):
        find_sites(zoo.named("bn2d").build())[0].write_(Moments.of(torch.randn(4, 2)))


def test_a_slot_is_written_alone() -> None:
    day, night, _ = find_sites(zoo.named("slots").build())
    assert (day.slot, night.slot) == ("day", "night")
    before = night.statistics()
    day.write_(Moments.of(torch.randn(9, 4)))
    after = night.statistics()
    assert before is not None
    assert after is not None
    assert torch.equal(before.mean, after.mean)


def test_batch_sites_are_those_that_hold_statistics() -> None:
    assert [s.name for s in batch_sites(zoo.named("other-kinds").build(), asked="x")] == ["10"]
    assert [s.name for s in batch_sites(zoo.named("no-statistics").build(), asked="x")] == ["4"]


def test_a_model_without_batch_norm_is_refused_with_what_it_has_instead() -> None:
    with pytest.raises(
        NoBatchNorm, match=r"recalibrate_ needs .*Sequential has none \(it has 3 norm layers of kind layer, rms"
    ):
        batch_sites(zoo.named("tokens").build(), asked="recalibrate_")
    with pytest.raises(NoBatchNorm, match="no norm layer at all"):
        batch_sites(zoo.named("no-norm").build(), asked="recalibrate_")


def test_a_model_that_looks_folded_is_told_so() -> None:
    def convs(*, bias: bool = True, norm: bool = False) -> nn.Module:
        between = nn.GroupNorm(1, 4) if norm else nn.Identity()
        return nn.Sequential(nn.Conv2d(3, 4, 3), between, nn.ReLU(), nn.Conv2d(4, 4, 3, bias=bias))

    with pytest.raises(NoBatchNorm, match="Its 2 convolutions all have a bias: if batch norms were folded into them"):
        batch_sites(convs(), asked="recalibrate_")
    assert bare_convolutions(convs()) == ["0", "3"]
    (finding,) = diagnose(convs()).findings
    assert (finding.rule, finding.severity, finding.value, finding.site) == ("BN505", "info", 2.0, "0")
    for other in (
        convs(bias=False),
        convs(norm=True),
        nn.Conv2d(3, 4, 3),
        nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)),
    ):
        assert bare_convolutions(other) == []


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_model_whose_batch_norm_has_not_seen_anything_is_refused_with_the_way_out() -> None:
    model = nn.Sequential(nn.LazyBatchNorm2d())
    with pytest.raises(NoBatchNorm, match="Run one batch through it first"):
        batch_sites(model, asked="recalibrate_")


@pytest.mark.parametrize(
    ("include", "exclude", "wanted"),
    [
        ("*", (), ["bn1", "layer1.bn1", "layer1.bn2"]),
        ("layer1.*", (), ["layer1.bn1", "layer1.bn2"]),
        ("*", "*bn1", ["layer1.bn2"]),
        (["bn1", "*bn2"], "layer*", ["bn1"]),
        ("BN1", (), []),
    ],
)
def test_selection_by_patterns(include: str | list[str], exclude: str | tuple[str, ...], wanted: list[str]) -> None:
    model = nn.ModuleDict(
        {"bn1": nn.BatchNorm1d(1), "layer1": nn.ModuleDict({n: nn.BatchNorm1d(1) for n in ("bn1", "bn2")})}
    )
    assert [s.name for s in select(find_sites(model), include=include, exclude=exclude)] == wanted


def test_a_net_of_ones_own_with_a_part_called_module_is_no_wrapper() -> None:
    model = animals.Scaling()
    assert unwrap(model) is model
    assert [s.name for s in find_sites(model)] == ["module.1"]


def test_wrappers_are_looked_through_in_any_order() -> None:
    inside = nn.Sequential(nn.BatchNorm1d(2))
    outside = torch.optim.swa_utils.AveragedModel(nn.DataParallel(torch.compile(inside, backend="eager")))
    assert type(unwrap(outside)) is nn.Sequential
    assert [s.name for s in find_sites(outside)] == ["0"]


def test_walking_visits_every_module_once_with_the_names_of_torch() -> None:
    model = zoo.named("timm-resnet").build()
    assert list(walk(model)) == list(model.named_modules())


def test_the_device_of_a_model_is_where_its_first_tensor_is() -> None:
    assert device_of(nn.ReLU()) == torch.device("cpu")
    assert device_of(nn.Linear(1, 1, device="meta")) == torch.device("meta")
    assert device_of(animals.FrozenInFour(2)) == torch.device("cpu")
