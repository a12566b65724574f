"""Find every norm layer in any model. Nothing else in renorm decides what a norm layer is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, Literal, Protocol, TypeVar, cast, get_args, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from renorm.errors import NoBatchNorm, UsageError
from renorm.moments import Moments

Kind = Literal["batch", "layer", "group", "instance", "rms"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Named(Protocol):
    """What patterns choose by its name."""

    @property
    def name(self) -> str: ...


_Named = TypeVar("_Named", bound=Named)


@runtime_checkable
class Slotted(Protocol):
    """A norm module that is several places: one per time step, or one per domain.

    `slots()` names them. `slot_statistics(slot)` gives the mean and (unbiased) variance held for one, as views that may be
    written in place. Before it normalises values for a slot in evaluation, the module calls `on_slot(slot, x)` where that is
    set, x (n, C, *), and only then reads the slot's statistics.
    """

    on_slot: Callable[[str, Tensor], None] | None

    def slots(self) -> Sequence[str]: ...
    def slot_statistics(self, slot: str) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Site:
    """A place in a model where a norm layer stands, by dotted name; `name` ends in `@slot` where a module holds several.

    `kind` is "batch", "layer", "group", "instance" or "rms"; `channels` is 0 while a lazy layer has not seen any;
    `axis` is the dimension of its input that holds the channels.
    """

    name: str
    module: nn.Module
    kind: Kind
    channels: int
    slot: str | None = None
    axis: int = 1

    @property
    def eps(self) -> float:
        """What the layer adds to a variance before the root; torch's default, 1e-5, where it does not say."""
        for name in ("eps", "epsilon", "variance_epsilon"):
            value = getattr(self.module, name, None)
            if isinstance(value, float | int):
                return float(value)
        return 1e-5

    @property
    def momentum(self) -> float | None:
        """The weight of a new batch in the running statistics, as torch means it; None: their plain average.

        Keras means the weight of what is kept, and is converted. Where the layer does not say, torch's default, 0.1.
        """
        value = getattr(self.module, "momentum", 0.1)
        if not isinstance(value, float | int):
            return None
        return 1.0 - value if self._stores_biased else float(value)

    @property
    def tracks(self) -> bool:
        """Whether a forward in training would move the statistics: not for frozen copies, nor where they are only kept.

        Nor where torch has quantised the layer, which then takes no notice of its mode.
        """
        module = self.module
        if self.tensors is None or getattr(module, "track_running_stats", True) is False:
            return False
        if "quantized" in type(module).__module__.split("."):
            return False
        if self._stores_biased and not getattr(module, "trainable", True):
            return False
        return hasattr(module, "momentum") and self.momentum != 0

    @property
    def synchronises(self) -> bool:
        """Whether ranks that train together would normalise by the batch of all of them here."""
        return isinstance(self.module, nn.SyncBatchNorm)

    @property
    def affine(self) -> dict[str, nn.Parameter]:
        """The scale and shift, by attribute name, as far as they are parameters: frozen copies keep buffers.

        Those of other domains or roles, which layers of ours keep under `extra`, are among them.
        """
        keras = {name: getattr(getattr(self.module, name, None), "value", None) for name in ("gamma", "beta")}
        own = {name: p for name, p in self.module._parameters.items() if p is not None}
        extra = self.module._modules.get("extra")
        more = {} if extra is None else {f"extra.{name}": p for name, p in extra.named_parameters()}
        return own | more | {name: p for name, p in keras.items() if isinstance(p, nn.Parameter)}

    @property
    def tensors(self) -> tuple[Tensor, Tensor] | None:
        """The running mean and running variance themselves, (C,) each; None where the layer holds none."""
        if self.slot is not None:
            return cast(Slotted, self.module).slot_statistics(self.slot)
        return _statistics(self.module)

    def statistics(self) -> Moments | None:
        """The layer's statistics, as moments of unknown count (`math.inf`) on the processor; None where it holds none."""
        tensors = self.tensors
        if tensors is None:
            return None
        mean, var = (t.detach().cpu().to(torch.float64, copy=True) for t in tensors)
        return Moments(math.inf, mean, var)

    def write_(self, moments: Moments) -> None:
        """Let the layer hold `moments`: the mean and, as torch stores it, the unbiased variance (Keras: the biased one).

        Raises UsageError where the layer holds no statistics, or a different number of channels.
        """
        tensors = self.tensors
        if tensors is None:
            raise UsageError(f"statistics were to be written at {self.name!r}, but the layer holds none.")
        mean, var = tensors
        if moments.mean.shape != mean.shape:
            raise UsageError(
                f"moments of {moments.mean.numel()} channels were to be written at {self.name!r}, "
                f"which has {mean.numel()}; measure them on the same model."
            )
        # through .data: an open autograd graph that read the old values must not be told they changed under it
        mean.data.copy_(moments.mean)
        var.data.copy_(moments.var if self._stores_biased else moments.unbiased)

    def normalise_by_(self, moments: Moments) -> None:
        """Let the layer, in evaluation, normalise by exactly these moments: their biased variance, as training does.

        For the length of a watched forward; what is to stay is written with `write_`.
        """
        tensors = self.tensors
        if tensors is not None:
            tensors[0].data.copy_(moments.mean)
            tensors[1].data.copy_(moments.var)

    @property
    def _stores_biased(self) -> bool:
        return hasattr(self.module, "moving_variance")  # Keras keeps the variance it normalises by


def find_sites(model: nn.Module) -> list[Site]:
    """Every norm layer in `model`, each once, in the order modules were registered.

    Wrappers (torch.compile, DistributedDataParallel, DataParallel, averaged and EMA models) are looked through and leave no
    trace in the names; the model itself may be the layer (its name is then ""). A module registered twice is one site.
    Nothing is changed, run or initialised.
    """
    return [site for name, module in walk(unwrap(model)) for site in _sites_of(name, module)]


def batch_sites(model: nn.Module, *, asked: str) -> list[Site]:
    """The batch norm sites of `model` that hold statistics.

    Raises NoBatchNorm, naming what was `asked` for and which other norm layers there are, where no such site exists.
    """
    sites = find_sites(model)
    found = [site for site in sites if site.kind == "batch" and site.tensors is not None]
    if not found:
        kinds = sorted({site.kind for site in sites})
        others = (
            f"it has {len(sites)} norm layers of kind {', '.join(kinds)}" if sites else "it has no norm layer at all"
        )
        lazy = " Run one batch through it first: its lazy layers hold nothing yet." if any(map(is_lazy, sites)) else ""
        folded = (
            f" Its {count} convolutions all have a bias: if batch norms were folded into them, take the model from before "
            "that; what rounding or pruning moved since, repair_(model, source, batches) mends without any."
            if (count := len(bare_convolutions(model)))
            else ""
        )
        raise NoBatchNorm(
            f"{asked} needs batch norm layers that hold running statistics; {type(unwrap(model)).__name__} has none "
            f"({others}).{lazy}{folded} Layer, group and rms norm keep nothing that new data could make stale."
        )
    return found


def bare_convolutions(model: nn.Module) -> list[str]:
    """The convolutions of a model that looks folded: two or more, each with a bias, and no norm layer of any kind; else none.

    A network that was made without norm layers looks the same.
    """
    found = {
        name: m for name, m in walk(unwrap(model)) if isinstance(m, _ConvNd) and not isinstance(m, LazyModuleMixin)
    }
    biased = all(isinstance(getattr(m, "bias", None), Tensor) for m in found.values())
    return list(found) if len(found) > 1 and biased and not find_sites(model) else []


def select(
    sites: Sequence[_Named], *, include: str | Sequence[str] = "*", exclude: str | Sequence[str] = ()
) -> list[_Named]:
    """Those whose name matches a pattern of `include` and none of `exclude` (shell patterns, case counts)."""
    wanted, unwanted = ([p] if isinstance(p, str) else list(p) for p in (include, exclude))
    return [
        site
        for site in sites
        if any(fnmatchcase(site.name, p) for p in wanted) and not any(fnmatchcase(site.name, p) for p in unwanted)
    ]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside any stack of torch.compile, DDP, DataParallel, averaged and EMA wrappers."""
    stack = wrappers(model)
    return _inside(stack[-1]) if stack else model


def wrappers(model: nn.Module) -> list[nn.Module]:
    """The stack that `unwrap` looks through, the outermost first; empty where nothing is wrapped."""
    found: list[nn.Module] = []
    while (inner := _inside(model)) is not model:
        found.append(model)
        model = inner
    return found


def _inside(model: nn.Module) -> nn.Module:
    """What the wrapper `model` holds, or the model itself where it is no wrapper."""
    inner = getattr(model, "_orig_mod", None)
    if inner is None and not _WRAPPERS.isdisjoint(c.__name__ for c in type(model).__mro__):
        inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) else model


_WRAPPERS = {  # by name, so that none of these has to be imported to be known
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "DataParallel",
    "AveragedModel",
    "ModelEmaV2",
    "ModelEmaV3",
    "ExponentialMovingAverage",
}


def walk(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, with its dotted name, as `named_modules` does, and through Keras' own lists and inner compilations."""
    seen: set[int] = set()

    def below(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module
        for child_name, child in _children(module):
            inner = getattr(child, "_orig_mod", child)
            yield from below(f"{name}.{child_name}" if name else child_name, inner)

    yield from below("", root)


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of `model` once, under the name of the module in `walk` that holds it and its own (Keras: variable's)."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in walk(unwrap(model)):
        own: dict[str, Any] = dict(module._parameters)
        if is_keras(module):
            keras = cast(Any, module)
            own |= {v.name: v.value for v in (*keras._trainable_variables, *keras._non_trainable_variables)}
        for key, parameter in own.items():
            if isinstance(parameter, nn.Parameter) and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{name}.{key}" if name else key] = parameter
    return found


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    keras = hasattr(module, "_flatten_layers")
    layers = [layer for layer in cast(Any, module)._layers if isinstance(layer, nn.Module)] if keras else []
    for name, child in module.named_children():
        # Keras: `_functional` holds the same layers once more, `_torch_params` only tensors
        if not (layers and name in ("_functional", "_torch_params")):
            yield name, child
    for layer in layers:
        yield str(getattr(layer, "name", type(layer).__name__)), layer


def is_keras(module: nn.Module) -> bool:
    """Whether `module` is a Keras layer, which hears of training by its call and not by `train()`."""
    return hasattr(module, "_flatten_layers")


def _sites_of(name: str, module: nn.Module) -> Iterator[Site]:
    if isinstance(module, Slotted):
        for slot in module.slots():
            mean, _ = module.slot_statistics(slot)
            yield Site(f"{name}@{slot}", module, "batch", mean.numel(), slot)
        return
    kind = _kind(module)
    if kind is not None:
        yield Site(name, module, kind, _channels(module), axis=_axis(module, kind))


def _kind(module: nn.Module) -> Kind | None:
    for kind, classes in _CLASSES.items():
        if isinstance(module, classes):
            return kind
    if _statistics(module) is not None:
        return "batch"
    # other libraries' own layers, by name; a block named after the norm layer inside it is no second one
    named = (kind for kind, pattern in _NAMES.items() if re.search(pattern, type(module).__name__))
    return None if any(_kind(child) for child in module.children()) else next(named, None)


_CLASSES: dict[Kind, type | tuple[type, ...]] = {
    "instance": _InstanceNorm,
    "batch": _BatchNorm,
    "rms": nn.RMSNorm,
    "group": nn.GroupNorm,
    "layer": nn.LayerNorm,
}
_NAMES: dict[Kind, str] = {  # timm's SimpleNorm divides by the sd without centring; timm's own models call that rms
    "instance": "^InstanceNorm",
    "batch": "^BatchNorm",
    "rms": "(?i:rms|^simple)_?[Nn]orm|^T5LayerNorm$|^RMSNormalization$",
    "group": "^GroupNorm",
    "layer": "LayerNorm(alization|2d)?$",
}


def _statistics(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Running mean and variance by their names in torch and every frozen copy, or in Keras."""
    mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if mean is None and var is None:
        mean, var = (getattr(getattr(module, n, None), "value", None) for n in ("moving_mean", "moving_variance"))
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor) or isinstance(mean, nn.UninitializedBuffer):
        return None
    return (mean, var) if mean.dim() == 1 and mean.shape == var.shape else None


def _channels(module: nn.Module) -> int:
    statistics = _statistics(module)
    if statistics is not None:
        return statistics[0].numel()
    if isinstance(module, LazyModuleMixin) and cast(Any, module).has_uninitialized_params():
        return 0
    for name in ("num_features", "num_channels"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    shape = getattr(module, "normalized_shape", None)
    if shape is not None:
        return math.prod(shape if isinstance(shape, Sequence) else (shape,))
    weight = getattr(module, "weight", None)
    if weight is None:
        weight = getattr(getattr(module, "gamma", None), "value", None)  # Keras
    return weight.numel() if isinstance(weight, Tensor) else 0


def _axis(module: nn.Module, kind: Kind) -> int:
    axis = getattr(module, "axis", None)  # Keras
    if isinstance(axis, int):
        return axis
    if isinstance(axis, Sequence) and len(axis) == 1:
        return int(axis[0])
    channels_first = isinstance(module, _NormBase | nn.GroupNorm) or type(module).__name__.endswith("2d")
    return 1 if kind in ("batch", "instance", "group") or channels_first else -1


def is_lazy(site: Site) -> bool:
    """Whether the site is a lazy layer that has not yet seen an input."""
    return isinstance(site.module, LazyModuleMixin) and bool(cast(Any, site.module).has_uninitialized_params())


def has_idle_children(site: Site) -> bool:
    """Whether torch's own SyncBatchNorm, whose forward calls no child, has one that does something: a lost activation."""
    plain = type(site.module) is nn.SyncBatchNorm
    return plain and not site.module._forward_hooks and any(type(m) is not nn.Identity for m in site.module.children())


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer is; the CPU for a model without any."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device
