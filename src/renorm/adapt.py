"""Begin online adaptation: a model, a method by name, what is known of the source, and a guard."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from renorm.calls import Caller, Forward, Output, several_passes
from renorm.errors import NoBatchNorm
from renorm.guard import Guard
from renorm.online.base import Subject, build
from renorm.profile import Profile, profile
from renorm.sites import find_sites, unwrap
from renorm.stream import Stream


def adapt_(
    model: nn.Module,
    method: str = "shrink",
    source: Profile | str | os.PathLike[str] | Iterable[Any] | None = None,
    *,
    guard: Guard | bool = True,
    forward: Forward | None = None,
    output: Output | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
    **options: Any,
) -> Stream:
    """A stream on `model`: every call answers a batch and learns from it, whatever the batch size and the caller's mode.

    method   a name of the catalogue in `renorm.online`, with `options` for its fields
    source   what is known of the source: a profile, its file, or labelled batches of which one is made
    guard    True: a `Guard` with its defaults; False: every answer is the adapted model's

    Raises NoBatchNorm where the method needs batch norm with statistics and the model has none; UsageError for a source the
    method needs and did not get, or options that make no sense; UnknownName for another method or option.
    """
    caller = Caller(forward=forward, output=output, device=device, autocast=autocast, channels_last=channels_last)
    chosen = build(method, options)
    model = unwrap(model)
    found = find_sites(model)
    sites = tuple(
        s for s in found if s.kind == "batch" and s.tensors is not None and not getattr(s.module, "stays", "")
    )
    norms = tuple(s for s in found if s.affine)
    if not sites and not (chosen.any_norm and norms):
        kinds = ", ".join(sorted({s.kind for s in found})) or "none"
        raise NoBatchNorm(
            f"the online method {method!r} needs batch norm that holds statistics; {type(model).__name__} has norm layers "
            f"of kind {kinds}. Methods that train scale and shift also work on layer and group norm: tent, eata, rdumb, roid."
        )
    known, home = _source(model, source, caller)
    if known is not None:
        known.check(model)
    subject = Subject(model=model, sites=sites, norms=norms, caller=caller, source=known, home=home)
    watch = guard if isinstance(guard, Guard) else Guard() if guard else None
    return Stream(subject, chosen, watch)


def _source(
    model: nn.Module, source: Profile | str | os.PathLike[str] | Iterable[Any] | None, caller: Caller
) -> tuple[Profile | None, Callable[[], Iterable[Any]] | None]:
    if source is None or isinstance(source, Profile):
        return source, None
    if isinstance(source, str | os.PathLike):
        return Profile.load(source), None
    batches = several_passes(source, asked="source=")
    if not any(site.kind == "batch" and site.tensors is not None for site in find_sites(model)):
        return None, lambda: batches
    return profile(model, batches, **vars(caller)), lambda: batches
