"""fold: what a neighbour can carry is folded, the rest stays with its reason, and the answer is never another."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from renorm.absorb import Absorber, Side
from renorm.errors import NoBatchNorm, UsageError
from renorm.fold import fold, scale_and_shift
from renorm.prove import distance
from renorm.sites import find_sites, unwrap
from tests import zoo
from tests.contracts.photograph import differences, photograph, process
from tests.layers import catalogue as layers
from tests.reference import folding as twin
from tests.zoo import lived


class Net(nn.Module):
    """Parts by name, and a forward that is given."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.how = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.how(self, x)


def same(model: nn.Module, folded: nn.Module, x: Tensor, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        assert distance([model(x)], [folded(x)]) <= tolerance


IMAGE, ROW, TOKENS = (3, 6, 6), (5,), (7, 5)


def seq(*parts: nn.Module) -> nn.Module:
    return nn.Sequential(*parts)


def _mixed() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.bn(torch.cat([self.a(x), self.b(x)], 1))

    return Net(forward, a=nn.Conv2d(3, 2, 1), b=nn.Conv2d(3, 3, 1, bias=False), bn=nn.BatchNorm2d(5))


def _in_lockstep() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.bn(self.conv(x * 2))

    return Net(forward, conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))


def _levit() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)

    return Net(forward, linear=nn.Linear(5, 4, bias=False), bn=nn.BatchNorm1d(4))


def _sum() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.bn(self.a(x) + self.b(x)).relu()

    return Net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))


def _queries() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.bn(x.relu())
        return self.q(x) * self.k(x) + self.v(x)

    parts = {name: nn.Linear(5, 4, bias=name != "k") for name in "qkv"}
    return Net(forward, bn=nn.BatchNorm1d(5), **parts)


def _conv1d_of_matrix() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.bn(torch.addmm(self.bias, x, self.weight))

    return Net(forward, weight=nn.Parameter(torch.randn(5, 4)), bias=nn.Parameter(torch.randn(4)), bn=nn.BatchNorm1d(4))


def _permuted() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.bn(self.linear(x).permute(0, 2, 1).contiguous())

    return Net(forward, linear=nn.Linear(5, 4), bn=nn.BatchNorm1d(4))


def _act() -> nn.Module:
    timm_layers = pytest.importorskip("timm.layers")
    return seq(nn.Conv2d(3, 4, 3, bias=False), timm_layers.BatchNormAct2d(4, act_layer=nn.SiLU), nn.Conv2d(4, 2, 1))


def _functional() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.bn(F.conv2d(x, self.kernel, self.offset, stride=2, padding=1))

    return Net(
        forward, kernel=nn.Parameter(torch.randn(4, 3, 3, 3)), offset=nn.Parameter(torch.randn(4)), bn=nn.BatchNorm2d(4)
    )


def _branches(*, in_place: bool = False, groups: int = 1, kernel: int = 3) -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = x.relu()
        out = 0
        out += self.norm_a(self.a(x))
        out = out + self.norm_b(self.b(x))
        if in_place:
            out += self.skip(x)
            return out
        return 0 + self.skip(x) + out

    return Net(
        forward,
        a=nn.Conv2d(4, 4, kernel, padding=kernel // 2, groups=groups, bias=False),
        norm_a=nn.BatchNorm2d(4),
        b=nn.Conv2d(4, 4, 1),
        norm_b=nn.BatchNorm2d(4),
        skip=nn.BatchNorm2d(4),
    )


def _averaged() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.fc(self.bn(x.relu()).mean((2, 3)))

    return Net(forward, bn=nn.BatchNorm2d(3), fc=nn.Linear(3, 2))


FOLDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: seq(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), nn.ReLU()), (3, 7)),
    "conv2d": (lambda: seq(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)), IMAGE),
    "conv3d": (lambda: seq(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4)), (2, 3, 4, 4)),
    "same padding": (lambda: seq(nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), nn.BatchNorm2d(4)), IMAGE),
    "depthwise": (lambda: seq(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), IMAGE),
    "transposed": (lambda: seq(nn.ConvTranspose2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)), IMAGE),
    "transposed, grouped": (lambda: seq(nn.ConvTranspose2d(6, 4, 3, groups=2), nn.BatchNorm2d(4)), (6, 4, 4)),
    "transposed, one dimension": (lambda: seq(nn.ConvTranspose1d(3, 4, 3, bias=False), nn.BatchNorm1d(4)), (3, 5)),
    "linear": (lambda: seq(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU()), ROW),
    "linear over tokens": (_levit, TOKENS),
    "linear, permuted": (_permuted, TOKENS),
    "matrix with inputs first": (_conv1d_of_matrix, ROW),
    "functional convolution": (_functional, IMAGE),
    "sync": (lambda: seq(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4)), IMAGE),
    "without affine": (lambda: seq(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)), IMAGE),
    "dropout between": (lambda: seq(nn.Conv2d(3, 4, 1), nn.Dropout2d(), nn.BatchNorm2d(4)), IMAGE),
    "with activation": (_act, IMAGE),
    "norm behind norm": (lambda: seq(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), IMAGE),
    "concatenated": (_mixed, IMAGE),
    "summed": (_sum, IMAGE),
    "siamese": (_in_lockstep, IMAGE),
    "before linear": (lambda: seq(nn.ReLU(), nn.BatchNorm1d(5), nn.Linear(5, 4)), ROW),
    "before three": (_queries, ROW),
    "before conv": (lambda: seq(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, bias=False)), IMAGE),
    "before grouped conv": (lambda: seq(nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, groups=2)), (6, 5, 5)),
    "before flattened linear": (lambda: seq(nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 2)), IMAGE),
    "beside a conv": (_branches, (4, 6, 6)),
    "beside a conv, in place": (lambda: _branches(in_place=True), (4, 6, 6)),
    "beside a depthwise conv": (lambda: _branches(groups=4), (4, 6, 6)),
    "beside a grouped conv": (lambda: _branches(groups=2, kernel=5), (4, 6, 6)),
    "before a mean and linear": (_averaged, IMAGE),
    "before pooling and conv": (lambda: seq(nn.ReLU(), nn.BatchNorm2d(3), nn.AvgPool2d(2), nn.Conv2d(3, 4, 1)), IMAGE),
    "behind pooling": (lambda: seq(nn.Conv2d(3, 4, 1), nn.AvgPool2d(2), nn.BatchNorm2d(4)), IMAGE),
    "behind a mean": (
        lambda: Net(lambda self, x: self.bn(self.conv(x).mean((2, 3))), conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm1d(4)),
        IMAGE,
    ),
    "both sides": (
        lambda: seq(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()),
        IMAGE,
    ),
}


@pytest.mark.parametrize("name", FOLDS)
def test_what_a_neighbour_can_carry_is_folded(name: str) -> None:
    make, shape = FOLDS[name]
    model = lived(make())
    x = torch.randn(3, *shape)
    before = photograph(model)
    result = fold(model, x)
    assert result.kept == {}
    assert result.folded == tuple(site.name for site in find_sites(model))
    assert find_sites(result.model) == []
    assert type(result.model) is type(model)
    assert result.max_rel_error < 1e-5
    assert all(error < 1e-5 for error in result.errors.values())
    assert tuple(result.errors) == result.folded
    same(model, result.model, torch.randn(2, *shape) * 3)
    assert differences(before, photograph(model)) == []


def test_the_activation_stays_where_the_norm_stood() -> None:
    folded = fold(lived(_act()), torch.randn(2, *IMAGE)).model
    assert type(folded[1]) is nn.SiLU
    assert not folded[1].training


def test_only_the_statistics_layers_go() -> None:
    model = lived(seq(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()))
    model[0].weight.requires_grad_(False)
    folded = fold(model, torch.randn(1, *IMAGE)).model
    assert [type(part) for part in folded] == [nn.Conv2d, nn.Identity, nn.ReLU]
    assert list(folded.state_dict()) == ["0.weight", "0.bias"]
    assert not folded[0].bias.requires_grad


# ── kept, with the reason ──


def _shared_by_two() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.a(y) + self.b(y)

    return Net(forward, conv=nn.Conv2d(3, 4, 1), a=nn.BatchNorm2d(4), b=nn.BatchNorm2d(4))


def _one_conv_two_norms() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.a(self.conv(x)) + self.b(self.conv(x * 2))

    return Net(forward, conv=nn.Conv2d(3, 4, 1), a=nn.BatchNorm2d(4), b=nn.BatchNorm2d(4))


def _net(forward: Callable[[Any, Tensor], Any], **more: Any) -> Callable[[], nn.Module]:
    return lambda: Net(forward, conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4), **more)


def _half_read(self: Any, x: Tensor) -> Tensor:
    left, right = self.conv(x).chunk(2, 1)
    return self.bn(left) + right


def _tied() -> nn.Module:
    model = Net(
        lambda self, x: self.bn(self.conv(x)) + self.other(x), conv=nn.Conv2d(3, 4, 1), other=nn.Conv2d(3, 4, 1)
    )
    model.bn = nn.BatchNorm2d(4)
    model.other.weight = model.conv.weight
    return model


def _tied_to_idle() -> nn.Module:
    model = Net(lambda self, x: self.bn(self.conv(x)), conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
    model.idle = nn.Conv2d(3, 4, 1)
    model.idle.weight = model.conv.weight
    return model


def _tied_bias() -> nn.Module:
    model = Net(
        lambda self, x: self.bn(self.conv(x)) + self.other(x), conv=nn.Conv2d(3, 4, 1), other=nn.Conv2d(3, 4, 1)
    )
    model.bn = nn.BatchNorm2d(4)
    model.other.bias = model.conv.bias
    return model


def _bias_read_elsewhere(self: Any, x: Tensor) -> Tensor:
    return self.bn(self.conv(x)) + self.conv.bias.exp()[:, None, None]


def _weight_norm() -> nn.Module:
    return seq(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))


def _hooked() -> nn.Module:
    model = seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[1].register_forward_hook(lambda module, args, output: None)
    return model


def _training() -> nn.Module:
    return lived(seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).train()


def _looks_at_its_norm(self: Any, x: Tensor) -> Tensor:
    return self.bn(self.conv(x)) * self.bn.weight.mean()


def _held_beside() -> nn.Module:
    model = Net(lambda self, x: self.list[0](self.conv(x)), conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4))
    model.list = [model.bn]
    return model


class NoBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


class IgnoresBias(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight)


class Twisted(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sin()


class WithMask(nn.BatchNorm2d):
    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(input)


def _infinite() -> nn.Module:
    model = lived(seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[1].bias.data[0] = math.inf
    return model


def _no_statistics() -> nn.Module:
    return seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


def _padded() -> nn.Module:
    return seq(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1))


def _norm(part: nn.Module) -> Callable[[], nn.Module]:
    return lambda: seq(part, nn.BatchNorm2d(4))


KEEPS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "one output read by two norms": (
        _shared_by_two,
        "a",
        "from convolution in conv, is also read by native_batch_norm",
    ),
    "one conv called for two norms": (_one_conv_two_norms, "b", "the weight of conv is used 2 times"),
    "residual": (
        _net(lambda self, x: (y := self.conv(x)) + self.bn(y)),
        "bn",
        r"from convolution in conv, is also read by add",
    ),
    "returned": (
        _net(lambda self, x: [y := self.conv(x), self.bn(y)]),
        "bn",
        "from convolution in conv, is also part of the model's output",
    ),
    "half of it": (
        lambda: Net(_half_read, conv=nn.Conv2d(3, 8, 1), bn=nn.BatchNorm2d(4)),
        "bn",
        "is also read by add",
    ),
    "activation between": (_net(lambda self, x: self.bn(self.conv(x).relu())), "bn", "what it reads comes from relu"),
    "reads the input": (lambda: seq(nn.BatchNorm2d(3), nn.ReLU()), "0", "it reads the model's input"),
    "two maps for one conv": (
        _net(lambda self, x: self.bn(self.conv(x).flip(0)) + self.bn(self.conv(x) + self.conv(x))),
        "bn",
        "comes from flip",
    ),
    "doubled": (
        _net(lambda self, x: self.bn(self.conv(x) + self.conv(x * 2))),
        "bn",
        "the calls of conv would need different scales",
    ),
    "repeated": (
        _net(lambda self, x: self.bn(self.conv(x)[:, :, :1].expand(-1, -1, 5, -1))),
        "bn",
        "through a view that repeats",
    ),
    "another channel axis": (
        lambda: Net(
            lambda self, x: self.bn(self.conv(x).transpose(1, 2)), conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(6)
        ),
        "bn",
        "its channels are not those of convolution in conv",
    ),
    "tied": (_tied, "bn", "the weight of conv is used 2 times, also by convolution in other"),
    "tied to an idle layer": (_tied_to_idle, "bn", "the weight of conv is tied to idle.weight"),
    "tied bias": (_tied_bias, "bn", "what conv adds as its bias is no parameter of its own"),
    "bias read elsewhere": (_net(_bias_read_elsewhere), "bn", "the bias of conv is read elsewhere too"),
    "weight norm": (_weight_norm, "1", "the weight of convolution in 0 is computed in the forward"),
    "view of a weight": (
        _net(lambda self, x: self.bn(F.conv2d(x, self.conv.weight.flip(0)[:4]))),
        "bn",
        "is computed in the forward",
    ),
    "half of a weight": (
        _net(lambda self, x: self.bn(F.conv2d(x, self.wide[:4])), wide=nn.Parameter(torch.randn(8, 3, 1, 1))),
        "bn",
        "convolution uses part of a weight",
    ),
    "scaled product": (
        lambda: Net(
            lambda self, x: self.bn(torch.addmm(self.b, x.mean((2, 3)), self.w.t(), alpha=2.0)),
            w=nn.Parameter(torch.randn(4, 3)),
            b=nn.Parameter(torch.randn(4)),
            bn=nn.BatchNorm1d(4),
        ),
        "bn",
        "addmm scales its terms",
    ),
    "a product of two inputs": (
        lambda: Net(lambda self, x: self.bn(x[0, 0] @ x[0, 1]), bn=nn.BatchNorm1d(6)),
        "bn",
        "the weight of mm is computed in the forward",
    ),
    "no place for a bias": (_norm(NoBias()), "1", "0 has no place for a bias"),
    "a bias that is not used": (_norm(IgnoresBias(3, 4, 1, bias=False)), "1", "moved its own output by"),
    "padded conv behind": (_padded, "1", "2 behind it pads with zeros"),
    "transposed conv behind": (
        lambda: seq(nn.ReLU(), nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 4, 3)),
        "1",
        "2 behind it is transposed",
    ),
    "nobody behind": (lambda: seq(nn.ReLU(), nn.BatchNorm2d(3)), "1", "what it gives is part of the model's output"),
    "nobody reads it": (
        lambda: Net(lambda self, x: (self.bn(x), x.exp())[1], bn=nn.BatchNorm2d(3)),
        "bn",
        "nobody reads what it gives",
    ),
    "weight computed behind": (
        lambda: Net(
            lambda self, x: self.fc(self.bn(x.mean((2, 3)))),
            bn=nn.BatchNorm1d(3),
            fc=torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
        ),
        "bn",
        "the weight of mm in fc is computed|the weight of addmm in fc is computed",
    ),
    "used as a weight": (
        lambda: Net(
            lambda self, x: self.fc(x.mean((2, 3))) + F.linear(self.fc.weight, self.bn(x.mean((2, 3)))).t(),
            bn=nn.BatchNorm1d(3),
            fc=nn.Linear(3, 2),
        ),
        "bn",
        "what it gives is|the weight of",
    ),
    "padded pooling": (
        lambda: seq(nn.Conv2d(3, 4, 1), nn.AvgPool2d(3, padding=1), nn.BatchNorm2d(4)),
        "2",
        "what it reads comes from avg_pool2d",
    ),
    "padded pooling behind": (
        lambda: seq(nn.ReLU(), nn.BatchNorm2d(3), nn.AvgPool2d(3, padding=1), nn.Conv2d(3, 4, 1)),
        "1",
        "what it gives is read by avg_pool2d",
    ),
    "mean over channels": (
        lambda: Net(lambda self, x: self.fc(self.bn(x).mean(1).flatten(1)), bn=nn.BatchNorm2d(3), fc=nn.Linear(36, 2)),
        "bn",
        "what it gives is mixed by mean",
    ),
    "behind a mean over channels": (
        lambda: Net(
            lambda self, x: self.bn(self.conv(x).transpose(1, 2).mean(2)), conv=nn.Conv2d(3, 6, 1), bn=nn.BatchNorm1d(6)
        ),
        "bn",
        "its channels are not those|what it reads comes from mean",
    ),
    "pooled and returned": (
        lambda: Net(lambda self, x: self.bn(x).mean((2, 3)), bn=nn.BatchNorm2d(3)),
        "bn",
        "what it gives is part of the model's output",
    ),
    "beside a conv of another value": (
        lambda: Net(
            lambda self, x: self.conv(x.relu()) + self.bn(x.relu()), conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3)
        ),
        "bn",
        "what it gives is read by add",
    ),
    "beside, and added to": (
        lambda: Net(
            lambda self, x: (y := x.relu(), self.bn(y).add_(self.conv(y)), y)[1] * y,
            conv=nn.Conv2d(3, 3, 1),
            bn=nn.BatchNorm2d(3),
        ),
        "bn",
        "what it gives is read by add_",
    ),
    "beside two of three channels": (
        lambda: Net(
            lambda self, x: (y := x.relu(), torch.cat([self.a(y), self.b(y)], 1) + self.bn(y))[1],
            a=nn.Conv2d(3, 1, 1),
            b=nn.Conv2d(3, 2, 1),
            bn=nn.BatchNorm2d(3),
        ),
        "bn",
        "what it gives is read by add",
    ),
    "hooks": (_hooked, "1", "it carries hooks"),
    "training": (_training, "1", r"it is in training mode.*call model.eval\(\)"),
    "the model looks at it": (_net(_looks_at_its_norm), "bn", "the model's forward fails without it"),
    "held beside its modules": (_held_beside, "bn", "the model holds it somewhere beside its modules"),
    "not what it says": (lambda: seq(nn.Conv2d(3, 4, 3), Twisted(4)), "1", "is not one scale and shift per channel"),
    "called with more": (
        lambda: Net(lambda self, x: self.bn(self.conv(x), x), conv=nn.Conv2d(3, 4, 3), bn=WithMask(4)),
        "bn",
        "called with more than one tensor",
    ),
    "not finite": (_infinite, "1", "its scale or shift is not finite"),
    "without statistics": (_no_statistics, "1", "it holds no statistics"),
    "idle": (
        lambda: Net(lambda self, x: self.conv(x), conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)),
        "bn",
        "the example did not reach it",
    ),
}


@pytest.mark.parametrize("name", KEEPS)
def test_what_cannot_be_carried_stays_and_says_why(name: str) -> None:
    make, site, why = KEEPS[name]
    built = make()
    model = built if name in ("training", "not finite") else lived(built)
    x = torch.randn(2, *IMAGE)
    result = fold(model, x)
    assert site in result.kept
    assert site not in result.folded
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(result.kept[site])
    model.eval()
    result.model.eval()
    outputs = [m(x) if isinstance(m(x), Tensor) else m(x)[-1] for m in (model, result.model)]
    assert distance(outputs[:1], outputs[1:]) < 1e-5


def test_a_fold_that_comes_out_wrong_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(self: Absorber, modules: Any) -> None:
        right(self, modules)
        if self.module == "3":
            modules["3"].weight.data[0] *= 1.5

    right = Absorber.absorb_
    monkeypatch.setattr(Absorber, "absorb_", off)
    model = zoo.named("bn2d").build()
    x = torch.randn(2, *IMAGE)
    result = fold(model, x)
    assert result.folded == ("1",)
    assert "folding it moved its own output by" in result.kept["4"]
    same(model, result.model, x)


@pytest.mark.parametrize("wrong", [("3",), ("0", "3")])
def test_what_the_proof_by_site_does_not_see_the_whole_model_does(
    wrong: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fold that only shows where nobody looked: in the head, behind every site."""

    def off(self: Absorber, modules: Any) -> None:
        right(self, modules)
        if self.module in wrong:
            modules["8"].bias.data += 1.0

    right = Absorber.absorb_
    monkeypatch.setattr(Absorber, "absorb_", off)
    model = zoo.named("bn2d").build()
    x = torch.randn(2, *IMAGE)
    result = fold(model, x)
    assert len(result.kept) == len(wrong)
    assert all("with it folded the model's output moved by" in why for why in result.kept.values())
    same(model, result.model, x)


def test_more_wrong_folds_than_it_hunts_for_undo_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(self: Absorber, modules: Any) -> None:
        right(self, modules)
        modules["head"].bias.data += 1.0

    right = Absorber.absorb_
    monkeypatch.setattr(Absorber, "absorb_", off)
    parts: list[nn.Module] = []
    for _ in range(8):
        parts += [nn.Linear(4, 4), nn.BatchNorm1d(4)]
    model = lived(Net(lambda self, x: self.head(self.body(x)), body=nn.Sequential(*parts), head=nn.Linear(4, 2)))
    x = torch.randn(3, 4)
    result = fold(model, x)
    assert result.folded == ()
    assert len(result.kept) == 8
    assert result.max_rel_error == 0


# ── over the zoo ──


@pytest.mark.parametrize("case", zoo.cases(without=("lazy",)))
def test_every_norm_of_the_zoo_is_folded_or_has_its_reason(case: zoo.Case) -> None:
    model = case.settled()
    before, around = photograph(model), process()
    batch = case.batch()
    try:
        result = fold(model, batch, forward=case.forward)
    except NoBatchNorm:
        assert not any(s.kind == "batch" and s.tensors for s in find_sites(model))
        return
    assert differences(before, photograph(model)) == []
    assert process() == around
    sites = [s.name for s in find_sites(model) if s.kind == "batch"]
    assert sorted([*result.folded, *result.kept]) == sorted(sites)
    assert type(result.model) is type(unwrap(model))
    assert set(result.folded).isdisjoint(s.name for s in find_sites(result.model))
    assert result.max_rel_error <= (0.25 if "narrow" in case.tags else 1e-5)


EXACT = {"batch", "batch_renorm", "frozen", "ghost", "posterior", "stochastic", "sync"}


@pytest.mark.parametrize("name", sorted(layers.catalogue()))
@pytest.mark.parametrize("act", [None, nn.ReLU()])
def test_a_layer_of_ours_is_folded_where_it_is_a_map_and_kept_where_data_move_it(
    name: str, act: nn.Module | None
) -> None:
    layer = layers.lived(name, act=act).eval()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.Sigmoid()).eval()
    if not any(s.kind == "batch" for s in find_sites(model)):
        return
    result = fold(model, torch.randn(4, *IMAGE))
    assert (result.folded == ("1",)) == (name in EXACT)
    if name in EXACT:
        assert type(result.model[1]) is (nn.Identity if act is None else nn.ReLU)
    same(model, result.model, torch.randn(4, *IMAGE) * 30 + 10)


MUST_FOLD = {
    *("bn2d", "bn1d", "bn1d-sequence", "bn3d", "sync", "no-affine", "momentum-none", "lazy-seen", "float64"),
    *("frozen-four", "frozen-hidden-eps", "frozen-torchvision", "large-eps", "bfloat16", "float16", "dropout"),
    *("compiled", "compiled-part", "compiled-in-place", "data-parallel", "averaged", "two-inputs", "takes-a-dict"),
    *("timm-resnet", "timm-efficientnet", "untracked-statistics"),
}


@pytest.mark.parametrize("name", sorted(MUST_FOLD))
def test_these_are_folded_whole(name: str) -> None:
    case = zoo.named(name)
    result = fold(case.build(), case.batch(), forward=case.forward)
    assert result.kept == {}


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet", "mixnet_s", "mobilevit_xxs"])
def test_small_networks_of_timm_are_folded_and_right(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = lived(timm.create_model(name, num_classes=5))
    result = fold(model, torch.randn(1, 3, 64, 64))
    assert result.kept == {}
    same(model, result.model, torch.randn(2, 3, 64, 64), 1e-4)


def test_densenet_keeps_what_stands_before_an_activation() -> None:
    timm = pytest.importorskip("timm")
    model = lived(timm.create_model("densenet121", num_classes=5, growth_rate=4, block_config=(2, 2)))
    result = fold(model, torch.randn(1, 3, 64, 64))
    assert {name.rpartition(".")[2] for name in result.folded} == {"norm0", "norm2"}
    assert all("what it reads comes from" in why or "is also read by" in why for why in result.kept.values())
    assert result.max_rel_error < 1e-5


# ── numbers ──


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    groups=st.sampled_from([1, 2, 3]),
    per_group=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.lists(st.integers(1, 3), min_size=0, max_size=2),
    transposed=st.booleans(),
    with_bias=st.booleans(),
    side=st.sampled_from(["after", "before"]),
)
def test_the_folded_weight_equals_its_twin(
    seed: int,
    groups: int,
    per_group: tuple[int, int],
    kernel: list[int],
    transposed: bool,
    with_bias: bool,
    side: Side,
) -> None:
    rng = np.random.default_rng(seed)
    outs, ins = groups * per_group[0], groups * per_group[1]
    weight = rng.normal(size=(outs, per_group[1], *kernel))
    bias = rng.normal(size=outs) if with_bias else np.zeros(outs)
    channels = outs if side == "after" else ins
    scale, shift = rng.normal(size=(2, channels))
    held = weight
    if transposed:  # (in, out / groups): each group's block turned over
        held = np.concatenate([block.swapaxes(0, 1) for block in np.split(weight, groups)])
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor(held))
    module.bias = nn.Parameter(torch.tensor(bias)) if with_bias else None
    absorber = Absorber(
        side, "m", "weight", ("m", "bias"), groups, 2 if transposed else 1, torch.tensor(scale), torch.tensor(shift)
    )
    absorber.absorb_({"m": module})
    expected, offset = (
        twin.after(weight, bias, scale, shift) if side == "after" else twin.before(weight, bias, scale, shift, groups)
    )
    got = module.weight.detach().numpy()
    if transposed:
        got = np.concatenate([block.swapaxes(0, 1) for block in np.split(got, groups)])
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    np.testing.assert_allclose(module.bias.detach().numpy(), offset, rtol=1e-9, atol=1e-12)


def test_the_map_of_a_site_is_a_value() -> None:
    model = zoo.named("timm-norm-act").build()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    for site in find_sites(model)[:2]:
        affine = scale_and_shift(site)
        assert affine is not None
        with torch.no_grad():
            torch.testing.assert_close(affine(x).relu(), site.module.double()(x))
    assert scale_and_shift(find_sites(model)[2]) is None


def test_float64_is_held_to_a_tighter_tolerance() -> None:
    case = zoo.named("float64")
    result = fold(case.build(), case.batch())
    assert result.max_rel_error < 1e-13


def _restless(*, casts: bool = False) -> nn.Module:
    """Enlarges the last digit of what it computes a hundred thousandfold."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return (self.bn(self.conv(x.float() if casts else x)) * 1e5).sin()

    return lived(Net(forward, conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)))


def test_a_network_that_enlarges_rounding_is_folded_where_float64_proves_it() -> None:
    result = fold(_restless(), torch.randn(2, *IMAGE))
    assert result.folded == ("bn",)
    assert result.own_rounding is not None
    assert 1e-4 < result.max_rel_error <= 8 * result.own_rounding
    assert fold(zoo.named("bn2d").build(), torch.randn(2, *IMAGE)).own_rounding is None


def test_a_tolerance_that_was_asked_for_is_kept_to() -> None:
    result = fold(_restless(), torch.randn(2, *IMAGE), tolerance=1e-4)
    assert "with it folded the model's output moved by" in result.kept["bn"]


def test_without_float64_there_is_no_such_proof() -> None:
    result = fold(_restless(casts=True), torch.randn(2, *IMAGE))
    assert "with it folded the model's output moved by" in result.kept["bn"]


def test_channels_last_stays_as_it_lies() -> None:
    model = zoo.named("bn2d").build().to(memory_format=torch.channels_last)
    result = fold(model, torch.randn(2, *IMAGE), channels_last=True)
    assert len(result.folded) == 2
    assert result.model[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_tolerance_below_rounding_keeps_everything() -> None:
    model = zoo.named("bn2d").build()
    result = fold(model, torch.randn(2, *IMAGE), tolerance=1e-12)
    assert result.folded == ()
    assert result.max_rel_error == 0


# ── what is refused ──


def test_a_model_without_batch_norm_is_refused() -> None:
    with pytest.raises(NoBatchNorm, match="fold needs batch norm layers"):
        fold(nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3))


def test_a_tolerance_must_be_positive() -> None:
    with pytest.raises(UsageError, match="tolerance is a share of the largest output, above 0; got 0"):
        fold(zoo.named("bn2d").build(), torch.randn(2, *IMAGE), tolerance=0)


def test_a_model_that_gives_no_tensor_is_refused() -> None:
    model = Net(lambda self, x: str(self.bn(x).shape), bn=nn.BatchNorm2d(3)).eval()
    with pytest.raises(UsageError, match="its output holds no tensor; say with forward="):
        fold(model, torch.randn(2, *IMAGE))


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = zoo.named("bn2d").build()
    model.cache = model[0].weight * 2  # no leaf: torch refuses to copy it
    with pytest.raises(UsageError, match="fold works on a copy, and Sequential cannot be copied"):
        fold(model, torch.randn(2, *IMAGE))


def test_an_example_that_does_not_fit_is_said_to_be_so() -> None:
    model = zoo.named("bn2d").build()
    before = photograph(model)
    with pytest.raises(RuntimeError, match="expected input") as caught:
        fold(model, torch.randn(2, 5, 6, 6))
    assert "whose inputs are (2, 5, 6, 6)" in caught.value.__notes__[0]
    assert differences(before, photograph(model)) == []


def test_distance_counts_other_shapes_and_new_nan_as_infinitely_far() -> None:
    x = torch.tensor([1.0, -4.0])
    assert distance([x], [x[:1]]) == math.inf
    assert distance([x], [torch.tensor([1.0, math.nan])]) == math.inf
    assert distance([x * math.nan], [x * math.nan]) == 0
    assert distance([x], [x + 1]) == 0.25
    assert distance([x[:0]], [x[:0]]) == 0
