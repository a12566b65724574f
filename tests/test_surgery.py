"""convert_: what is kept, what is refused, and how undo nests; the zoo is in contracts/test_convert.py."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import renorm
from renorm import layers
from renorm.errors import NoBatchNorm, OpenChange, UnknownName, UsageError
from renorm.recalibrate import recalibrate_
from renorm.surgery import convert_
from tests import animals, zoo
from tests.animals import convs
from tests.contracts.photograph import differences, photograph
from tests.layers.catalogue import images


def net(*norms: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return zoo.lived(convs(*(norms or (nn.BatchNorm2d(4), nn.BatchNorm2d(4)))))


class HiddenReLU(nn.BatchNorm2d):
    """A batch norm that ends in an activation that is no part of it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Whimsical(nn.BatchNorm2d):
    """A batch norm that runs on one shape alone."""

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("only ever 17 by 17")


class WithPart(nn.BatchNorm2d):
    """A batch norm that holds something besides."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gate = nn.Linear(2, 2)


def frozen_by_hand() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.train = functools.partial(nn.Module.train, norm)  # type: ignore[method-assign]
    return norm


@pytest.mark.parametrize(
    ("model", "to", "options", "error", "match"),
    [
        (net, "stochastc", {}, UnknownName, "there is no layer 'stochastc'; did you mean 'stochastic'"),
        (net, "stochastic", {"q": 0.5}, UnknownName, "there is no option of the layer 'stochastic' 'q'"),
        (net, "frozen", {"p": 0.5}, UnknownName, "there is no option of the layer 'frozen' 'p'"),
        (net, "stochastic", {"momentum": 0.5}, UnknownName, "option of the layer 'stochastic' 'momentum'"),
        (net, "stochastic", {"p": 1.5}, UsageError, "p is the probability that a channel is normalised by the batch"),
        (net, "blended", {"include": "2*"}, UsageError, r"the places '2\*' without \(\), and no batch norm is among them"),
        (lambda: net(nn.BatchNorm2d(4), HiddenReLU(4)), "blended", {}, UsageError,
         "the layer at '4', HiddenReLU, would not be the same after the conversion: .* an activation that is not its part"),
        (lambda: net(HiddenReLU(4)), "batch", {}, UsageError, "the layer at '1', HiddenReLU, would not be the same"),
        (lambda: net(Whimsical(4)), "shrink", {}, UsageError, "Whimsical, could not be run by itself"),
        (lambda: net(WithPart(4)), "shrink", {}, UsageError, r"WithPart, holds parts that a conversion would drop \(gate\)"),
        (lambda: net(frozen_by_hand()), "shrink", {}, UsageError, r"the layer at '1' is frozen \(its train\(\) is its own\)"),
        (lambda: net(nn.GroupNorm(2, 4)), "shrink", {}, NoBatchNorm, "convert_ needs batch norm layers"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_and_the_model_untouched(
    model: Any, to: str, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    built = model()
    before = photograph(built)
    with pytest.raises(error, match=match):
        convert_(built, to, **options)
    assert differences(before, photograph(built)) == []


def test_a_refused_conversion_stands_in_nobodys_way() -> None:
    model = net()
    adaptation = recalibrate_(model, [torch.randn(8, 3, 6, 6)])
    with pytest.raises(UsageError, match="p is the probability"):
        convert_(model, "stochastic", p=7)
    adaptation.restore_()


def test_an_option_set_is_an_option_read_and_momentum_and_eps_are_kept() -> None:
    model = net(nn.BatchNorm2d(4, eps=1e-3, momentum=0.01), nn.BatchNorm2d(4, momentum=None))
    undo = renorm.convert_(model, to="stochastic", p=0.25)
    assert [(m.p, m.eps, m.momentum, m.site) for m in (model[1], model[4])] == [
        (0.25, 1e-3, 0.01, "1"),
        (0.25, 1e-5, None, "4"),
    ]
    undo.restore_()
    assert type(model[1]) is nn.BatchNorm2d


def test_only_the_places_asked_for_are_converted() -> None:
    model = net()
    conversion = convert_(model, "shrink", exclude="4")
    assert conversion.converted == ("1",)
    assert type(model[4]) is nn.BatchNorm2d


def test_parameters_stay_the_objects_that_an_optimiser_holds_and_train() -> None:
    model = net().train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    convert_(model, "shrink")
    before = model[1].weight.detach().clone()
    model(torch.randn(8, 3, 6, 6)).square().sum().backward()
    optimiser.step()
    assert not torch.equal(model[1].weight, before)
    assert {id(p) for p in model.parameters()} == {id(p) for group in optimiser.param_groups for p in group["params"]}


def test_what_training_changed_goes_back_with_to_batch_and_away_with_restore() -> None:
    model = net().train()
    before = photograph(model)
    there = convert_(model, "stochastic")
    for _ in range(3):
        model(torch.randn(8, 3, 6, 6))
    held = model[1].running_mean.clone()
    back = convert_(model, "batch")
    assert type(model[1]) is nn.BatchNorm2d
    assert torch.equal(model[1].running_mean, held)
    with pytest.raises(OpenChange, match="undoing convert_ was asked for, but convert_ came after it at '1'"):
        there.restore_()
    back.restore_()
    there.restore_()
    assert differences(before, photograph(model)) == []


def test_a_change_on_the_new_layers_is_undone_first() -> None:
    model = net()
    before = photograph(model)
    conversion = convert_(model, "blended")
    adaptation = recalibrate_(model, [torch.randn(8, 3, 6, 6)])
    with pytest.raises(OpenChange, match="but recalibrate_ came after it"):
        conversion.restore_()
    adaptation.restore_()
    conversion.restore_()
    assert differences(before, photograph(model)) == []


def test_an_earlier_change_waits_for_the_conversion() -> None:
    model = net()
    adaptation = recalibrate_(model, [torch.randn(8, 3, 6, 6)])
    conversion = convert_(model, "blended")
    with pytest.raises(OpenChange, match="undoing recalibrate_ was asked for, but convert_ came after it"):
        adaptation.restore_()
    conversion.restore_()
    adaptation.restore_()


def test_shared_modules_stay_shared() -> None:
    model = zoo.lived(animals.SharedNorm())
    undo = convert_(model, "shrink")
    assert isinstance(model.first, layers.Shrink)
    assert model.first is model.second
    undo.restore_()
    assert type(model.first) is nn.BatchNorm2d
    assert model.first is model.second


def test_modes_devices_and_precision_are_kept() -> None:
    model = net().to(torch.bfloat16)
    model[1].train()
    convert_(model, "per_domain", domains=2)
    assert [m.training for m in (model[1], model[1].extra, model[4])] == [True, True, False]
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.bfloat16}


def test_hooks_stay_and_their_handles_work() -> None:
    model, calls = net(), []
    handle = model[1].register_forward_hook(lambda *_: calls.append(1))
    convert_(model, "frozen")
    model(torch.randn(2, 3, 6, 6))
    handle.remove()
    model(torch.randn(2, 3, 6, 6))
    assert calls == [1]


def test_activations_of_timm_are_kept_in_place_or_not() -> None:
    timm = pytest.importorskip("timm.layers")
    for inplace in (True, False):
        model = net(
            timm.BatchNormAct2d(4, inplace=inplace),
            timm.BatchNormAct2d(4, apply_act=False),
            timm.FrozenBatchNormAct2d(4),
        )
        x = torch.randn(4, 3, 6, 6)
        wanted = model(x)
        for name in ("batch", "stochastic", "per_domain", "shrink"):
            undo = convert_(model, name)
            assert isinstance(model[1].act, nn.ReLU)
            assert model[4].act is None
            if name != "shrink":
                torch.testing.assert_close(model(x), wanted)
            model.train()(x).sum().backward()
            undo.restore_()
            model.eval()
        torch.testing.assert_close(model(x), wanted)


def test_a_whole_timm_net_keeps_its_activations() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_efficientnet", num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    wanted = model(x)
    conversion = convert_(model, "stochastic")
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
    assert sum(layer.act is not None for layer in model.modules() if isinstance(layer, layers.Stochastic)) > 3
    conversion.restore_()
    assert torch.equal(model(x), wanted)


def test_one_domain_of_several_goes_back() -> None:
    model = net()
    convert_(model, "per_domain", domains=["day", "night"])
    for layer in (model[1], model[4]):
        layer.set_("night", {k: v + 1 for k, v in layer.domain("day").items()})
    x = images(4, 3, 6, 6)
    wanted = layers.WithDomains(copy.deepcopy(model))(x, domains=["night"] * 4)
    with pytest.raises(UsageError, match=r"holds 2 domains \(day, night\), and one batch norm was asked for"):
        convert_(model, "batch")
    convert_(model, "batch", domain="night")
    assert type(model[1]) is nn.BatchNorm2d
    torch.testing.assert_close(model(x), wanted)


def test_frozen_copies_come_alive_and_converted_models_copy_and_pickle() -> None:
    model = net(animals.FrozenInFour(4))
    convert_(model, "batch")
    assert isinstance(model[1].weight, nn.Parameter)
    model.train()(torch.randn(4, 3, 6, 6))
    assert int(model[1].num_batches_tracked) == 1
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other.eval()(torch.ones(2, 3, 6, 6)), model.eval()(torch.ones(2, 3, 6, 6)))


def test_a_compiled_model_runs_the_new_layers() -> None:
    torch._dynamo.reset()
    model = net()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(8, 3, 6, 6)
    before = compiled(x)
    undo = convert_(compiled, "blended", source_weight=0.0)
    assert not torch.allclose(compiled(x), before)
    torch.testing.assert_close(compiled(x), model(x))
    undo.restore_()
    torch.testing.assert_close(compiled(x), before)


def test_the_distance_from_the_old_layer_is_measured() -> None:
    model = net()
    assert max(convert_(model, "frozen").distance.values()) < 1e-6
    near, far = (convert_(net(), "blended", source_weight=w).distance["1"] for w in (0.9, 0.1))
    assert 0 < near < far
