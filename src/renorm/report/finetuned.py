"""What fine-tuning did, in words and numbers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from renorm.events import FineTuned
from renorm.report import score as scores
from renorm.report.base import Bar, Block, Table, Words

ROWS = 8


def verdict(result: FineTuned, *, output: str) -> Words:
    """What it came to."""
    if result.score is None:
        last = f"Loss {result.history[-1].loss:.3g} in the last epoch. Nothing was held back to score it on: give --val DATA."
        return Words(f"{last} Written to {output}.", "good", f"Trained for {result.steps:,} steps")
    name, value = result.score.metric.replace("_", " "), scores.value(result.score)
    text = f"95 % interval {scores.interval(result.score)}, from {result.score.count:,} samples. Written to {output}."
    return Words(text, "good", f"Trained for {result.steps:,} steps: {name} {value}")


def blocks(result: FineTuned) -> tuple[Block, ...]:
    """What follows the verdict: what was chosen and why, the epochs, what moved farthest."""
    chosen = Table(
        "Chosen",
        ("", "what", "why"),
        (
            ("policy", result.policy.name, result.why["policy"]),
            ("learning rate", f"{result.lr:g}", result.why["lr"]),
            ("head", result.head, result.why["head"]),
        ),
        words=("why",),
    )
    named = result.history[-1].score.metric if result.history[-1].score else ""
    epochs = Table(
        "Epochs",
        ("epoch", "loss", *([named] if named else []), "seconds"),
        tuple(
            (
                str(epoch.epoch + 1),
                f"{epoch.loss:.4g}",
                *([scores.value(epoch.score)] if epoch.score else []),
                f"{epoch.seconds:.1f}",
            )
            for epoch in result.history[-ROWS:]
        ),
    )
    return (chosen, epochs, *([_moved(result)] if result.moved else []))


def _moved(result: FineTuned) -> Table:
    order = sorted(result.moved, key=lambda name: -result.moved[name])
    longest = max(result.moved.values()) or 1.0
    rows = tuple((name, Bar(result.moved[name] / longest, f"{result.moved[name]:.3g}")) for name in order[:ROWS])
    hidden = len(order) - len(rows)
    more = f" {hidden} more in --format json." if hidden else ""
    return Table("What moved, farthest first", ("name", "relative to what it was"), rows, note=f"By 2-norm.{more}")


def result(result: FineTuned) -> dict[str, Any]:
    """The numbers, for machines."""
    return {
        "value": result.value,
        "score": None if result.score is None else scores.result(result.score),
        "policy": result.policy.name,
        "lr": result.lr,
        "head": result.head,
        "why": dict(result.why),
        "facts": asdict(result.facts),
        "steps": result.steps,
        "history": [
            {
                "epoch": epoch.epoch,
                "loss": epoch.loss,
                "lr": epoch.lr,
                "seconds": epoch.seconds,
                "score": None if epoch.score is None else scores.result(epoch.score),
            }
            for epoch in result.history
        ],
        "moved": dict(result.moved),
    }
