"""repair_: the layers of a rounded, pruned or merged network get their sources' moments back, and everything can be undone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as pruning
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import renorm
from renorm.errors import BatchError, OpenChange, UsageError
from renorm.moments import Moments
from renorm.repair import Repaired, repair_
from renorm.sites import find_sites
from tests.contracts.photograph import differences, photograph, process
from tests.reference import repairing as twin
from tests.zoo import lived


class Net(nn.Module):
    """A stem with batch norm, a branch without, tokens through a linear layer, a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, 6, 3, bias=False)
            self.norm = nn.BatchNorm2d(6)
            self.bare = nn.Conv2d(6, 6, 3, groups=2)
            self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
            self.tokens = nn.Linear(4, 5)
            self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.up(F.relu(self.bare(x))))
        return self.head(F.relu(self.tokens(x.flatten(2).transpose(1, 2))).mean(1))


def net(seed: int = 0) -> Net:
    made = lived(Net(seed))
    assert isinstance(made, Net)
    return made.eval()


def images(seed: int = 0, count: int = 24) -> list[Tensor]:
    made = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) + 0.3
    return list(made.split(8))


def rounded(model: nn.Module, step: float = 0.15) -> nn.Module:
    """Every weight on a coarse grid."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                module.weight.copy_((module.weight / step).round() * step)
    return made


def outputs(model: nn.Module, name: str, batches: list[Tensor], axis: int = 1) -> Moments:
    """The moments of what the layer called `name` gives."""
    given: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, y: given.append(y.detach()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return Moments.of(torch.cat(given), axis=axis)


def close(ours: Moments, theirs: Moments, rtol: float = 2e-3) -> None:
    for mine, other in ((ours.mean, theirs.mean), (ours.sd, theirs.sd)):
        torch.testing.assert_close(mine, other, rtol=rtol, atol=rtol * float(theirs.sd.mean()))


LAYERS = {"norm": 1, "bare": 1, "up": 1, "tokens": -1, "head": -1}


def test_every_layer_of_a_rounded_network_gives_its_sources_moments() -> None:
    source = net()
    model = rounded(source)
    (batch,) = [torch.cat(images())]  # in one batch there is nothing left to average over
    made = repair_(model, source, [batch])
    assert made.recalibrated == ("norm",)
    assert set(made.rescaled) == {"bare", "up", "tokens", "head"}
    assert made.samples == 24
    assert not made.kept
    for name, axis in LAYERS.items():
        close(outputs(model, name, [batch], axis), outputs(source, name, [batch], axis))
    assert made.shifts["head"].moved > 0


def test_several_batches_come_close_to_it_too() -> None:
    source = net()
    model = rounded(source)
    repair_(model, source, images())
    for name, axis in LAYERS.items():
        close(outputs(model, name, images(), axis), outputs(source, name, images(), axis), rtol=0.05)


def test_images_of_one_kind_do_not_move_the_source_towards_them() -> None:
    """Re-estimation takes over what is special about the images; repair only what differs between two networks."""
    source, odd = net(), [batch * 0.2 + 2 for batch in images()]
    model = copy.deepcopy(source)
    made = repair_(model, source, odd)
    for key, value in source.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    assert made.recalibrated == ("norm",)
    renorm.recalibrate_(model, odd, prior=0)
    assert float((model.norm.running_mean - source.norm.running_mean).abs().max()) > 0.1


def test_matching_the_mean_alone_moves_no_weight_of_a_layer() -> None:
    source = net()
    model = rounded(source)
    held = {name: p.clone() for name, p in model.named_parameters() if name.endswith("weight")}
    (batch,) = [torch.cat(images())]
    made = repair_(model, source, [batch], match="mean")
    for name, p in model.named_parameters():
        if name.endswith("weight"):
            assert torch.equal(p, held[name]), name
    assert all(bool((affine.scale == 1).all()) for affine in made.rescaled.values())
    for name in ("bare", "head"):
        ours, theirs = (outputs(each, name, [batch], LAYERS[name]) for each in (model, source))
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-3, atol=1e-3)


def _merged(*models: nn.Module) -> nn.Module:
    average = AveragedModel(models[0], use_buffers=False)
    for model in models:
        average.update_parameters(model)
    made = average.module
    assert isinstance(made, nn.Module)
    return made.eval()


def test_a_merged_network_gets_the_interpolated_means_and_standard_deviations() -> None:
    first, second = net(1), net(2)
    model = _merged(first, second)
    (batch,) = [torch.cat(images())]
    made = repair_(model, [first, second], [batch], weights=[0.25, 0.75])
    for name in made.rescaled:
        ours, *theirs = (outputs(each, name, [batch], LAYERS[name]) for each in (model, first, second))
        sd = 0.25 * theirs[0].sd + 0.75 * theirs[1].sd
        close(ours, Moments(1.0, 0.25 * theirs[0].mean + 0.75 * theirs[1].mean, sd.square()))


def test_networks_that_lost_their_batch_norm_are_merged_from_sources_that_have_it() -> None:
    """The issue's second case of merging: sources are folded, in copies, where the model has no batch norm."""
    first, second = net(1), net(2)
    (batch,) = [torch.cat(images())]
    bare = [renorm.fold(each, batch).model for each in (first, second)]
    model = _merged(*bare)
    before = [photograph(each) for each in (first, second)]
    made = repair_(model, [first, second], [batch])
    assert made.recalibrated == ()
    assert set(made.rescaled) == {"stem", "bare", "up", "tokens", "head"}
    for each, kept in zip((first, second), before, strict=True):
        assert not differences(kept, photograph(each))
    ours, *theirs = (outputs(each, "stem", [batch]) for each in (model, *bare))
    close(ours, Moments(1.0, (theirs[0].mean + theirs[1].mean) / 2, ((theirs[0].sd + theirs[1].sd) / 2).square()))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["moments", "mean"]))
def test_the_numbers_are_those_of_a_slow_twin(seed: int, match: Any) -> None:
    rng = torch.Generator().manual_seed(seed)
    source, model = (nn.Sequential(nn.Linear(3, 4)).double().eval() for _ in range(2))
    x = torch.randn(9, 3, generator=rng, dtype=torch.float64)
    weight, bias = (p.detach().numpy() for p in (model[0].weight, model[0].bias))
    expected = twin.layer(weight, bias, x.numpy(), source(x).detach().numpy(), scales=match == "moments")
    repair_(model, source, [x], match=match)
    for ours, theirs in zip((model[0].weight, model[0].bias), expected, strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-9, atol=1e-12)


def test_statistics_are_those_of_a_slow_twin() -> None:
    source, model = (lived(nn.Sequential(nn.BatchNorm1d(3))).double().eval() for _ in range(2))
    x = torch.randn(20, 3, dtype=torch.float64) * 2 + 1
    held = find_sites(source)[0].statistics()
    assert held is not None
    pair = nn.Sequential(nn.Linear(3, 3), model[0]).double().eval(), nn.Sequential(nn.Linear(3, 3), source[0]).double()
    given = [made[0](x).detach().numpy() for made in pair]
    mean, var = twin.norm(given[0], given[1], held.mean.numpy(), held.var.numpy())
    repair_(pair[0], pair[1].eval(), [x])
    np.testing.assert_allclose(pair[0][1].running_mean.numpy(), mean, rtol=1e-9)
    np.testing.assert_allclose(pair[0][1].running_var.numpy(), var, rtol=1e-9)


# ── what arrives compressed ──


def _pruned(model: nn.Module) -> nn.Module:
    made = copy.deepcopy(model)
    chosen = [(m, "weight") for m in made.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    pruning.global_unstructured(chosen, pruning.L1Unstructured, amount=0.5)
    return made


def _averaged(model: nn.Module) -> nn.Module:
    average = AveragedModel(model, use_buffers=False)
    for seed in (0, 1):
        average.update_parameters(net(seed))
    return average


def _packed(model: nn.Module) -> nn.Module:
    """As torchao leaves a model: the weights of linear layers are int8 tensors of a class of its own."""
    quantization = pytest.importorskip("torchao.quantization")
    made = copy.deepcopy(model)
    quantization.quantize_(made, quantization.Int8WeightOnlyConfig())
    return made


COMPRESSED = {"pruned": _pruned, "averaged": _averaged, "torchao": _packed, "rounded": rounded}


@pytest.mark.parametrize("how", COMPRESSED)
@pytest.mark.parametrize("call", ["recalibrate", "repair"])
def test_one_call_mends_it_and_the_undo_is_exact(how: str, call: str) -> None:
    source = net()
    model = COMPRESSED[how](source).eval()
    before, around = photograph(model), process()
    expected = [model(batch).detach().clone() for batch in images()]
    if call == "repair":
        made: Any = repair_(model, source, images())
        assert made.recalibrated == ("norm",)
    else:
        made = renorm.recalibrate_(model, images(), prior=0)
    assert not torch.equal(model(images()[0]), expected[0])
    made.restore_()
    made.restore_()
    for batch, output in zip(images(), expected, strict=True):
        assert torch.equal(model(batch), output)
    assert not differences(before, photograph(model))
    assert around == process()


def test_a_quantised_weight_stays_and_its_bias_moves() -> None:
    model = _packed(net())
    packed = model.head.weight
    made = repair_(model, net(), images())
    assert model.head.weight is packed
    assert bool((made.rescaled["head"].scale == 1).all())
    assert bool((made.rescaled["bare"].scale != 1).any())


def test_a_mask_of_pruning_stays() -> None:
    source = net()
    model = _pruned(source)
    repair_(model, source, images())
    model(images()[0])
    assert float((model.bare.weight == 0).float().mean()) == float((model.bare.weight_mask == 0).float().mean()) > 0.2


def test_a_layer_without_a_bias_gets_one() -> None:
    source = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False)).eval()
    model = rounded(source, step=0.3)
    made = repair_(model, source, images())
    assert model[0].bias is not None
    made.restore_()
    assert model[0].bias is None


# ── what is left, and refused ──


def test_what_is_left_says_why() -> None:
    source = net()
    model = rounded(source)
    model.extra = nn.Conv2d(3, 3, 1)
    model.tokens, model.head = nn.Linear(4, 7), nn.Linear(7, 4)
    made = repair_(model, source, images())
    assert made.kept == {
        "extra": "a source has no such layer, or one of another width",
        "tokens": "a source has no such layer, or one of another width",
    }


def test_shared_and_unreached_layers_are_left() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused, self.last = (nn.Linear(3, 3) for _ in range(4))
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Any:
            return self.last(self.b(self.a(x)))

    source = Tied().eval()
    made = repair_(rounded(source), source, [torch.randn(8, 3)])
    assert made.kept == {
        "a": "its weight or bias is shared with another layer",
        "b": "its weight or bias is shared with another layer",
        "unused": "no batch reached it",
    }
    assert set(made.rescaled) == {"last"}


def test_a_layer_that_has_no_place_for_a_bias_is_left() -> None:
    source = net()
    del source.bare._parameters["bias"]
    source.bare.__dict__["bias"] = torch.zeros(6)
    assert repair_(rounded(source), source, images()).kept == {"bare": "bare has no place for a bias"}


def test_channels_that_died_are_not_divided_by() -> None:
    source = net()
    model = copy.deepcopy(source)
    with torch.no_grad():
        model.bare.weight[2] = 0
        model.stem.weight[1] = 0
    made = repair_(model, source, images())
    assert made.rescaled["bare"].scale[2] == 1
    assert all(bool(p.isfinite().all()) for p in model.state_dict().values())


def test_include_and_exclude_choose_layers() -> None:
    source = net()
    made = repair_(rounded(source), source, images(), include=["bare", "head"], exclude="head")
    assert set(made.rescaled) == {"bare"}
    assert made.recalibrated == ()


class Undone:
    """Fails in the second batch."""

    def __iter__(self) -> Any:
        yield images()[0]
        raise KeyboardInterrupt


def test_a_failure_leaves_both_as_they_were() -> None:
    source = net()
    model = rounded(source)
    before, known = photograph(model), photograph(source)
    with pytest.raises(KeyboardInterrupt):
        repair_(model, source, Undone())
    assert not differences(before, photograph(model))
    assert not differences(known, photograph(source))
    with torch.no_grad():
        model.up.weight.fill_(3e38)
    before = photograph(model)
    with pytest.raises(BatchError, match="the moments measured at 'up' are not finite"):
        repair_(model, source, images())
    assert not differences(before, photograph(model))


def test_undoing_out_of_order_is_refused() -> None:
    source = net()
    model = rounded(source)
    first = repair_(model, source, images())
    second = renorm.recalibrate_(model, images())
    with pytest.raises(OpenChange, match="recalibrate_ came after it"):
        first.restore_()
    second.restore_()
    first.restore_()


def _other() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192)).eval()


REFUSED: dict[str, tuple[Callable[[nn.Module], Repaired], str]] = {
    "no source": (lambda m: repair_(m, [], images()), "repair_ was given no source"),
    "itself": (lambda m: repair_(m, m, images()), "the model itself among its sources"),
    "shares": (lambda m: repair_(m, [net()], images(), weights=[0.5, 0.5]), r"got \[0.5, 0.5\] for 1 sources"),
    "sum": (lambda m: repair_(m, [net(), net()], images(), weights=[0.9, 0.9]), "none below 0 and 1 in all"),
    "match": (lambda m: repair_(m, net(), images(), match="median"), "match is 'moments' or 'mean'; got 'median'"),  # type: ignore[arg-type]
    "norms": (lambda m: repair_(m, _other(), images()), "only (a source|the model) has a batch norm at"),
    "model's norms": (
        lambda m: repair_(m, renorm.fold(m, images()[0]).model, images()),
        "only the model has a batch norm at 'norm'",
    ),
    "nothing": (lambda m: repair_(m, net(), images(), include="nowhere"), "found no layer that it shares"),
    "no batch": (lambda m: repair_(m, net(), []), "repair_ was given batches, but there was none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(case: str) -> None:
    model = rounded(net())
    before = photograph(model)
    call, message = REFUSED[case]
    with pytest.raises((UsageError, BatchError), match=message):
        call(model)
    assert not differences(before, photograph(model))
