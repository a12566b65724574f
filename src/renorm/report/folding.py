"""What was folded, what stayed and why, in words and numbers."""

from __future__ import annotations

from typing import Any

from renorm.fold import Folded
from renorm.report.base import Block, Table, Words

ROWS = 12


def verdict(folded: Folded, *, output: str) -> Words:
    """How many went, and how far the model is from what it was."""
    total = len(folded.folded) + len(folded.kept)
    if not folded.folded:
        return Words(
            "Nothing was written: the model would be the one you have.", "doubt", "No batch norm can be folded"
        )
    text = (
        f"On the example its outputs differ by at most {folded.max_rel_error:.1e} of the largest. Written to {output}."
    )
    return Words(text, "good", f"{len(folded.folded)} of {total} batch norms are folded")


def blocks(folded: Folded) -> tuple[Block, ...]:
    """Those that stayed, by their reasons, the most frequent first."""
    groups: dict[str, list[str]] = {}
    for site, why in folded.kept.items():
        groups.setdefault(why, []).append(site or "the model itself")
    if not groups:
        return ()
    most = sorted(groups.items(), key=lambda group: -len(group[1]))
    rows = tuple((str(len(sites)), sites[0], why) for why, sites in most[:ROWS])
    note = f"{len(most) - ROWS} more reasons in --format json." if len(most) > ROWS else ""
    return (Table("These stayed", ("norms", "first", "why"), rows, words=("first", "why"), note=note),)


def result(folded: Folded) -> dict[str, Any]:
    """The numbers, for machines."""
    return {
        "folded": list(folded.folded),
        "kept": dict(folded.kept),
        "max_rel_error": folded.max_rel_error,
        "errors": dict(folded.errors),
    }
