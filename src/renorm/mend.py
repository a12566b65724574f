"""What a finding's fix is: a small change at some sites, made whole or not at all, and undone exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from renorm.calls import Caller
from renorm.errors import UsageError
from renorm.freeze import freeze_
from renorm.moments import Moments
from renorm.recalibrate import recalibrate_
from renorm.sites import Site, device_of, find_sites
from renorm.state import Undo
from renorm.surgery import convert_

if TYPE_CHECKING:
    from renorm.profile import Profile

__all__ = [
    "Fix",
    "Undoable",
    "at_sites",
    "calling_children",
    "converting",
    "count_",
    "freezing",
    "holding",
    "reestimating",
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
        sites = {site.name: site for site in find_sites(model)}
        missing = [name for name in names if name not in sites]
        if missing:
            raise UsageError(
                f"{label} was to be done at {missing[0] or 'the model itself'!r}, and {type(model).__name__} has no such "
                "norm layer; give the model that was diagnosed, or a copy of it."
            )
        undo = Undo(label, {name: sites[name].module for name in names}, parameters=True)
        try:
            for name in names:
                change_(sites[name])
        except BaseException:
            undo.restore_()
            raise
        return undo

    return fix_


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
        sites = {site.name: site for site in find_sites(model)}
        missing = [name for name in names if name not in sites]
        if missing:
            raise UsageError(
                f"calling the children of {missing[0] or 'the model itself'!r} was asked for, and {type(model).__name__} has "
                "no such norm layer; give the model that was diagnosed, or a copy of it."
            )
        return Called(tuple(sites[name].module.register_forward_hook(_call_children) for name in names))

    return fix_


def _call_children(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    for child in module.children():
        output = child(output)
    return output


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
