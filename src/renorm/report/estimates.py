"""What kind of shift it is, and how many answers are right, both without labels: in words, a picture and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from renorm.accuracy import Accuracy
from renorm.kind import Kind, KindName
from renorm.report.base import Block, Spans, Tone, Words
from renorm.said import Said, follow, say

TITLES: Mapping[KindName, Said] = {
    "none": say("no shift"),
    "covariate": say("the values have moved (covariate shift)"),
    "label": say("the classes are mixed otherwise (label shift)"),
    "covariate and label": say("the values have moved, and the classes are mixed otherwise"),
    "content": say("content that the model does not know"),
}
MEANING: Mapping[KindName, Said] = {
    "none": say("Neither the values nor the shares of the classes lie far from the source's."),
    "covariate": say("Statistics can mend this: recalibrate."),
    "label": say(
        "There is little for statistics to mend, and re-estimating them from data of other shares does harm. Keep the "
        "source's, or recalibrate with a profile (--source), which compares at equal shares."
    ),
    "covariate and label": say(
        "Recalibrate with a profile of the source (--source), which compares at equal shares; without one the change of "
        "shares would be taken for a change of values."
    ),
    "content": say(
        "Even with statistics that fit, the model stays unsure: these data hold what it was not taught, or have lost what "
        "it looks for. Statistics cannot mend that; labels and fine-tuning can."
    ),
}
TONES: Mapping[KindName, Tone] = {
    "none": "good",
    "covariate": "doubt",
    "label": "doubt",
    "covariate and label": "doubt",
    "content": "bad",
}


def blocks(kind: Kind | None, estimate: Accuracy | None) -> tuple[Block, ...]:
    """A paragraph each, and the witnesses drawn beside the estimate; nothing for what could not be told."""
    parts: list[Block] = []
    if kind is not None:
        parts.append(_kind(kind))
    if estimate is not None:
        parts += [_accuracy(estimate), _drawn(estimate)]
    return tuple(parts)


def result(kind: Kind | None, estimate: Accuracy | None) -> dict[str, Any]:
    """The numbers, for machines."""
    return {
        "kind": None
        if kind is None
        else {
            "name": kind.name,
            "sure": kind.sure,
            "parts": dict(kind.parts),
            "why": kind.why,
            "traces": kind.traces._asdict(),
        },
        "estimate": None
        if estimate is None
        else {
            "accuracy": estimate.value,
            "interval": list(estimate.interval),
            "lost": estimate.lost,
            "samples": estimate.samples,
            "why": estimate.why,
            "signals": estimate.signals._asdict(),
        },
    }


def _kind(kind: Kind) -> Words:
    assumed = (
        "" if kind.traces.known else say("Without a profile of the source, equal shares of all classes are assumed.")
    )
    why = say("Why: {why}.", why=kind.why)
    title = say("What kind of shift: {name}, {sure:.0%} sure", name=TITLES[kind.name], sure=kind.sure)
    return Words(follow(MEANING[kind.name], why, assumed), TONES[kind.name], title)


def _accuracy(estimate: Accuracy) -> Words:
    low, high = estimate.interval
    title = say(
        "Estimated without labels: {value:.0%} of the answers are right ({low:.0%} to {high:.0%}, nine times in ten)",
        value=estimate.value,
        low=low,
        high=high,
    )
    why = say("Over {samples:,} samples {why}.", samples=estimate.samples, why=estimate.why)
    lost = ""
    if estimate.lost is not None:
        lost = say("On its source the model is right {points:.0f} points more often.", points=100 * estimate.lost)
        if estimate.lost < 0:
            lost = say("That is no less than on its source.")
    return Words(follow(lost, why), "plain", title)


def _drawn(estimate: Accuracy) -> Spans:
    found = estimate.signals
    witnesses = {
        say("sureness"): found.confidence,
        say("sureness beside the source's (DoC)"): found.difference,
        say("sureness above the source's bar (ATC)"): found.threshold,
        say("agreement when recalibrated"): found.agreement,
        say("agreement at equal class mix"): found.mixed,
    }
    low, high = estimate.interval
    items: list[tuple[str, str, float, float, float, Tone]] = [
        (say("estimate"), f"{estimate.value:.0%}", estimate.value, low, high, "good")
    ]
    items += [
        (name, f"{value:.0%}", value, value, value, "plain") for name, value in witnesses.items() if value is not None
    ]
    return Spans(
        say("How many answers are right: the estimate and its witnesses"),
        items=tuple(items),
        full=(0.0, 1.0),
        across=say("share of right answers"),
        note=say(
            "The line is the interval that held the truth nine times in ten on each of five networks; one of another kind may "
            "lie outside more often. Each witness alone is wrong in its own way: see docs/shift-or-mismatch.md."
        ),
    )
