"""What fine-tuning did, in words and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite, nan
from typing import Any

from renorm.events import FineTuned
from renorm.report import classes
from renorm.report import score as scores
from renorm.report.base import Bar, Block, Lines, Picture, Table, Tone, Words, mean, thinned
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
        title = say("Trained for {steps}", steps=steps) if result.steps else say("Fitted without training")
        return Words(follow(follow(last, unscored), written), "good", title)
    metric, value = scores.metric(result.score), scores.value(result.score)
    title = say("Fitted without training: {metric} {value}", metric=metric, value=value)
    if result.steps:
        title = say("Trained for {steps}: {metric} {value}", steps=steps, metric=metric, value=value)
    text = say(
        "95 % interval {interval}, from {samples}.",
        interval=scores.interval(result.score),
        samples=many(result.score.count, "{count:,} sample", "{count:,} samples"),
    )
    return Words(follow(text, written), "good", title)


def blocks(
    result: FineTuned, *, losses: Sequence[tuple[int, float]] = (), names: Sequence[str] | None = None
) -> tuple[Block, ...]:
    """What follows the verdict: what was chosen and why, the epochs, the classes, and how far all went.

    losses  (step, loss) of each step that this process took, to be drawn
    names   of the classes
    """
    confusion = None if result.score is None else result.score.confusion
    return (
        _chosen(result),
        *_learning(result, losses),
        *([_epochs(result)] if result.history else []),
        *classes.blocks(confusion, names),
        *_drift(result),
        *([_moved(result)] if result.moved else []),
    )


def _chosen(result: FineTuned) -> Table:
    why = say("why")
    return Table(
        say("Chosen"),
        ("", say("what"), why),
        (
            (say("policy"), result.policy.name, result.why["policy"]),
            *([(say("learning rate"), f"{result.lr:g}", result.why["lr"])] if result.steps else []),
            (say("head"), say("new") if result.head == "new" else say("kept"), result.why["head"]),
        ),
        words=(why,),
    )


def _epochs(result: FineTuned) -> Table:
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
    return Table(say("Epochs"), (say("epoch"), say("loss"), *metric, say("seconds")), rows)


def _learning(result: FineTuned, losses: Sequence[tuple[int, float]]) -> tuple[Picture, ...]:
    """Loss and score over the steps, as far as there are two points to a line."""
    steps = result.steps / max(1, len(result.history))
    ends = [(epoch, (epoch.epoch + 1) * steps) for epoch in result.history]
    trained = thinned([(float(step), loss) for step, loss in losses]) or tuple((x, epoch.loss) for epoch, x in ends)
    scored = [(epoch.score, x) for epoch, x in ends if epoch.score is not None]
    unsure = tuple((x, score.nll) for score, x in scored if isfinite(score.nll))
    items: list[tuple[str, Tone, tuple[tuple[float, float], ...]]] = [(say("training"), "plain", trained)]
    if unsure:
        items.append((say("val"), "doubt", unsure))
    drawn: list[Picture] = []
    if len(trained) > 1:
        note = say("Training: as each step had it, penalties included, means over neighbouring steps.")
        if unsure:
            note = follow(
                note, say("Val: the mean negative log likelihood after each epoch; where it rises, it overfits.")
            )
        drawn.append(Lines(say("Loss"), items=tuple(items), across=say("step"), up=say("loss"), note=note))
    if len(scored) > 1:
        share = scored[0][0].metric in scores.SHARES
        points = tuple((x, (100 if share else 1) * score.value) for score, x in scored)
        up = say("{metric}, %", metric=scores.metric(scored[0][0])) if share else scores.metric(scored[0][0])
        drawn.append(Lines(say("Score on val"), items=((up, "plain", points),), across=say("step"), up=up))
    return tuple(drawn)


def _drift(result: FineTuned) -> tuple[Picture, ...]:
    """How far the statistics went from the source's over the epochs; nothing where they stood still all the time."""
    told = [epoch.drift for epoch in result.history if epoch.drift]
    if not told or not any(value for drift in (*told, result.drift) for value in drift.values()):
        return ()
    farthest = max(told[-1], key=lambda name: told[-1][name])
    means = [mean(drift.values()) for drift in told]
    over = [0.0, *(float(epoch.epoch + 1) for epoch in result.history if epoch.drift)]
    items: list[tuple[str, Tone, tuple[tuple[float, float], ...]]] = [
        (say("mean of {count} layers", count=len(told[-1])), "plain", tuple(zip(over, [0.0, *means], strict=True))),
        (farthest, "doubt", tuple(zip(over, [0.0, *(drift.get(farthest, nan) for drift in told)], strict=True))),
    ]
    if result.drift:
        items.append((say("re-estimated, mean"), "good", ((over[-1], mean(result.drift.values())),)))
    note = say(
        "2-Wasserstein distance of the statistics that a layer holds from those it came with; 0 is the source. The layer drawn "
        "by name is the farthest; the dot is what the model holds at the end."
    )
    title = say("How far statistics drifted from the source")
    return (Lines(title, items=tuple(items), across=say("epoch"), up=say("source sd"), note=note),)


def _moved(result: FineTuned) -> Table:
    order = sorted(result.moved, key=lambda name: -result.moved[name])
    longest = max(result.moved.values()) or 1.0
    rows = tuple((name, Bar(result.moved[name] / longest, f"{result.moved[name]:.3g}")) for name in order[:ROWS])
    note = say("How far a tensor went, by 2-norm, over how large it was or is, whichever is more.")
    if hidden := len(order) - len(rows):
        note = follow(note, say("{hidden} more in --format json.", hidden=hidden))
    return Table(say("What moved, farthest first"), (say("name"), say("moved")), rows, note=note)


def result(result: FineTuned, *, names: Sequence[str] | None = None) -> dict[str, Any]:
    """The numbers, for machines; `names` of the classes."""
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
                "drift": dict(epoch.drift),
            }
            for epoch in result.history
        ],
        "moved": dict(result.moved),
        "drift": dict(result.drift),
        "classes": None if result.score is None else classes.result(result.score.confusion, names),
    }
