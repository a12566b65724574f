"""Without labels: is the adapted model better than its source?

Where two models agree nothing is at stake. Where they part, right and wrong changes look different: a model that mends a
shift is surer of its new answers than the source was of the old ones; one that only evens out a class mix that was meant to
be uneven gives up sure answers for doubtful ones. So the one that is surer where they part is believed.

For a sample on which the source says P and the adapted model Q, the source's margin is `ln p_s(P) / p_s(Q)` and the adapted
model's `ln p_a(Q) / p_a(P)`. With m_s and m_a their means over such samples the evidence is `(m_a − m_s) / (m_a + m_s)`, in
[−1, 1], free of the logits' scale.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from renorm.errors import UsageError
from renorm.moments import TINY
from renorm.said import say

# Set on ResNet-20 (CIFAR-10) and MobileNet (VWW) holding target statistics alone or with a tenth of the source: as they are,
# 14 and 17 corruptions, label shift on four kinds of each; 105 cases, 400 samples (150 under VWW's label shift).
LIMIT = -0.08  # evidence above it speaks for the adapted model; fitted without either network: -0.08 and -0.075
MOVED = 0.005  # `moved`, mean over sites, below which no covariate shift shows: unshifted VWW images had 0.002-0.004
SLOPE = 15.0  # of the log odds of being right, per unit of evidence beyond LIMIT
# Heart beats, ten splits of six patients: those who lost half a point or more lay below 1.6, gains of 11 to 95 above 3.3.
ERRORS = 2.0  # how many standard errors surer the adapted model must be where `strict` asks
UNSEEN = 0.8  # the most that is claimed where `moved` is unknown: with two classes label shift does not show in logits


class Trust(NamedTuple):
    """A verdict on two models from their outputs alone.

    better       whether the adapted model is believed to be the better one
    reliability  probability in [0.5, 1) that the verdict is right, as calibrated on the benchmark
    why          the verdict in words
    evidence     relative difference of the mean log odds where the models disagree, in [−1, 1]
    disagreement share of samples for which the models' answers differ
    """

    better: bool
    reliability: float
    why: str
    evidence: float
    disagreement: float


def trust(
    source_logits: Tensor,
    adapted_logits: Tensor,
    source: Any = None,
    *,
    moved: float | None = None,
    strict: bool = False,
) -> Trust:
    """Believe the model that is surer, in log odds, on the samples where the two disagree.

    moved   how far the adapted model's moments lie from the source's statistics, mean over sites (`Shift.moved`); where that
            is below 0.005 no covariate shift shows, and the source is kept
    source  a profile of the source; the adapted model was then made at equal label mix, which needs no `moved` to be safe
    strict  the adapted model must be surer by two standard errors of the difference: where the class mix is hardly known

    Sharpest where the adapted model holds target statistics alone (`prior=0`): a share of the source makes it less sure.
    Use 256 samples or more: with 64 about a fifth of the harm of label shift slipped through. What no output shows: label
    shift *and* covariate shift at once in a model of two classes.
    Shapes: both logits (N, K, *) for the same samples; K = 1 is read as the log odds of a second class.
    Raises UsageError for logits that do not match, have no class axis, are empty or not finite.
    """
    before, after = _rows(source_logits, adapted_logits)
    old, new = before.argmax(1, keepdim=True), after.argmax(1, keepdim=True)
    part = (old != new).squeeze(1)
    disagreement = float(part.double().mean())
    if not bool(part.any()):
        return Trust(True, 0.5, say("both models give the same answers, so nothing is lost either way"), 0.0, 0.0)
    source_margin = float((before.gather(1, old) - before.gather(1, new))[part].mean())
    adapted_margin = float((after.gather(1, new) - after.gather(1, old))[part].mean())
    total = source_margin + adapted_margin
    evidence = (adapted_margin - source_margin) / total if total > 0 else 0.0
    facts = say(
        "the two models answer {share:.0%} of the samples differently, and there the adapted one has mean log odds of "
        "{adapted:.2f}, the source {source:.2f}",
        share=disagreement,
        adapted=adapted_margin,
        source=source_margin,
    )
    if moved is not None and source is None and moved < MOVED:
        why = say(
            "the moments moved by {moved:.4f}, less than {limit:g}: no shift in the inputs that adapting could mend; {facts}",
            moved=moved,
            limit=MOVED,
            facts=facts,
        )
        return Trust(False, 0.55, why, evidence, disagreement)
    better = evidence > LIMIT
    reliability = 1 / (1 + math.exp(-SLOPE * abs(evidence - LIMIT)))
    if better and strict:
        gained = (after.gather(1, new) - after.gather(1, old) - before.gather(1, old) + before.gather(1, new))[part]
        errors = _errors(gained)
        if errors < ERRORS:
            why = say(
                "{facts}; that is {errors:.1f} standard errors apart where {least:g} are asked for, as the source's classes "
                "are mixed too unevenly to know the target's mix",
                facts=facts,
                errors=errors,
                least=ERRORS,
            )
            return Trust(False, 0.55, why, evidence, disagreement)
    if better and moved is None and source is None:
        reliability = min(reliability, UNSEEN)
    if better:
        why = say("{facts}; the adapted model is believed", facts=facts)
    else:
        why = say(
            "{facts}; the adapted model is less sure of its new answers than the source of its own, so the source is believed",
            facts=facts,
        )
    return Trust(better, reliability, why, evidence, disagreement)


def _errors(values: Tensor) -> float:
    """The mean of `values`, (n, 1), in its own standard errors; 0 of a single value, of which none is known."""
    if len(values) < 2:
        return 0.0
    return float(values.mean() / (values.std() / math.sqrt(len(values))).clamp_min(TINY))


def _rows(source: Tensor, adapted: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (samples, classes) in float64."""
    if source.shape != adapted.shape or source.dim() < 2 or source.numel() == 0:
        raise UsageError(
            f"trust compares two models' logits (N, K, *) on the same samples; got shapes {tuple(source.shape)} and "
            f"{tuple(adapted.shape)}. Run both models on one set of batches, and name the logits with output=."
        )
    rows = []
    for name, logits in (("source", source), ("adapted", adapted)):
        if not bool(torch.isfinite(logits).all()):
            raise UsageError(
                f"trust was given {name} logits that are not finite. Check the inputs, or run in float32 without autocast."
            )
        flat = logits.detach().movedim(1, -1).flatten(0, -2).cpu().double()
        rows.append(flat if flat.shape[1] > 1 else torch.cat([torch.zeros_like(flat), flat], 1))
    return rows[0], rows[1]
