"""A score in words and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan
from typing import Any

from renorm.evaluate import Score
from renorm.report.base import Bar, Block, Spans, Table, Tone, Words
from renorm.said import Said, follow, many, say

SHARES = ("accuracy", "balanced_accuracy", "top5", "f1", "auroc", "ece")  # read as percentages
METRICS: Mapping[str, Said] = {
    "accuracy": say("accuracy"),
    "balanced_accuracy": say("balanced accuracy"),
    "top5": say("top5"),
    "f1": say("f1"),
    "auroc": say("auroc"),
    "nll": say("nll"),
    "ece": say("ece"),
    "mse": say("mse"),
    "mae": say("mae"),
}


def verdict(score: Score) -> Words:
    """The score, how far to believe it, and whether the model's own probabilities mean what they say."""
    text = say(
        "95 % interval {interval}, from {samples}.",
        interval=interval(score),
        samples=many(score.count, "{count:,} sample", "{count:,} samples"),
    )
    if not isnan(score.ece):
        honest = say(
            "Its probabilities are off by {ece:.1f} points on average (ECE); NLL {nll:.3g} nats.",
            ece=100 * score.ece,
            nll=score.nll,
        )
        text = follow(text, honest)
    return Words(text, "plain", say("{metric}: {value}", metric=metric(score, heading=True), value=value(score)))


def blocks(score: Score) -> tuple[Block, ...]:
    """A picture of the interval, where there is one; then the groups, worst first, where there are any."""
    drawn = spans(say("The score and its 95 % interval"), {metric(score, heading=True): (score, "plain")})
    return (*drawn, _groups(score)) if score.groups else drawn


def _groups(score: Score) -> Table:
    longest = max((abs(each.value) for each in score.groups.values() if not isnan(each.value)), default=0.0) or 1.0
    rows = tuple(
        (
            group,
            Bar(0.0 if isnan(each.value) else abs(each.value) / longest, value(each)),
            interval(each),
            f"{each.count:,}",
        )
        for group, each in score.groups.items()
    )
    note: Said = say("A wide interval says that the group is small, not that it is bad.")
    low, high = next(iter(score.groups.values())).interval
    if len(rows) > 1 and not (isnan(low) or isnan(high)):
        inside = low <= score.value <= high
        holds = say("The worst group's interval holds the value of all together; of several groups one is always last.")
        apart = say("The worst group's interval does not hold the value of all together.")
        note = follow(holds if inside else apart, note)
    columns = (say("group"), metric(score), say("95 % interval"), say("samples"))
    return Table(say("By group, worst first"), columns, rows, note=note)


def spans(title: Said, scores: Mapping[str, tuple[Score, Tone]]) -> tuple[Block, ...]:
    """Scores of one metric with their intervals on one scale; nothing where an interval is unknown."""
    if any(isnan(bound) for score, _ in scores.values() for bound in score.interval):
        return ()
    some = next(score for score, _ in scores.values())
    times = 100 if some.metric in SHARES else 1
    drawn = tuple(
        (label, value(score), times * score.value, times * score.interval[0], times * score.interval[1], tone)
        for label, (score, tone) in scores.items()
    )
    unit = say("{metric}, %", metric=metric(some)) if times == 100 else metric(some)
    note = say(
        "The dot is what was measured; the line is the 95 % interval: what more data of the same kind could give."
    )
    return (Spans(title, items=drawn, full=(0, 100) if times == 100 else None, across=unit, note=note),)


def metric(score: Score, *, heading: bool = False) -> str:
    """The metric's name as readers know it; a function's own name as it is."""
    known = METRICS.get(score.metric)
    if known is None:
        spaced = score.metric.replace("_", " ")
        return spaced.capitalize() if heading else spaced
    return known.capitalised() if heading else known


def value(score: Score) -> str:
    """The metric's value: 83.2 % for a share, four digits for anything else."""
    return shown(score.value, score.metric)


def interval(score: Score) -> Said:
    """The 95 % interval, "79.1 to 86.6 %"."""
    low, high = score.interval
    if isnan(low) or isnan(high):
        return say("unknown")
    if score.metric in SHARES:
        return say("{low:.1f} to {high:.1f} %", low=100 * low, high=100 * high)
    return say("{low:.4g} to {high:.4g}", low=low, high=high)


def shown(number: float, metric: str) -> str:
    """`number` as `metric` is usually written."""
    return f"{100 * number:.1f} %" if metric in SHARES else f"{number:.4g}"


def result(score: Score) -> dict[str, Any]:
    """The numbers, for machines; `groups`, a list with the worst first, only where there are any."""
    names = ("metric", "value", "interval", "count", "nll", "ece")
    numbers = {name: getattr(score, name) for name in names}
    if score.groups:
        numbers["groups"] = [{"group": group, **result(each)} for group, each in score.groups.items()]
    return numbers
