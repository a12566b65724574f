"""What was folded, what stayed and why, in words and numbers."""

from __future__ import annotations

from typing import Any

from renorm.fold import Folded
from renorm.report.base import Block, Table, Words
from renorm.said import say

ROWS = 12


def verdict(folded: Folded, *, output: str) -> Words:
    """How many went, and how far the model is from what it was."""
    total = len(folded.folded) + len(folded.kept)
    if not folded.folded:
        return Words(
            say("Nothing was written: the model would be the one you have."),
            "doubt",
            say("No batch norm can be folded"),
        )
    text = say(
        "On the example its outputs differ by at most {error:.1e} of the largest. Written to {output}.",
        error=folded.max_rel_error,
        output=output,
    )
    title = say("{count} of {total} batch norms are folded", count=len(folded.folded), total=total)
    return Words(text, "good", title)


def blocks(folded: Folded) -> tuple[Block, ...]:
    """Those that stayed, by their reasons, the most frequent first."""
    groups: dict[str, list[str]] = {}
    for site, why in folded.kept.items():
        groups.setdefault(why, []).append(site or say("the model itself"))
    if not groups:
        return ()
    most = sorted(groups.items(), key=lambda group: -len(group[1]))
    rows = tuple((str(len(sites)), sites[0], reason) for reason, sites in most[:ROWS])
    note = say("{count} more reasons in --format json.", count=len(most) - ROWS) if len(most) > ROWS else ""
    first, why = say("first"), say("why")
    return (Table(say("These stayed"), (say("norms"), first, why), rows, words=(first, why), note=note),)


def result(folded: Folded) -> dict[str, Any]:
    """The numbers, for machines."""
    return {
        "folded": list(folded.folded),
        "kept": dict(folded.kept),
        "max_rel_error": folded.max_rel_error,
        "errors": dict(folded.errors),
    }
