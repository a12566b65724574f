"""How many answers are right, estimated without labels, with an interval that was checked against the truth.

Six witnesses, each wrong in its own way: how sure the model is (average confidence); how sure it is beside how sure it was
on its source (DoC, ATC: they need a profile, or labelled source logits); how often it agrees with itself after
recalibration, by plain re-estimation and at equal label mix; and how far its moments lie from the statistics it holds.
A model far from home is as sure as ever and no longer agrees with its recalibrated self; a model at home that meets other
shares of classes agrees less, though it is right. So agreement is believed where the moments moved, and sureness where not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from renorm.calls import Caller
from renorm.errors import UsageError
from renorm.evaluate import collect
from renorm.profile import Profile, reached_by
from renorm.recalibrate import recalibrate_
from renorm.said import Said, say

__all__ = [
    "FEWEST",
    "Accuracy",
    "Home",
    "Look",
    "Signals",
    "combined",
    "estimate",
    "half_width",
    "look",
    "mean_moved",
    "signals",
    "spread",
]

FEWEST = 32  # samples below which nothing is estimated: the share of right answers alone is then uncertain by 9 points
# Set by `renorm bench estimate` (benchmarks/results/estimate.md), which also checks them with each network, and each family
# of shifts, left out of the fit.
FAR = 0.03  # `moved`, mean over sites, at which agreement and sureness count the same
# Half of the interval beside sampling, where nothing moved and where the moments moved far; with a source, and without. So wide
# that it held the truth nine times in ten on each of five networks, the least foreseen among them (the table says how wide a
# network would have it, and what the others would have given it).
SPREAD = ((0.09, 0.41), (0.12, 0.55))
NINETY = 1.645  # standard errors on either side that hold nine in ten


class Home(NamedTuple):
    """What the model does on its own source: share of right answers, mean confidence, and ATC's threshold.

    threshold   the confidence below which as many source samples lie as are answered wrong (Garg et al. 2022)
    """

    accuracy: float
    confidence: float
    threshold: float

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Home:
        """Measured on labelled source logits. Shapes: (N, K) and (N,); UsageError for others."""
        if logits.dim() != 2 or labels.shape != logits.shape[:1] or not len(labels):
            raise UsageError(
                f"the source's accuracy is measured on logits (N, K) and labels (N,); got {tuple(logits.shape)} and "
                f"{tuple(labels.shape)}."
            )
        sure = _probabilities(logits).amax(1)
        right = float((logits.argmax(1) == labels).double().mean())
        return cls(right, float(sure.mean()), reached_by(sure, right))

    @classmethod
    def known(cls, source: Profile | None) -> Home | None:
        """What a profile tells; None where it was made without labels, or by a renorm that kept no threshold."""
        if source is None or source.accuracy is None or source.threshold is None:
            return None
        return cls(source.accuracy, source.confidence, source.threshold)


class Look(NamedTuple):
    """What a model said of the same samples three times: probabilities (N, K) as it is, re-estimated, at equal mix."""

    source: Tensor
    pooled: Tensor
    mixed: Tensor | None


class Signals(NamedTuple):
    """What the witnesses say, each a share of right answers in its own opinion; `moved` is how far the moments lie off.

    confidence  mean largest probability
    agreement   mean over samples of the probability that the model and its re-estimated self, each drawing an answer from
                its probabilities, draw the same
    mixed       the same, re-estimated at equal label mix; None without a profile
    threshold   ATC; difference DoC; None without a source
    moved       `Shift.moved`, mean over sites
    """

    confidence: float
    agreement: float
    mixed: float | None
    threshold: float | None
    difference: float | None
    moved: float


class Accuracy(NamedTuple):
    """An estimate of the share of right answers, without labels.

    value      the estimate
    interval   where the truth is expected nine times in ten
    lost       the source's accuracy less the estimate; None where the source's is not known
    samples    how many were looked at
    why        what it follows from, in words
    signals    what each witness says
    """

    value: float
    interval: tuple[float, float]
    lost: float | None
    samples: int
    why: Said
    signals: Signals


def look(model: nn.Module, batches: Sequence[Any], caller: Caller, source: Profile | None = None) -> Look:
    """Run `model` as it is, re-estimated on `batches`, and with a profile at equal mix; it comes out bit-identical.

    Raises UsageError where the model gives no logits (N, K), and whatever `recalibrate_` raises.
    """

    def said(known: Profile | None, *, moving: bool = True) -> Tensor:
        undo = recalibrate_(model, batches, source=known, **vars(caller)) if moving else None
        try:
            logits = collect(model, batches, caller=caller, asked="an estimate of accuracy").logits
        finally:
            if undo is not None:
                undo.restore_()
        if logits.dim() != 2:
            raise UsageError(
                f"accuracy is estimated from logits (N, K), one row a sample; got shape {tuple(logits.shape)}."
            )
        return _probabilities(logits)

    return Look(said(None, moving=False), said(None), None if source is None else said(source))


def signals(seen: Look, *, moved: float, home: Home | None = None) -> Signals:
    """What each witness says of `seen`; `moved` as measured on the same samples."""
    sure = seen.source.amax(1)
    confidence = float(sure.mean())
    return Signals(
        confidence=confidence,
        agreement=_together(seen.source, seen.pooled),
        mixed=None if seen.mixed is None else _together(seen.source, seen.mixed),
        threshold=None if home is None else float((sure >= home.threshold).double().mean()),
        difference=None if home is None else min(max(home.accuracy - (home.confidence - confidence), 0.0), 1.0),
        moved=moved,
    )


def combined(found: Signals, *, far: float = FAR) -> float:
    """`(1 − w) sureness + w agreement`, w = moved² / (moved² + far²).

    Sureness is ATC's with a source and the mean confidence without; agreement the lesser of the two, for each is too high
    where its own recalibration failed: the plain one where classes are missing, that at equal mix where it ran away.
    """
    weight = _weight(found.moved, far)
    return (1 - weight) * _sureness(found) + weight * _agreement(found)


def _sureness(found: Signals) -> float:
    return found.confidence if found.threshold is None else found.threshold


def _agreement(found: Signals) -> float:
    return found.agreement if found.mixed is None else min(found.agreement, found.mixed)


def _weight(moved: float, far: float = FAR) -> float:
    return moved**2 / (moved**2 + far**2)


def half_width(value: float, samples: int, spread: float) -> float:
    """Half of an interval: `spread` for what the witnesses do not know, and the sampling error of a share beside it."""
    return math.hypot(spread, NINETY * math.sqrt(max(value * (1 - value), 0.01) / samples))


def spread(moved: float, ends: tuple[float, float], far: float = FAR) -> float:
    """What the witnesses do not know: the first of `ends` where nothing moved, the second far off, between as they count."""
    weight = _weight(moved, far)
    return (1 - weight) * ends[0] + weight * ends[1]


def estimate(found: Signals, *, samples: int, home: Home | None = None) -> Accuracy:
    """The share of right answers that the witnesses together speak for, and how far to believe it."""
    value = combined(found)
    half = half_width(value, samples, spread(found.moved, SPREAD[home is None]))
    why = say(
        "the model agrees with its recalibrated self on {agree:.0%}, is sure of {sure:.0%}, and its moments moved by "
        "{moved:.3f}, so agreement counts {weight:.0%}",
        agree=_agreement(found),
        sure=_sureness(found),
        moved=found.moved,
        weight=_weight(found.moved),
    )
    return Accuracy(
        value=value,
        interval=(max(0.0, value - half), min(1.0, value + half)),
        lost=None if home is None else home.accuracy - value,
        samples=samples,
        why=why,
        signals=found,
    )


def mean_moved(values: Iterable[float]) -> float:
    """The mean of `Shift.moved` over sites; 0 where there is none."""
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def _probabilities(logits: Tensor) -> Tensor:
    """Softmax in float64; a single column is a sigmoid's. Shapes: (N, K) → (N, K), (N, 1) → (N, 2)."""
    wide = logits.detach().to("cpu", torch.float64)
    return (wide if wide.shape[1] > 1 else torch.cat([torch.zeros_like(wide), wide], 1)).softmax(1)


def _together(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum(1).mean())
