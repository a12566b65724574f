"""A score in words and numbers."""

from __future__ import annotations

from math import isnan
from typing import Any

from renorm.evaluate import Score
from renorm.report.base import Words

SHARES = ("accuracy", "balanced_accuracy", "top5", "f1", "auroc", "ece")  # read as percentages


def verdict(score: Score) -> Words:
    """The score, how far to believe it, and whether the model's own probabilities mean what they say."""
    name = score.metric.replace("_", " ").capitalize()
    text = f"95 % interval {interval(score)}, from {score.count:,} samples."
    if not isnan(score.ece):
        text += (
            f" Its probabilities are off by {100 * score.ece:.1f} points on average (ECE); NLL {score.nll:.3g} nats."
        )
    return Words(text, "plain", f"{name}: {value(score)}")


def value(score: Score) -> str:
    """The metric's value: 83.2 % for a share, four digits for anything else."""
    return shown(score.value, score.metric)


def interval(score: Score) -> str:
    """The 95 % interval, "79.1 to 86.6 %"."""
    low, high = score.interval
    if isnan(low) or isnan(high):
        return "unknown"
    if score.metric in SHARES:
        return f"{100 * low:.1f} to {100 * high:.1f} %"
    return f"{low:.4g} to {high:.4g}"


def shown(number: float, metric: str) -> str:
    """`number` as `metric` is usually written."""
    return f"{100 * number:.1f} %" if metric in SHARES else f"{number:.4g}"


def result(score: Score) -> dict[str, Any]:
    """The numbers, for machines."""
    names = ("metric", "value", "interval", "count", "nll", "ece")
    return {name: getattr(score, name) for name in names}
