"""What was repaired, how far it had moved and what that was worth, in words and numbers."""

from __future__ import annotations

from typing import Any

from renorm.evaluate import Score
from renorm.repair import Repaired
from renorm.report.base import Bar, Block, Table, Words
from renorm.said import follow, many, say

ROWS = 12

Scores = tuple[Score, Score]  # before and after


def verdict(repaired: Repaired, scores: Scores | None, *, accepted: bool, output: str) -> Words:
    """How many layers were set right, and where the result is."""
    count = len(repaired.recalibrated) + len(repaired.rescaled)
    title = many(
        count, "{count} layer has its source's moments again", "{count} layers have their sources' moments again"
    )
    text = (
        say("Written to {output}.", output=output)
        if accepted
        else say("Nothing was written: on the labelled data it would do worse.")
    )
    if scores is not None:
        told = say(
            "{metric}: {before:.1%} before, {after:.1%} after, on {samples} labelled samples.",
            metric=scores[0].metric,
            before=scores[0].value,
            after=scores[1].value,
            samples=scores[0].count,
        )
        text = follow(told, text)
    return Words(text, "good" if accepted else "bad", title)


def blocks(repaired: Repaired) -> tuple[Block, ...]:
    """The layers that had moved furthest, and those that stayed as they were."""
    far = sorted(repaired.shifts.items(), key=lambda item: -item[1].moved)
    most = max((shift.moved for _, shift in far), default=0.0)
    rows = tuple(
        (
            name,
            say("statistics") if name in repaired.recalibrated else say("scale and bias"),
            Bar(shift.moved / most if most else 0.0, f"{shift.moved:.3f}"),
        )
        for name, shift in far[:ROWS]
    )
    note = say("{count} more in --format json.", count=len(far) - ROWS) if len(far) > ROWS else ""
    layer, why = say("layer"), say("why")
    found: list[Block] = [
        Table(
            say("Furthest from their sources"),
            (layer, say("set right by"), say("moved")),
            rows,
            words=(layer,),
            note=note,
        )
    ]
    if repaired.kept:
        kept = tuple(repaired.kept.items())
        note = say("{count} more in --format json.", count=len(kept) - ROWS) if len(kept) > ROWS else ""
        found.append(Table(say("These stayed"), (layer, why), kept[:ROWS], words=(layer, why), note=note))
    return tuple(found)


def result(repaired: Repaired, scores: Scores | None) -> dict[str, Any]:
    """The numbers, for machines."""
    return {
        "recalibrated": list(repaired.recalibrated),
        "rescaled": list(repaired.rescaled),
        "kept": dict(repaired.kept),
        "moved": {name: shift.moved for name, shift in repaired.shifts.items()},
        "samples": repaired.samples,
        "scores": None if scores is None else {"before": scores[0].value, "after": scores[1].value},
    }
