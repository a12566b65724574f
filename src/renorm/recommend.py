"""Which way to make a model fit these data: every candidate tried on one half of them, judged on the other, and ranked.

Labels decide where there are any. Without them `trust` says whether re-estimated statistics are to be believed at all, and
the order among those that are is the one that `renorm bench recalibrate` found: nothing in unlabelled data tells them apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from renorm.calls import Caller, Forward, Output, nonempty, read
from renorm.errors import BatchError, RenormError, UsageError
from renorm.evaluate import collect
from renorm.faces import Faces
from renorm.facts import Facts
from renorm.finetune import finetune_
from renorm.mend import Undoable
from renorm.profile import Profile
from renorm.recalibrate import recalibrate_
from renorm.said import Said, say
from renorm.sites import batch_sites
from renorm.state import Undo
from renorm.trust import Trust, trust

__all__ = ["Candidate", "Plan", "recommend"]

FEWEST = 32  # samples, so that each half has 16: with fewer a verdict is a coin's
TRAINS = 128  # labelled samples from which fine-tuning is tried
EPOCHS = 3
# How a candidate stands without labels: the errors of `renorm bench recalibrate`, all images, both networks.
ORDER = ("recalibrate with the profile", "recalibrate", "recalibrate, source forgotten")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to make the model fit, and what trying it gave.

    verb      "leave", "recalibrate_" or "finetune_", called with `options`
    value     share of right answers on samples that it had not seen; None without labels
    gain      by how much that is more than the model as it is, and `error` its standard error; None without labels
    trust     without labels: whether the model so changed is believed; None where it was not asked
    seconds   what trying it took
    why       in words
    """

    name: Said
    verb: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    value: float | None = None
    gain: float | None = None
    error: float | None = None
    trust: Trust | None = None
    seconds: float = 0.0
    why: Said = field(default_factory=lambda: Said(""))


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan(Faces):
    """What to do with a model on these data.

    ranking   the candidates that were tried, best first
    left_out  those that were not, and why
    best      the first of `ranking`
    why       the reason for it, in words
    samples   how many samples were read
    labelled  whether labels decided
    """

    ranking: tuple[Candidate, ...]
    left_out: Mapping[str, Said]
    why: Said
    samples: int
    labelled: bool
    batches: Sequence[Any] = field(repr=False)
    labels: Sequence[Tensor] | None = field(repr=False)
    caller: Caller = field(repr=False)

    @property
    def best(self) -> Candidate:
        """The candidate that was found best."""
        return self.ranking[0]

    def apply_(self, model: nn.Module) -> Undoable:
        """Do what was found best, on all the batches; `restore_()` of what comes back undoes it bit for bit."""
        return _do_(self.best, model, self.batches, self.labels, self.caller)

    def __str__(self) -> str:
        return "\n".join(f"{place}. {each.name}: {each.why}" for place, each in enumerate(self.ranking, start=1))

    __repr__ = __str__


def recommend(
    model: nn.Module,
    batches: Iterable[Any],
    labels: Tensor | Sequence[int] | None = None,
    budget: float = 60.0,
    *,
    source: Profile | None = None,
    forward: Forward | None = None,
    output: Output | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
) -> Plan:
    """Try ways to make `model` fit on half of `batches`, judge them on the other half, both ways round; it stays as it was.

    labels   the classes of all samples in order; None: those that ride in the batches, if every batch has them
    budget   seconds: a candidate that would exceed it is left out, and said to be; leaving the model and recalibrating are
             always tried
    source   a profile of the source, which adds recalibration at equal class mix

    A change is put first only where it is better than leaving the model by more than chance (a standard error, with labels),
    or believed (`trust`, without).
    Raises BatchError for fewer than 32 samples or two batches, UsageError for labels that do not fit, NoBatchNorm for a model
    without batch norm statistics.
    """
    if not budget > 0:
        raise UsageError(f"budget is a number of seconds above 0; got {budget!r}.")
    batch_sites(model, asked="recommend")
    caller = Caller(forward=forward, output=output, device=device, autocast=autocast)
    held = [batch for _, batch in nonempty(batches, asked="recommend")]
    counts = [read(batch).samples for batch in held]
    if len(held) < 2 or sum(counts) < FEWEST:
        raise BatchError(
            f"recommend tries on one half of the batches and judges on the other, and needs {FEWEST} samples in two batches; "
            f"got {sum(counts)} in {len(held)}."
        )
    truth = _labels(labels, held, counts)
    start = perf_counter()
    wrong = _preprocessing(model, held, caller)
    if wrong is not None:
        leave = Candidate(name=say("leave it as it is"), verb="leave", why=wrong)
        return _plan((leave,), {}, held, truth, caller)
    tried: list[Candidate] = []
    left_out: dict[str, Said] = {}
    before = _tried(Candidate(name=say("leave it as it is"), verb="leave"), model, held, truth, caller)
    tried.append(_judged(before, before, truth))
    for candidate, always in _candidates(source, sum(counts), truth is not None):
        spent = perf_counter() - start
        if not always and spent + 2 * max(each.seconds for each in tried) > budget:
            left_out[candidate.name] = say("{spent:.0f} of {budget:.0f} seconds were spent", spent=spent, budget=budget)
            continue
        try:
            after = _tried(candidate, model, held, truth, caller)
        except RenormError as error:
            left_out[candidate.name] = say("does not run: {reason}", reason=str(error).partition("\n")[0][:200])
            continue
        tried.append(_judged(after, before, truth, source=source))
    return _plan(tuple(_ranked(tried, truth is not None)), left_out, held, truth, caller)


def _candidates(source: Profile | None, samples: int, labelled: bool) -> list[tuple[Candidate, bool]]:
    """What to try after leaving the model, and whether it is tried whatever the budget."""
    found = [(Candidate(name=say("recalibrate"), verb="recalibrate_"), True)]
    if source is not None:
        options: dict[str, Any] = {"source": source}
        found.append((Candidate(name=say("recalibrate with the profile"), verb="recalibrate_", options=options), True))
    forgotten = Candidate(name=say("recalibrate, source forgotten"), verb="recalibrate_", options={"prior": 0})
    found.append((forgotten, False))
    if labelled and samples >= TRAINS:
        options = {"policy": "auto", "head": "keep", "epochs": EPOCHS}
        found.append((Candidate(name=say("fine-tune"), verb="finetune_", options=options), False))
    return found


@dataclass(frozen=True)
class _Trial:
    """The answers (N, K) of a candidate on samples it had not seen, half by half, and how far its moments moved."""

    candidate: Candidate
    logits: Tensor
    moved: float
    seconds: float


def _tried(
    candidate: Candidate, model: nn.Module, held: Sequence[Any], truth: Sequence[Tensor] | None, caller: Caller
) -> _Trial:
    start = perf_counter()
    said: dict[int, Tensor] = {}
    moved: list[float] = []
    for half in (0, 1):
        mine = range(half, len(held), 2)
        undo = _do_(
            candidate, model, [held[i] for i in mine], None if truth is None else [truth[i] for i in mine], caller
        )
        try:
            shifts = getattr(undo, "shifts", {})
            moved += [sum(shift.moved for shift in shifts.values()) / max(1, len(shifts))]
            for i in range(1 - half, len(held), 2):
                logits = collect(model, [held[i]], caller=caller, asked="recommend").logits
                said[i] = logits.double() if logits.dim() == 2 else logits.double().flatten(1)
        finally:
            undo.restore_()
    return _Trial(candidate, torch.cat([said[i] for i in sorted(said)]), sum(moved) / 2, perf_counter() - start)


def _do_(
    candidate: Candidate, model: nn.Module, held: Sequence[Any], truth: Sequence[Tensor] | None, caller: Caller
) -> Undoable:
    if candidate.verb == "leave":
        return Undo("recommend", {})
    if candidate.verb == "recalibrate_":
        return recalibrate_(model, held, **candidate.options, **vars(caller))
    inputs = [_inputs(batch) for batch in held]
    assert truth is not None
    return finetune_(model, list(zip(inputs, truth, strict=True)), **candidate.options, **vars(caller))


def _judged(
    after: _Trial, before: _Trial, truth: Sequence[Tensor] | None, *, source: Profile | None = None
) -> Candidate:
    candidate = replace(after.candidate, seconds=after.seconds)
    if truth is not None:
        labels = torch.cat(list(truth))
        now, then = ((trial.logits.argmax(1) == labels).double() for trial in (after, before))
        value, gain = float(now.mean()), float((now - then).mean())
        error = float((now - then).std()) / math.sqrt(len(labels))
        why = say("{value:.1%} right on {count:,} samples it had not seen", value=value, count=len(labels))
        if candidate.verb != "leave":
            why = say("{why}, {gain:+.1f} ± {error:.1f} points", why=why, gain=100 * gain, error=100 * error)
        return replace(candidate, value=value, gain=gain, error=error, why=why)
    if candidate.verb == "leave":
        return replace(candidate, why=say("nothing is risked"))
    known = source if "source" in candidate.options else None
    verdict = trust(before.logits, after.logits, source=known, moved=after.moved)
    return replace(candidate, trust=verdict, why=say("{why}", why=verdict.why))


def _ranked(tried: Sequence[Candidate], labelled: bool) -> list[Candidate]:
    leave, *others = tried
    if labelled:
        others.sort(key=lambda each: -(each.value or 0.0))
        better = [each for each in others if (each.gain or 0.0) > (each.error or 0.0)]
    else:
        others.sort(key=lambda each: ORDER.index(each.name))
        better = [each for each in others if each.trust is not None and each.trust.better and each.trust.disagreement]
        judge = next((each for each in others if each.options.get("prior") == 0), None)
        # trust is sharpest on a model that holds target statistics alone: what it says of that one goes for the blend too
        if judge is not None and judge not in better:
            better = [each for each in better if "source" in each.options]
    return [*better, leave, *(each for each in others if each not in better)]


def _plan(
    ranking: tuple[Candidate, ...],
    left_out: Mapping[str, Said],
    held: Sequence[Any],
    truth: Sequence[Tensor] | None,
    caller: Caller,
) -> Plan:
    best = ranking[0]
    why = best.why
    if best.verb == "leave" and len(ranking) > 1:
        if truth is None:
            against = [each for each in ranking[1:] if each.trust is not None and not each.trust.better]
            why = say("no change is believed to be better; the nearest: {why}", why=(against or ranking[1:])[0].why)
        else:
            why = say("no change is better by more than chance; the nearest: {why}", why=ranking[1].why)
    elif truth is None and best.verb != "leave":
        why = say("{why}; that this is the best of those believed is what the benchmark found", why=best.why)
    samples = sum(read(batch).samples for batch in held)
    return Plan(
        ranking=ranking,
        left_out=left_out,
        why=why,
        samples=samples,
        labelled=truth is not None,
        batches=held,
        labels=truth,
        caller=caller,
    )


def _labels(
    given: Tensor | Sequence[int] | None, held: Sequence[Any], counts: Sequence[int]
) -> tuple[Tensor, ...] | None:
    """Class numbers batch by batch; None where there are none."""
    if given is None:
        riding = [read(batch).labels for batch in held]
        if any(part is None for part in riding):
            return None
        given = torch.cat([torch.as_tensor(part).reshape(-1) for part in riding])
    labels = torch.as_tensor(given).cpu()
    if labels.is_floating_point() or labels.dim() != 1 or len(labels) != sum(counts):
        raise UsageError(
            f"labels are one class number for each of the {sum(counts)} samples, in order; got {tuple(labels.shape)} of "
            f"{labels.dtype}. Leave them out to do without."
        )
    ends = [sum(counts[: place + 1]) for place in range(len(counts))]
    return tuple(labels[end - count : end].long() for end, count in zip(ends, counts, strict=True))


def _inputs(batch: Any) -> Any:
    call = read(batch)
    return call.args[0] if len(call.args) == 1 and not call.kwargs else (call.args or call.kwargs)


def _preprocessing(model: nn.Module, held: Sequence[Any], caller: Caller) -> Said | None:
    """What to correct first where the inputs are prepared wrongly: statistics that hide it would be worse than none."""
    facts = Facts(model, held, None, caller)
    if facts.suspect is not None:
        return say("the preprocessing looks wrong (renorm doctor, BN303): correct it first, then ask again")
    if facts.spoilt:
        return say("columns look wrong (renorm doctor, BN313): correct them first, then ask again")
    return None
