"""Re-estimate a model's batch norm statistics on target batches: no labels, no gradients, undone exactly."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from renorm.calls import Caller, Forward, Output, several_passes
from renorm.errors import BatchError, UsageError
from renorm.evaluate import METRICS, Outputs, collect
from renorm.faces import Faces
from renorm.methods.base import Method, build
from renorm.moments import Moments
from renorm.observation import Observation
from renorm.profile import Profile
from renorm.said import say
from renorm.shift import Shift
from renorm.sites import Site, batch_sites, select
from renorm.state import Undo
from renorm.trust import Trust, trust

UNCHECKED = say("no check was asked for")


@dataclass(frozen=True, kw_only=True)
class Adaptation(Faces):
    """A change that `recalibrate_` made, or found it better not to make.

    method      what was used, with its options
    accepted    False where `check=` found the model worse: it then holds its source statistics again
    why         the reason for that, in words
    samples     how many samples were read, each counted once
    unvisited   sites that no batch reached: untouched
    shifts      {site: how far the target's moments lie from the source's statistics}
    weights     {site: the share of the source in what it holds now}
    trust       the verdict of an unlabelled check; None without one
    notes       what else the user should know
    """

    method: Method
    accepted: bool
    why: str
    samples: int
    passes: int
    unvisited: tuple[str, ...]
    shifts: Mapping[str, Shift]
    weights: Mapping[str, float]
    trust: Trust | None
    notes: tuple[str, ...]
    undo: Undo

    def restore_(self) -> None:
        """Give the model the statistics it held before, bit for bit; a second call does nothing.

        Raises OpenChange where a later change at the same sites still stands.
        """
        self.undo.restore_()


def recalibrate_(
    model: nn.Module,
    batches: Iterable[Any] | Observation,
    prior: int | Literal["auto"] = "auto",
    tolerance: float | None = None,
    check: Iterable[Any] | None = None,
    source: Profile | str | os.PathLike[str] | None = None,
    *,
    method: str = "auto",
    options: Mapping[str, Any] | None = None,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    forward: Forward | None = None,
    output: Output | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
) -> Adaptation:
    """Let every batch norm of `model` hold statistics that fit `batches`; weights, affine parameters and modes stay.

    batches     unlabelled batches; or moments of them, as `observe(model, batches, under="batch")` gives and
                `Observation.load` reads, of this very model: no data are needed then
    prior       how much the source counts: "auto", or as many images as this; see `methods.pooled.Pooled`
    tolerance   stop reading once every site is this certain (standard error of the mean, in source sd)
    check       batches on which the model must not do worse, by accuracy where they have labels, by `trust` where not;
                where it does, the source's statistics are put back and `.accepted` is False
    source      a profile of the source (`renorm.profile`, or its file): target and source are then compared at equal label
                mix, which is safe where the target's classes are mixed differently; see `methods.equal_mix.EqualMix`
    method      a name of the catalogue, with `options` for its fields; "auto": "equal_mix" with a source, else "pooled"

    A failure at any point leaves the model bit-identical. Sites without statistics, or that no batch reached, stay untouched;
    so do layers whose statistics are part of what the model was trained for (`PosteriorNorm`), with a note in `.notes`,
    unless a pattern of `include` other than "*" names them.
    Raises NoBatchNorm for a model without batch norm statistics, BatchError for batches that cannot be used (none, a single
    image, numbers that are not finite), OneShot for an iterator where several passes are needed, ModelError for moments of
    another model, UsageError for options that make no sense together.
    """
    caller = Caller(forward=forward, output=output, device=device, autocast=autocast, channels_last=channels_last)
    sites, apart = _chosen(model, include, exclude)
    profile = source if isinstance(source, Profile) or source is None else Profile.load(source)
    measured = batches if isinstance(batches, Observation) else None
    chosen = _method(method, prior, tolerance, profile if measured is None else None, options)
    before = None
    if check is not None:
        several_passes(check, asked="check=")
        before = collect(model, check, caller=caller, asked="check=")
    if measured is None:
        estimate = chosen.estimate(model, batches, sites=sites, caller=caller, source=profile)
    else:
        measured.check(model)
        _refuse_stale(measured, sites)
        estimate = chosen.estimate_from(measured, sites=sites, source=profile)
    if estimate.samples < 2:
        raise BatchError(
            "recalibrate_ was given one image in all; how far its statistics are to be believed cannot be known from one. "
            "Pass at least two, better 32."
        )
    undo = Undo("recalibrate_", {site.name: site.module for site in sites})
    try:
        held = {site.name: site.statistics() for site in sites}
        shifts = {
            name: Shift.between(known, estimate.target[name])
            for name, known in held.items()
            if known and name in estimate.target
        }
        accepted, verdict = True, None
        why: str = UNCHECKED
        if check is not None and before is not None:
            unlabelled = before.labels is None
            judged = estimate.unblended if unlabelled and estimate.unblended is not None else estimate.moments
            _write(sites, judged, estimate.batches)
            after = collect(model, check, caller=caller, asked="check=")
            accepted, why, verdict = _judge(before, after, profile, shifts)
        if accepted:
            _write(sites, estimate.moments, estimate.batches)
        else:
            undo.restore_()
    except BaseException:
        undo.restore_()
        raise
    return Adaptation(
        method=chosen,
        accepted=accepted,
        why=why,
        samples=estimate.samples,
        passes=estimate.passes,
        unvisited=estimate.unvisited,
        shifts=shifts,
        weights=dict(estimate.weights),
        trust=verdict,
        notes=(*estimate.notes, *apart),
        undo=undo,
    )


def _chosen(
    model: nn.Module, include: str | Sequence[str], exclude: str | Sequence[str]
) -> tuple[list[Site], tuple[str, ...]]:
    """The sites to recalibrate, and notes on those whose layer says that it stays, unless a pattern names them."""
    sites = select(batch_sites(model, asked="recalibrate_"), include=include, exclude=exclude)
    if not sites:
        raise UsageError(
            f"recalibrate_ was asked to touch {include!r} without {exclude!r}, and no batch norm is left by that."
        )
    named = [pattern for pattern in ([include] if isinstance(include, str) else include) if pattern != "*"]
    staying = [site for site in sites if getattr(site.module, "stays", "") and not select([site], include=named)]
    if len(staying) == len(sites):
        raise UsageError(
            f"recalibrate_ found only layers that it leaves alone ({', '.join(repr(site.name) for site in staying[:3])}): "
            f"{cast(Any, staying[0].module).stays}. Name them with include= to move them all the same."
        )
    notes = [
        say(
            "{site!r} was left alone: {reason}. Name it with include= to move it all the same.",
            site=site.name,
            reason=cast(Any, site.module).stays,
        )
        for site in staying
    ]
    return [site for site in sites if site not in staying], tuple(notes)


def _method(
    name: str, prior: Any, tolerance: Any, profile: Profile | None, options: Mapping[str, Any] | None
) -> Method:
    given = dict(options or {})
    if name == "auto":
        name = "pooled" if profile is None or prior != "auto" or tolerance is not None else "equal_mix"
    if prior != "auto":
        given.setdefault("prior", prior)
    if tolerance is not None:
        given.setdefault("tolerance", tolerance)
    return build(name, given)


def _refuse_stale(seen: Observation, sites: list[Site]) -> None:
    """What a layer sees while those before it hold old statistics is not what it will see once they hold new ones."""
    reached = [site.name for site in sites if site.name in seen]
    if seen.under == "running" and len(reached) > 1:
        raise UsageError(
            f"moments measured under='running' were to be written at {len(reached)} sites at once. Each was seen behind "
            "layers that still held the old statistics, so together they do not fit. Observe with under='batch', or write "
            "the first site alone with include=, and observe again."
        )


def _write(sites: list[Site], moments: Mapping[str, Moments], batches: int) -> None:
    for site in sites:
        found = moments.get(site.name)
        if found is None:
            continue
        site.write_(found)
        if not all(bool(torch.isfinite(held).all()) for held in site.tensors or ()):
            raise BatchError(
                f"the statistics measured at {site.name!r} are not finite: activations overflow on these batches. "
                "Check the inputs' scale, or run in float32."
            )
        counter = getattr(site.module, "num_batches_tracked", None)
        if isinstance(counter, torch.Tensor):
            counter.data.fill_(batches)  # what momentum=None goes on averaging from


def _judge(
    before: Outputs, after: Outputs, profile: Profile | None, shifts: Mapping[str, Shift]
) -> tuple[bool, str, Trust | None]:
    if before.labels is not None:
        labels = before.labels
        was, now = (METRICS["accuracy"](logits, labels) for logits in (before.logits, after.logits))
        why = say(
            "on {count} labelled check samples accuracy went from {was:.1%} to {now:.1%}",
            count=len(labels),
            was=was,
            now=now,
        )
        if now != was:
            return now > was, why, None
        was, now = (METRICS["nll"](logits, labels) for logits in (before.logits, after.logits))
        nll = say("{why}, and the mean negative log likelihood from {was:.3g} to {now:.3g}", why=why, was=was, now=now)
        return now <= was, nll, None
    moved = sum(shift.moved for shift in shifts.values()) / max(1, len(shifts))
    strict = profile is not None and profile.is_uneven
    verdict = trust(before.logits, after.logits, source=profile, moved=moved, strict=strict)
    return verdict.better, verdict.why, verdict
