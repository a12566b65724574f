"""Replace a model's batch norms by layers of the catalogue, and put the very modules back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.errors import UnknownName, UsageError
from renorm.layers.base import BatchNormTensors, Layer, Tracking, catalogue, checked_options
from renorm.layers.per_domain import PerDomain
from renorm.moments import TINY
from renorm.sites import Site, Slotted, batch_sites, find_sites, is_lazy, select, unwrap
from renorm.state import Undo

# How far two evaluations may part on the probe and still agree, beside their largest value; arithmetic differs in its order.
AGREE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
BATCH_NORM = ("running_mean", "running_var", "num_batches_tracked", "weight", "bias")
PLAIN: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
)  # what `to="batch"` leaves alone, and goes back to


def convert_(
    model: nn.Module,
    to: str,
    *,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    domain: str | int | None = None,
    **options: Any,
) -> Conversion:
    """Put a layer of the catalogue, by its name, where each batch norm of `model` stands; the tensors stay the same objects.

    Parameters and statistics, device, dtype, mode, momentum, eps, hooks and the activation of a layer that ends in one are
    kept; a module that stands at several places is one module there again. `to="batch"` goes back: a layer that came
    from a batch norm of torch's is one again, with the values it has now; of layers with several domains `domain` says which.

    Every layer is tried before the model is touched: on a probe of the statistics it holds, in evaluation, the batch norm that
    was read must give what the old layer gave, and the new layer too where its class promises it (`keeps`).

    Raises UnknownName for a layer or option that there is not; NoBatchNorm for a model without batch norm that holds
    statistics; UsageError where a layer cannot be replaced without losing something, in words. The model is then untouched.
    """
    if to not in catalogue():
        raise UnknownName("layer", to, catalogue())
    kind = catalogue()[to]
    checked_options(kind, options)
    model = unwrap(model)
    places, kept = _places(model, to, include, exclude)
    conversion = Conversion(places, kept)
    try:
        for place in places:
            held = _held(place.module, domain)
            new = _made(place, kind, options, held)
            conversion.add_(place, new, distance=_agreeing(place, new, held, domain))
    except BaseException:
        conversion.abandon_()
        raise
    conversion.link_(model)
    return conversion


@dataclass(frozen=True)
class Place:
    """An old layer, and how it is called."""

    name: str
    module: nn.Module
    axis: int
    eps: float


class Conversion:
    """What `convert_` did. `restore_()` puts the old modules back, with every bit they held.

    converted   the names of the places that hold a new layer
    kept        {name: why a batch norm stayed as it was}
    distance    {name: how far the new layer is, in evaluation, from the old one}: the root mean square of the difference on
                a probe drawn from the statistics held, relative to that of the old layer's output
    """

    def __init__(self, places: Sequence[Place], kept: Mapping[str, str]) -> None:
        self.converted: tuple[str, ...] = tuple(place.name for place in places)
        self.kept: dict[str, str] = dict(kept)
        self.distance: dict[str, float] = {}
        self._layers: dict[str, tuple[nn.Module, nn.Module]] = {}
        self._links: list[tuple[nn.Module, str, nn.Module]] = []
        self._old = Undo("convert_", {place.name: place.module for place in places}, parameters=True)
        self._new: Undo | None = None

    def add_(self, place: Place, new: nn.Module, *, distance: float) -> None:
        """Remember `new` for this place."""
        self.distance[place.name] = distance
        self._layers[place.name] = (place.module, new)

    def link_(self, model: nn.Module) -> None:
        """Let the new layers stand in the model."""
        made = {id(old): new for old, new in self._layers.values()}
        for parent in list(model.modules()):
            for key, child in list(parent._modules.items()):
                if child is not None and id(child) in made:
                    self._links.append((parent, key, child))
                    parent._modules[key] = made[id(child)]
        self._new = Undo("convert_", {name: new for name, (_, new) in self._layers.items()})

    def restore_(self) -> None:
        """Undo the conversion; a second call does nothing.

        Raises OpenChange where a later change at the same places still stands.
        """
        if self._new is not None and self._new.is_open:
            self._new.restore_()
            for parent, key, old in self._links:
                parent._modules[key] = old
            self._old.restore_()

    def settle_(self) -> None:
        """Put the old modules back, holding what the new ones hold now; a second call does nothing.

        Of a layer with several sets of statistics the first is kept. There is nothing to undo any more.
        """
        if self._new is None or not self._new.is_open:
            return
        with torch.no_grad():
            for old, new in self._layers.values():
                for key, tensor in zip(BATCH_NORM, _held(new, 0), strict=True):
                    own = getattr(old, key, None)
                    if isinstance(own, Tensor) and tensor is not None and own is not tensor:
                        own.copy_(tensor)
        for parent, key, old in self._links:
            parent._modules[key] = old
        self._new.close()
        self._old.close()

    def abandon_(self) -> None:
        """Give the old layers back whole, before any new one stands."""
        self._old.restore_()


def _places(
    model: nn.Module, to: str, include: str | Sequence[str], exclude: str | Sequence[str]
) -> tuple[list[Place], dict[str, str]]:
    """What is to be replaced, each module once, and what stays with the reason."""
    batch_sites(model, asked="convert_")
    whole = [replace(site, name=_without_slot(site), slot=None) for site in find_sites(model) if site.kind == "batch"]
    chosen = {id(site.module): site for site in select(whole, include=include, exclude=exclude)}
    if not chosen:
        raise UsageError(
            f"convert_ was asked for the places {include!r} without {exclude!r}, and no batch norm is among them."
        )
    places, kept = [], {}
    for site in chosen.values():
        if to == "batch" and (type(site.module) in PLAIN or type(site.module) is catalogue()["batch"]):
            kept[site.name] = "it is plain batch norm already"
        elif site.tensors is None and not isinstance(site.module, Slotted) and not is_lazy(site):
            kept[site.name] = "it holds no statistics"
        else:
            _refuse_what_would_be_lost(site)
            places.append(Place(site.name, site.module, getattr(site.module, "axis", site.axis), site.eps))
    return places, kept


def _without_slot(site: Site) -> str:
    return site.name if site.slot is None else site.name.removesuffix(f"@{site.slot}")


def _refuse_what_would_be_lost(site: Site) -> None:
    module, name = site.module, site.name
    if not name:
        raise UsageError(
            "convert_ replaces layers inside a model, and this model is itself the batch norm; put it in an nn.Sequential."
        )
    if is_lazy(site):
        raise UsageError(
            f"the layer at {name!r} is lazy and has seen no input yet; run the model on one batch, then convert it."
        )
    if "train" in module.__dict__:
        raise UsageError(
            f"the layer at {name!r} is frozen (its train() is its own); unfreeze it, convert, and freeze again."
        )
    if isinstance(module, Layer):
        return
    if hasattr(module, "moving_variance"):
        raise UsageError(
            f"the layer at {name!r} is Keras' own, whose graph calls it by name; leave it out with exclude=."
        )
    if isinstance(module, Slotted):
        raise UsageError(
            f"the layer at {name!r}, {type(module).__name__}, holds several sets of statistics; leave it out."
        )
    parts = [key for key, _ in module.named_children() if key not in ("act", "drop")]
    if parts:
        raise UsageError(
            f"the layer at {name!r}, {type(module).__name__}, holds parts that a conversion would drop ({', '.join(parts)}); "
            "leave it out with exclude=."
        )


def _made(place: Place, kind: type[Layer], options: Mapping[str, Any], held: BatchNormTensors) -> nn.Module:
    """The new layer for a place, holding the old one's tensors."""
    old = place.module
    common = {
        "eps": place.eps,
        "affine": held.weight is not None or held.bias is not None,
        "device": held.mean.device,
        "dtype": held.mean.dtype,
    }
    if hasattr(old, "momentum"):
        common["momentum"] = old.momentum
    origin = type(old) if type(old) in PLAIN else getattr(old, "origin", None)
    act = _activation(old)
    if kind is catalogue()["batch"] and origin is not None and act is None:
        new: Any = origin(held.mean.numel(), **common)
        for key, tensor in zip(BATCH_NORM, held, strict=True):
            setattr(new, key, tensor)
    else:
        common |= {"act": act, "axis": place.axis}
        if not issubclass(kind, Tracking):
            common.pop("momentum", None)
        new = kind(held.mean.numel(), **common, **options)
        new.take_(held)
        new.site, new.origin = place.name, origin
        if isinstance(drop := getattr(old, "drop", None), nn.Module) and not isinstance(drop, nn.Identity):
            new.drop = drop
    if isinstance(getattr(old, "track_running_stats", None), bool):
        new.track_running_stats = old.track_running_stats
    for module in new.modules():
        module.training = old.training
    for hooks in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
    ):
        new.__dict__[hooks] = old.__dict__[hooks]  # the same dicts, so that a handle still takes its hook away
    return cast(nn.Module, new)


def _held(old: nn.Module, domain: str | int | None) -> BatchNormTensors:
    if isinstance(old, Tracking):
        plain: Callable[..., BatchNormTensors] = old.plain
        return plain(domain) if "domain" in inspect.signature(plain).parameters else plain()
    module = cast(Any, old)
    mean, var = module.running_mean, module.running_var
    tracked = getattr(module, "num_batches_tracked", None)
    if not isinstance(tracked, Tensor):
        tracked = torch.zeros((), dtype=torch.long, device=mean.device)
    return BatchNormTensors(mean, var, tracked, _parameter(module, "weight"), _parameter(module, "bias"))


def _parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    tensor = getattr(module, name, None)  # a frozen copy keeps it as a buffer
    return (
        nn.Parameter(tensor.detach().clone())
        if isinstance(tensor, Tensor) and name not in module._parameters
        else tensor
    )


def _activation(old: nn.Module) -> Any:
    act = getattr(old, "act", None)
    return None if isinstance(act, nn.Identity) else act


def _agreeing(place: Place, new: nn.Module, held: BatchNormTensors, domain: str | int | None) -> float:
    """The distance of the new layer from the old one on a probe; refuses one that would change what it promises to keep."""
    old = place.module
    with torch.no_grad():
        probe, wanted, got = _probed(place, new, held, domain)
        first = probe.movedim(place.axis, 1)
        plain = F.batch_norm(first, held.mean, held.var, held.weight, held.bias, False, 0.0, place.eps)
        plain = plain.movedim(1, place.axis)
        act = _activation(old)
        plain = plain if act is None else act(plain)
    # a layer that mixes in the batch is no batch norm in evaluation, so each is held to the batch norm between the two
    pairs = [(plain, wanted)] if getattr(old, "keeps", True) else []
    pairs += [(got, plain)] if getattr(new, "keeps", True) else []
    limit = AGREE.get(probe.dtype, 1e-4) * (1 + float(wanted.abs().max()))
    apart = max((float((a - b).abs().max()) for a, b in pairs), default=0.0)
    if not apart <= limit:
        raise UsageError(
            f"the layer at {place.name!r}, {type(old).__name__}, would not be the same after the conversion: in evaluation its "
            f"output moves by up to {apart:.3g}. It does something besides normalising, such as an activation that is not its "
            "part `act`; leave it out with exclude=."
        )
    return float((got - wanted).float().norm() / wanted.float().norm().clamp_min(TINY))


def _probed(
    place: Place, new: nn.Module, held: BatchNormTensors, domain: str | int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Values as the statistics say they are, in a shape that both layers take, and what the old and the new give for them."""
    generator = torch.Generator().manual_seed(0)
    mean, sd = (torch.nan_to_num(t.float().cpu()) for t in (held.mean, held.var.clamp_min(0).sqrt()))
    for shape in ((8, 3, 3), (8,), (8, 3), (8, 2, 2, 2)):
        probe = (torch.randn(*shape, mean.numel(), generator=generator) * sd + mean).to(held.mean)
        probe = probe.movedim(-1, place.axis) if len(shape) > 1 else probe
        try:
            return probe, _evaluated(place.module, probe, domain), _evaluated(new, probe, None)
        except (ValueError, RuntimeError, IndexError):
            continue  # another rank
    raise UsageError(
        f"the layer at {place.name!r}, {type(place.module).__name__}, could not be run by itself on (N, C), (N, C, L), "
        "(N, C, H, W) or (N, C, D, H, W), so what a conversion keeps cannot be told; leave it out with exclude=."
    )


def _evaluated(layer: nn.Module, x: Tensor, domain: str | int | None) -> Tensor:
    """What a layer gives in evaluation, whatever mode it is in, without its hooks."""
    modes = [(module, module.training) for module in layer.modules()]
    try:
        for module, _ in modes:
            module.training = False
        more = ([domain or 0] * len(x),) if isinstance(layer, PerDomain) else ()
        return torch.nan_to_num(cast(Any, layer).forward(x, *more))
    finally:
        for module, mode in modes:
            module.training = mode
