"""What recalibration did, and whether it was kept, in words and numbers."""

from __future__ import annotations

from typing import Any

from renorm.evaluate import Score
from renorm.recalibrate import Adaptation
from renorm.report import score as scores
from renorm.report.base import Bar, Block, Table, Told, Words

ROWS = 8

# The essay's two reasons why batch norm hurts, told apart by what recalibration could and could not mend.
MISMATCH = (
    "Statistics mend a shift in the values that reach each layer. Where that is not enough, either there was no shift to "
    "mend, or the features do not match: the data lack what the network learnt to look for, or hold its classes in other "
    "shares. For the last, give a profile of the source (--source); for the others, labels and fine-tuning."
)


def verdict(adaptation: Adaptation, *, output: str) -> Words:
    """Kept or not, and why."""
    why = adaptation.why[:1].upper() + adaptation.why[1:]
    if not adaptation.accepted:
        return Words(
            f"{why}. The statistics of the source stand again, and nothing was written. {MISMATCH}",
            "doubt",
            "Not kept: the recalibrated model did not hold up",
        )
    if adaptation.trust is None and why.startswith("No check"):
        return Words(
            f"Written to {output}. Nothing was held back to check it on: give --check DATA, and a change that does not "
            "hold up is not kept.",
            "good",
            f"Recalibrated on {adaptation.samples:,} samples",
        )
    return Words(f"{why}. Written to {output}.", "good", f"Recalibrated on {adaptation.samples:,} samples, and kept")


def blocks(adaptation: Adaptation, *, before: Score | None = None, after: Score | None = None) -> tuple[Block, ...]:
    """What follows the verdict: scores before and after where there are any, then what moved."""
    parts: list[Block] = []
    if before is not None and after is not None:
        parts.append(compared(before, after))
    if adaptation.shifts:
        parts.append(_moved(adaptation))
    if adaptation.unvisited:
        names = ", ".join(adaptation.unvisited[:ROWS]) + (" …" if len(adaptation.unvisited) > ROWS else "")
        parts.append(Words(f"No batch reached {names}; they hold what they held.", "plain", "Untouched"))
    return tuple(parts)


def compared(before: Score, after: Score) -> Table:
    """Two scores beside each other."""
    return Table(
        "On the check data, with labels",
        ("", before.metric, "95 % interval", "samples"),
        (
            ("source statistics", scores.value(before), scores.interval(before), f"{before.count:,}"),
            ("recalibrated", scores.value(after), scores.interval(after), f"{after.count:,}"),
        ),
    )


def result(adaptation: Adaptation, *, before: Score | None = None, after: Score | None = None) -> dict[str, Any]:
    """The numbers, for machines."""
    trust = adaptation.trust
    return {
        "accepted": adaptation.accepted,
        "why": adaptation.why,
        "method": adaptation.method.name,
        "samples": adaptation.samples,
        "passes": adaptation.passes,
        "unvisited": list(adaptation.unvisited),
        "shifts": {site: shift.layer._asdict() for site, shift in adaptation.shifts.items()},
        "source_weights": dict(adaptation.weights),
        "trust": None
        if trust is None
        else {"better": trust.better, "reliability": trust.reliability, "why": trust.why},
        "before": None if before is None else scores.result(before),
        "after": None if after is None else scores.result(after),
    }


def _moved(adaptation: Adaptation) -> Table:
    far = {site: shift.layer.wasserstein2 for site, shift in adaptation.shifts.items()}
    order = sorted(far, key=lambda site: -far[site])
    longest = max(far.values()) or 1.0
    rows = tuple(
        (
            site or "the model itself",
            Bar(far[site] / longest, f"{far[site]:.2f}"),
            Told(f"{100 * adaptation.weights[site]:.0f} %", "plain") if site in adaptation.weights else "",
        )
        for site in order[:ROWS]
    )
    hidden = len(order) - len(rows)
    more = f" {hidden} more in --format json." if hidden else ""
    return Table(
        "How far the statistics had to move, farthest first",
        ("site", "distance", "source kept"),
        rows,
        note=f"Distance in source standard deviations; source kept is the share of the old statistics in the new.{more}",
    )
