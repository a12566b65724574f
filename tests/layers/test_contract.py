"""Contract: what every layer of the catalogue bears, whichever rule it normalises by."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from renorm import layers
from renorm.errors import BatchError, UnknownName, UsageError
from renorm.layers.base import Mixing, catalogue, options_of
from renorm.sites import find_sites
from tests.layers.catalogue import CONSTANT, TRACKING, every_layer, every_tracking, images, lived

BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SHAPES = {2: (6, 4), 3: (6, 4, 5), 4: (6, 4, 3, 3), 5: (6, 4, 2, 3, 2), 6: (4, 4, 2, 2, 1, 2)}
PAGE = Path(__file__).parents[2] / "docs" / "layers.md"
every_rank = pytest.mark.parametrize("rank", sorted(SHAPES))


def trained(dtype: torch.dtype = torch.float32, rank: int = 4) -> nn.Module:
    """A batch norm of torch's with a life behind it."""
    norm = BATCH_NORMS[rank](4, dtype=dtype)
    norm.load_state_dict({k: v for k, v in lived("batch", dtype=dtype).state_dict().items()})
    return norm


def statistics(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.named_buffers() if name != "skipped"}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def scored(layer: Any, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, and the gradients of x and the parameters for a score that treats every value differently."""
    torch.manual_seed(3)  # for the layer that draws
    x = x.clone().requires_grad_()  # keeps the layout
    y = (run or layer)(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    of_x, *others = torch.autograd.grad((y * weights).sum(), [x, *parameters], allow_unused=True)
    return y.detach(), of_x, [torch.zeros(1) if g is None else g for g in others]


@every_layer
@every_rank
def test_it_takes_any_rank_in_either_mode(name: str, rank: int) -> None:
    layer = catalogue()[name](4)
    x = images(*SHAPES[rank])
    for mode in (True, False):
        y = layer.train(mode)(x)
        assert y.shape == x.shape
        assert bool(torch.isfinite(y).all())


@every_layer
def test_a_checkpoint_of_torch_loads_strictly(name: str) -> None:
    layer = catalogue()[name](4)
    wanted = trained().state_dict()
    layer.load_state_dict(wanted, strict=True)
    held = layer.state_dict()
    if "running_mean" in held:
        assert all(torch.equal(held[key], value) for key, value in wanted.items())
    else:  # its affine takes the statistics in, see tests of each
        assert not torch.equal(held["weight"], torch.ones(4))
    old = {k: v for k, v in trained().state_dict().items() if k != "num_batches_tracked"}
    catalogue()[name](4).load_state_dict(old, strict=True)  # from before torch counted batches


@every_tracking
@every_rank
def test_where_it_promises_so_it_then_gives_in_evaluation_what_torch_gave(name: str, rank: int) -> None:
    if rank == 6:
        pytest.skip("torch has no batch norm of this rank")
    layer = catalogue()[name](4).eval()
    if not layer.keeps:
        pytest.skip("promises nothing of the kind")
    norm = trained(rank=rank).eval()
    layer.load_state_dict(norm.state_dict())
    x = images(*SHAPES[rank])
    torch.testing.assert_close(layer(x), norm(x), rtol=1e-5, atol=1e-5)
    wanted = [norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.weight, norm.bias]
    for got, expected in zip(layer.plain(), wanted, strict=True):
        torch.testing.assert_close(got, expected)


@every_tracking
def test_its_keys_are_those_of_torch_and_what_is_more_stands_under_extra(name: str) -> None:
    keys = list(catalogue()[name](4).state_dict())
    assert [key for key in keys if not key.startswith("extra.")] == list(nn.BatchNorm2d(4).state_dict())


@every_layer
def test_its_own_state_comes_back(name: str) -> None:
    layer, other = lived(name), catalogue()[name](4)
    other.load_state_dict(layer.state_dict())
    assert same(dict(layer.state_dict()), dict(other.state_dict()))


@every_layer
def test_without_affine_parameters_it_has_none_and_works(name: str) -> None:
    layer = catalogue()[name](4, affine=False)
    assert list(layer.parameters()) == []
    layer(images(6, 4, 3, 3)).sum().item()
    layer.eval()(images(6, 4, 3, 3)).sum().item()


@every_layer
@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_channels_last_gives_the_same(name: str, mode: bool) -> None:
    x = images(6, 4, 5, 5)
    y, of_x, others = scored(lived(name).train(mode), x)
    last = x.contiguous(memory_format=torch.channels_last)
    y2, of_x2, others2 = scored(lived(name).train(mode), last)
    torch.testing.assert_close(y2, y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_x2, of_x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(others2, others, rtol=1e-4, atol=1e-4)
    assert y2.is_contiguous(memory_format=torch.channels_last)


@every_tracking
def test_channels_may_stand_last(name: str) -> None:
    x = images(6, 4, 5, 3)
    y = lived(name)(x) if name != "stochastic" else lived(name, p=1.0)(x)
    options = {"p": 1.0} if name == "stochastic" else {}
    other = lived(name, axis=-1, **options)(x.movedim(1, -1))
    torch.testing.assert_close(other.movedim(-1, 1), y, rtol=1e-5, atol=1e-5)


@every_layer
def test_under_autocast_its_tensors_stay_float32(name: str) -> None:
    layer = lived(name)
    x = images(6, 4, 5, 5)
    wanted = scored(copy.deepcopy(layer), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, of_x, _ = scored(layer, x.to(torch.bfloat16))
    assert {t.dtype for t in layer.state_dict().values() if t.is_floating_point()} == {torch.float32}
    assert y.dtype == of_x.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), wanted[0], rtol=3e-2, atol=6e-2)
    torch.testing.assert_close(of_x.float(), wanted[1], rtol=6e-2, atol=3e-2)


CONSTANTS = {"batch_renorm": "_corrections", "shrink": "source_share", "transferable": "_factor"}


@contextmanager
def constants_held(layer: Any, name: str) -> Iterator[None]:
    """What the paper holds constant for gradients keeps its first value."""
    if name not in CONSTANTS:
        yield
        return
    compute, kept = getattr(layer, CONSTANTS[name]), []

    def first(*args: Any) -> Any:
        if not kept:
            found = compute(*args)
            kept.append(tuple(v.detach() for v in found) if isinstance(found, tuple) else found.detach())
        return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, CONSTANTS[name], first)
        yield


@every_layer
@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (5, 3)], ids=["images", "features"])
@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_its_gradient_is_that_of_its_formula(name: str, shape: tuple[int, ...], mode: bool) -> None:
    layer = lived(name, 3, torch.float64).train(mode)
    if name in TRACKING:
        layer.track_running_stats = False  # or every call would meet other statistics
    x = images(*shape, dtype=torch.float64).requires_grad_()
    parameters = [p.requires_grad_() for p in layer.parameters()]

    def function(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(5)
        return layer(x)

    with constants_held(layer, name):
        assert torch.autograd.gradcheck(function, (x, *parameters))
        assert torch.autograd.gradgradcheck(function, (x, *parameters))


@every_layer
def test_fast_and_composed_arithmetic_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(6, 4, 5, 5, at=3.0)
    fast = scored(lived(name), x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    slow = scored(lived(name), x)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-4)


@every_tracking
def test_functional_calls_and_their_gradient(name: str) -> None:
    layer, x = lived(name), images(6, 4, 5, 5)
    wanted = scored(copy.deepcopy(layer), x)
    weights = torch.linspace(-1, 1, x.numel()).view(x.shape)
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    buffers = {k: v.clone() for k, v in layer.named_buffers()}

    def score(parameters: dict[str, Tensor], x: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(3)
        return (torch.func.functional_call(layer, (parameters, buffers), (x,)) * weights).sum()

    of_parameters, of_x = torch.func.grad(score, argnums=(0, 1))(parameters, x, buffers)
    torch.testing.assert_close(of_x, wanted[1], rtol=1e-4, atol=1e-5)
    found = [of_parameters[k] for k, p in layer.named_parameters() if p.requires_grad]
    torch.testing.assert_close(found, wanted[2], rtol=1e-4, atol=1e-4)
    assert (int(buffers["num_batches_tracked"]), int(layer.num_batches_tracked)) == (7 + (name not in CONSTANT), 7)


@pytest.mark.slow
@every_layer
def test_it_compiles_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    layer = lived(name, p=1.0) if name == "stochastic" else lived(name)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    x = images(6, 4, 5, 5)
    for mode in (True, False):
        layer.train(mode)
        compiled.train(mode)
        torch.testing.assert_close(scored(compiled, x), scored(layer, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistics(compiled._orig_mod), statistics(layer), rtol=1e-5, atol=1e-6)


@every_layer
def test_copies_and_pickles_are_the_same_layer(name: str) -> None:
    layer = lived(name, act="relu")
    layer(images(6, 4, 3, 3))
    x = images(6, 4, 3, 3, seed=1)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        kept = copy.deepcopy(layer)
        assert torch.equal(scored(other, x)[0], scored(kept, x)[0])
        assert same(dict(other.state_dict()), dict(kept.state_dict()))


@every_layer
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_changes_neither_statistics_nor_gradients(name: str, reentrant: bool) -> None:
    plain, other = lived(name), lived(name)
    if isinstance(plain, Mixing):
        plain.num_batches_tracked.fill_(12_000)  # where batch renorm's bounds have opened
        other.num_batches_tracked.fill_(12_000)
    for seed in range(3):
        x = images(6, 4, 5, 5, seed=seed, at=1.0)
        wanted = scored(plain, x)
        got = scored(other, x, lambda x: checkpoint(other, x, use_reentrant=reentrant)) if not reentrant else None
        if reentrant:  # torch.autograd.grad is refused by reentrant checkpoints
            torch.manual_seed(3)
            x = x.clone().requires_grad_()
            y = checkpoint(other, x, use_reentrant=True)
            (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
            got = y.detach(), x.grad, [p.grad for p in other.parameters() if p.requires_grad]
            other.zero_grad()
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        assert same(statistics(other), statistics(plain))


@pytest.mark.parametrize("name", [n for n, layer in TRACKING.items() if issubclass(layer, Mixing)])
def test_a_recomputed_batch_meets_the_statistics_it_met_though_others_came_between(name: str) -> None:
    first, second = images(6, 4, 5, 5, seed=1, at=2.0), images(6, 4, 5, 5, seed=2, at=-2.0)
    found = []
    for checkpointed in (False, True):
        layer = lived(name, momentum=0.5, **({"p": 0.5} if name == "stochastic" else {}))
        layer.num_batches_tracked.fill_(30_000)
        torch.manual_seed(3)
        inputs = [x.clone().requires_grad_() for x in (first, second)]
        outputs = [checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x) for x in inputs]
        sum((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in outputs).backward()
        found.append([x.grad for x in inputs])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


@every_tracking
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_batch_that_is_not_finite_is_kept_out_and_counted(name: str, bad: float) -> None:
    layer = lived(name)
    before = statistics(layer)
    x = images(6, 4, 3, 3)
    x[2, 1, 0, 0] = bad
    layer(x)
    if name not in ("split", "transferable"):  # whose other set moves
        assert same(before, statistics(layer))
    assert int(layer.skipped) == (0 if name in CONSTANT else 1)
    layer(images(6, 4, 3, 3))
    assert bool(torch.isfinite(layer.eval()(images(6, 4, 3, 3))).all())
    assert name in CONSTANT or not same(before, statistics(layer))


@every_tracking
def test_one_value_per_channel_is_refused_by_name_or_harmless(name: str) -> None:
    layer = lived(name)
    layer.site = "stages.1.bn2"
    x = images(1, 4, 1, 1)
    before = statistics(layer)
    if layer.needs_two_values:
        with pytest.raises(BatchError, match=r"at 'stages\.1\.bn2' was given the shape \(1, 4, 1, 1\) in training"):
            layer(x)
    else:
        assert bool(torch.isfinite(layer(x)).all())
    assert same(before, statistics(layer))
    layer.eval()(x)


@every_tracking
def test_an_input_of_another_width_is_refused(name: str) -> None:
    with pytest.raises(BatchError, match=r"has 4 channels along dimension 1 of its input, and was given the shape"):
        catalogue()[name](4)(torch.zeros(2, 5, 3, 3))


@every_tracking
@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"momentum": 1.5}, r"momentum is the weight of the new batch, in \[0, 1\], or None; got 1\.5"),
        ({"momentum": -0.1}, r"momentum is the weight of the new batch"),
        ({"eps": -1e-5}, r"eps is added to a variance and must not be below 0"),
        ({"act": 3}, r"act is the name of an activation of torch\.nn, a module or a function; got 3"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(name: str, option: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        catalogue()[name](4, **option)


@every_tracking
def test_a_negative_number_of_channels_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"num_features is a number of channels; got -1"):
        catalogue()[name](-1)


@every_layer
def test_the_activation_comes_last(name: str) -> None:
    options = {"p": 1.0} if name == "stochastic" else {}
    x = images(6, 4, 3, 3)
    plain = lived(name, **options)(x)
    for act in ("relu", "ReLU", torch.relu, nn.ReLU()):
        torch.testing.assert_close(lived(name, act=act, **options)(x), plain.relu())
    with pytest.raises(UnknownName, match=r"there is no activation 'relo'; did you mean 'RReLU|ReLU"):
        catalogue()[name](4, act="relo")


@every_tracking
def test_evaluation_moves_nothing(name: str) -> None:
    layer = lived(name).eval()
    before = statistics(layer)
    layer(images(6, 4, 3, 3))
    assert same(before, statistics(layer))


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("name", sorted(set(TRACKING) - CONSTANT - {"ghost", "split", "transferable"}))
def test_statistics_move_as_those_of_torch_do(name: str, momentum: float | None) -> None:
    layer, norm = catalogue()[name](4, momentum=momentum), nn.BatchNorm2d(4, momentum=momentum)
    for seed in range(3):
        x = images(6, 4, 3, 3, seed=seed)
        layer(x)
        norm(x)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(layer, key), getattr(norm, key), rtol=1e-5, atol=1e-6)


@every_tracking
def test_it_is_a_place_that_is_found(name: str) -> None:
    found = find_sites(nn.Sequential(nn.Conv2d(3, 4, 3), catalogue()[name](4)))
    assert {site.kind for site in found} == {"batch"}
    assert all(site.name.partition("@")[0] == "1" and site.channels == 4 and site.axis == 1 for site in found)
    last = find_sites(nn.Sequential(catalogue()[name](4, axis=-1)))
    assert all(site.axis in (-1, 1) for site in last)


@every_layer
def test_it_says_what_it_is(name: str) -> None:
    layer = catalogue()[name]
    assert layer.__doc__
    assert layer.cites.startswith("@") or name == "frozen"
    assert getattr(layers, layer.__name__) is layer
    assert f"`{name}`" in PAGE.read_text(encoding="utf-8")
    assert f"`{layer.__name__}`" in PAGE.read_text(encoding="utf-8")
    text = repr(layer(4))
    assert all(f"{option}=" in text for option in layer.options)
    assert set(layer.options) <= set(options_of(layer))


def test_a_name_that_the_folder_does_not_hold_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match=r"'renorm\.layers' has no attribute 'Nothing'"):
        _ = layers.Nothing
