"""What fine-tuning did, in words and numbers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from renorm.events import FineTuned
from renorm.report import score as scores
from renorm.report.base import Bar, Block, Table, Words
from renorm.said import follow, many, say

ROWS = 8


def verdict(result: FineTuned, *, output: str) -> Words:
    """What it came to."""
    steps = many(result.steps, "{count:,} step", "{count:,} steps")
    written = say("Written to {output}.", output=output)
    if result.score is None:
        last = say("No step was taken: the head was solved.")
        if result.history:
            last = say("Loss {loss:.3g} in the last epoch.", loss=result.history[-1].loss)
        unscored = say("Nothing was held back to score it on: give --val DATA.")
        return Words(follow(follow(last, unscored), written), "good", say("Trained for {steps}", steps=steps))
    value = scores.value(result.score)
    title = say("Trained for {steps}: {metric} {value}", steps=steps, metric=scores.metric(result.score), value=value)
    text = say(
        "95 % interval {interval}, from {samples}.",
        interval=scores.interval(result.score),
        samples=many(result.score.count, "{count:,} sample", "{count:,} samples"),
    )
    return Words(follow(text, written), "good", title)


def blocks(result: FineTuned) -> tuple[Block, ...]:
    """What follows the verdict: what was chosen and why, the epochs, what moved farthest."""
    why = say("why")
    chosen = Table(
        say("Chosen"),
        ("", say("what"), why),
        (
            (say("policy"), result.policy.name, result.why["policy"]),
            (say("learning rate"), f"{result.lr:g}", result.why["lr"]),
            (say("head"), say("new") if result.head == "new" else say("kept"), result.why["head"]),
        ),
        words=(why,),
    )
    shown = result.history[-ROWS:]
    scored = [epoch.score for epoch in shown if epoch.score is not None]
    rows = tuple(
        (
            str(epoch.epoch + 1),
            f"{epoch.loss:.4g}",
            *([scores.value(epoch.score)] if epoch.score else []),
            f"{epoch.seconds:.1f}",
        )
        for epoch in shown
    )
    metric = [scores.metric(scored[0])] if scored else []
    epochs = Table(say("Epochs"), (say("epoch"), say("loss"), *metric, say("seconds")), rows)
    return (chosen, epochs, *([_moved(result)] if result.moved else []))


def _moved(result: FineTuned) -> Table:
    order = sorted(result.moved, key=lambda name: -result.moved[name])
    longest = max(result.moved.values()) or 1.0
    rows = tuple((name, Bar(result.moved[name] / longest, f"{result.moved[name]:.3g}")) for name in order[:ROWS])
    note = say("How far a tensor went, by 2-norm, over how large it was.")
    if hidden := len(order) - len(rows):
        note = follow(note, say("{hidden} more in --format json.", hidden=hidden))
    return Table(say("What moved, farthest first"), (say("name"), say("moved")), rows, note=note)


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
