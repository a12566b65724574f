"""What a finding's fix is: a small change at some sites, made whole or not at all, and undone exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from renorm.calls import Caller
from renorm.errors import UsageError
from renorm.freeze import freeze_
from renorm.groups import Regrouped, scheduled
from renorm.moments import Moments
from renorm.recalibrate import recalibrate_
from renorm.sites import Site, device_of, find_sites, unwrap
from renorm.state import Undo
from renorm.surgery import convert_

if TYPE_CHECKING:
    from renorm.profile import Profile

__all__ = [
    "Fix",
    "Undoable",
    "Without",
    "at_sites",
    "calling_children",
    "converting",
    "count_",
    "freezing",
    "holding",
    "putting_aside",
    "reestimating",
    "regrouping",
    "setting",
    "slowing",
    "widen_",
    "writing",
]


class Undoable(Protocol):
    """What a fix returns: `restore_()` gives the model back as it was before the fix."""

    def restore_(self) -> None: ...


Fix = Callable[[nn.Module], Undoable]


def at_sites(names: Sequence[str], change_: Callable[[Site], None], *, label: str) -> Callable[[nn.Module], Undo]:
    """A fix that makes `change_` at every site in `names`, of whatever model it is given; any failure undoes all of it.

    The fix raises UsageError for a model that lacks one of the sites.
    """

    def fix_(model: nn.Module) -> Undo:
        sites = _found(model, names, label)
        undo = Undo(label, {name: sites[name].module for name in names}, parameters=True)
        try:
            for name in names:
                change_(sites[name])
        except BaseException:
            undo.restore_()
            raise
        return undo

    return fix_


def _found(model: nn.Module, names: Iterable[str], label: str) -> dict[str, Site]:
    sites = {site.name: site for site in find_sites(model)}
    missing = [name for name in names if name not in sites]
    if missing:
        raise UsageError(
            f"{label} was to be done at {missing[0] or 'the model itself'!r}, and {type(model).__name__} has no such "
            "norm layer; give the model that was diagnosed, or a copy of it."
        )
    return sites


def setting(names: Sequence[str], *, label: str, **values: Any) -> Fix:
    """A fix that gives every module at `names` these attributes, such as `momentum=0.1` or `training=False`."""

    def set_(site: Site) -> None:
        for name, value in values.items():
            setattr(site.module, name, value)

    return at_sites(names, set_, label=label)


def freezing(site: Site) -> Fix | None:
    """A fix that holds the statistics of a site through every `train()`; None for one of several places in one module."""
    if site.slot is not None:
        return None
    return lambda model: freeze_(model, statistics=True, affine=False, include=[escape(site.name)])


def holding(names: Sequence[str]) -> Fix:
    """A fix that holds the statistics of these sites, and every other place of their modules, through every `train()`."""
    include = [pattern for name in names for pattern in _whole_module(name)]
    return lambda model: freeze_(model, statistics=True, affine=False, include=include)


def _whole_module(name: str) -> tuple[str, ...]:
    own, slotted, _ = name.partition("@")
    return (escape(own) + "@*",) if slotted else (escape(own),)


def slowing(names: Sequence[str], times: int) -> Fix:
    """A fix that lets `times` updates weigh as much as one did: momentum becomes `1 − (1 − momentum)^(1/times)`."""

    def slow_(site: Site) -> None:
        momentum = site.momentum
        if momentum is not None:
            vars(site.module)["momentum"] = 1 - (1 - momentum) ** (1 / times)

    return at_sites(names, slow_, label="slowing the statistics")


def writing(values: Mapping[str, Moments], *, label: str) -> Fix:
    """A fix that lets the sites hold these statistics, as they were held before."""

    def write_(site: Site) -> None:
        held = values[site.name]
        for tensor, value in zip(site.tensors or (), (held.mean, held.var), strict=True):
            tensor.data.copy_(value)

    return at_sites(list(values), write_, label=label)


def converting(names: Sequence[str], to: str) -> Fix:
    """A fix that puts a layer of the catalogue, by its name, at these sites."""
    return lambda model: convert_(model, to, include=[escape(name) for name in names])


@dataclass(frozen=True)
class Called:
    """Layers that call their children; `restore_()` lets them forget it."""

    handles: tuple[RemovableHandle, ...]

    def restore_(self) -> None:
        """Take the calls away again; a second call does nothing."""
        for handle in self.handles:
            handle.remove()


def calling_children(names: Sequence[str]) -> Callable[[nn.Module], Called]:
    """A fix that lets every layer at `names` pass its output through its children, in their order; no key changes."""

    def fix_(model: nn.Module) -> Called:
        sites = _found(model, names, "calling children")
        return Called(tuple(sites[name].module.register_forward_hook(_call_children) for name in names))

    return fix_


def _call_children(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    for child in module.children():
        output = child(output)
    return output


Regrouping = Callable[[Sequence[Optimizer], Sequence[Tensor]], Regrouped]


def regrouping(names: Sequence[str], optimizers: Sequence[Optimizer], change_: Regrouping) -> Fix | None:
    """A fix that does `change_` to the groups of `optimizers` for what trains at these sites; None under a scheduler.

    The fix raises UsageError for a model that the optimisers do not train, such as a copy.
    """
    if scheduled(group for optimizer in optimizers for group in optimizer.param_groups):
        return None

    def fix_(model: nn.Module) -> Regrouped:
        sites = _found(model, names, "changing the optimiser's groups")
        inside = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        if inside.isdisjoint(map(id, unwrap(model).parameters())):
            raise UsageError(
                "the groups of an optimiser were to be changed, and it holds no parameter of this model: a copy of a model "
                "has an optimiser of its own. Give the model that was diagnosed."
            )
        affine = {id(p): p for name in names for p in sites[name].affine.values() if p.requires_grad}
        return change_(optimizers, list(affine.values()))

    return fix_


@dataclass(frozen=True)
class Aside:
    """Gradients that were put aside; `restore_()` puts them back where none has come since."""

    grads: tuple[tuple[Tensor, Tensor], ...]

    def restore_(self) -> None:
        """Put the gradients back; a second call does nothing."""
        for parameter, grad in self.grads:
            if parameter.grad is None:
                parameter.grad = grad


def putting_aside(names: Sequence[str]) -> Callable[[nn.Module], Aside]:
    """A fix that takes the gradients of frozen parameters at these sites away, so that no optimiser moves them."""

    def fix_(model: nn.Module) -> Aside:
        sites = _found(model, names, "putting gradients aside")
        frozen = [p for name in names for p in sites[name].affine.values() if not p.requires_grad]
        grads = tuple((p, p.grad) for p in frozen if p.grad is not None)
        for parameter, _ in grads:
            parameter.grad = None
        return Aside(grads)

    return fix_


def count_(site: Site) -> None:
    """Let the counter of batches be an integer, and no less than 1 where statistics are held."""
    old = getattr(site.module, "num_batches_tracked", None)
    value = 1 if not isinstance(old, Tensor) else max(1, round(float(old)))
    site.module._buffers["num_batches_tracked"] = torch.tensor(value, dtype=torch.long, device=device_of(site.module))


def widen_(site: Site) -> None:
    """Let a layer hold its statistics and affine in float32, which batch norm takes beside inputs of half precision."""
    for held in cast(list[dict[str, Any]], [site.module._buffers, site.module._parameters]):
        for name, tensor in list(held.items()):
            if isinstance(tensor, Tensor) and tensor.dtype in (torch.float16, torch.bfloat16):
                wide = tensor.detach().float()
                # a new tensor, so that undoing puts the old one back, type and all
                held[name] = nn.Parameter(wide, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else wide


def reestimating(
    names: Sequence[str],
    batches: Iterable[Any],
    caller: Caller,
    *,
    prior: int | Literal["auto"],
    source: Profile | None = None,
) -> Fix:
    """A fix that recalibrates the sites in `names` on `batches`, which it reads again."""

    def fix_(model: nn.Module) -> Undo:
        asked = [escape(name) for name in names]
        # where the source counts for nothing it may be NaN, and nothing times NaN is NaN
        undo = at_sites(names, _forget_ if prior == 0 else _leave_, label="re-estimating")(model)
        try:
            recalibrate_(model, batches, prior=prior, source=source, include=asked, **vars(caller)).undo.close()
        except BaseException:
            undo.restore_()
            raise
        return undo

    return fix_


def _forget_(site: Site) -> None:
    for tensor, value in zip(site.tensors or (), (0.0, 1.0), strict=False):
        tensor.data.fill_(value)


def _leave_(site: Site) -> None:
    pass


class Without:
    """Batches that can be read again, without those of some numbers."""

    def __init__(self, batches: Iterable[Any], without: Mapping[int, Exception]) -> None:
        self._batches = batches
        self._without = without

    def __iter__(self) -> Iterator[Any]:
        return (batch for index, batch in enumerate(self._batches) if index not in self._without)
