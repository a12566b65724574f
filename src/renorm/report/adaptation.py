"""What recalibration did, and whether it was kept, in words and numbers."""

from __future__ import annotations

from math import isfinite
from typing import Any

from renorm.evaluate import Score
from renorm.recalibrate import UNCHECKED, Adaptation
from renorm.report import score as scores
from renorm.report import shifts
from renorm.report.base import Bar, Block, Picture, Table, Told, Words
from renorm.said import Said, follow, many, say, some

ROWS = 8

# The essay's two reasons why batch norm hurts, told apart by what recalibration could and could not mend.
MISMATCH = say(
    "Statistics mend a shift in the values that reach each layer. Where that is not enough, either there was no shift to "
    "mend, or the features do not match: the data lack what the network learnt to look for, or hold its classes in other "
    "shares. For the last, give a profile of the source (--source); for the others, labels and fine-tuning."
)


def verdict(adaptation: Adaptation, *, output: str) -> Words:
    """Kept or not, and why; `output` is the file that was written, "" where there is none."""
    why = adaptation.why.capitalised() if isinstance(adaptation.why, Said) else Said(adaptation.why).capitalised()
    samples = many(adaptation.samples, "{count:,} sample", "{count:,} samples")
    if not adaptation.accepted:
        return Words(
            say(
                "{why}. The statistics of the source stand again, and nothing was written. {mismatch}",
                why=why,
                mismatch=MISMATCH,
            ),
            "doubt",
            say("Not kept: the recalibrated model did not hold up"),
        )
    written = say("Written to {output}.", output=output) if output else ""
    if adaptation.why == UNCHECKED:
        unchecked = say(
            "Nothing was held back to check it on: give --check DATA, and a change that does not hold up is not kept."
        )
        return Words(follow(written, unchecked), "good", say("Recalibrated on {samples}", samples=samples))
    title = say("Recalibrated on {samples}, and kept", samples=samples)
    return Words(follow(say("{why}.", why=why), written), "good", title)


def blocks(adaptation: Adaptation, *, before: Score | None = None, after: Score | None = None) -> tuple[Block, ...]:
    """What follows the verdict: scores before and after where there are any, then what moved."""
    parts: list[Block] = []
    if before is not None and after is not None:
        parts += compared(before, after)
    parts += pictures(adaptation)
    if adaptation.shifts:
        parts.append(_moved(adaptation))
    if adaptation.unvisited:
        text = say("No batch reached {names}; they hold what they held.", names=some(adaptation.unvisited, ROWS))
        parts.append(Words(text, "plain", say("Untouched")))
    return tuple(parts)


def pictures(adaptation: Adaptation) -> tuple[Picture, ...]:
    """How far the statistics had to move, per layer and per channel of the worst."""
    far = distances(adaptation)
    title = say("How far the data lay from each layer's old statistics")
    return shifts.pictures(far, adaptation.shifts, order=tuple(adaptation.shifts), title=title)


def distances(adaptation: Adaptation) -> dict[str, float]:
    """The mean over channels of the 2-Wasserstein distance, farthest first; sites where it is no number are left out."""
    far = {site: shift.layer.wasserstein2 for site, shift in adaptation.shifts.items()}
    return {site: far[site] for site in sorted(far, key=lambda site: -far[site]) if isfinite(far[site])}


def compared(before: Score, after: Score) -> tuple[Block, ...]:
    """Two scores beside each other."""
    source, mended = say("source statistics"), say("recalibrated")
    table = Table(
        say("On the check data, with labels"),
        ("", scores.metric(before), say("95 % interval"), say("samples")),
        (
            (source, scores.value(before), scores.interval(before), f"{before.count:,}"),
            (mended, scores.value(after), scores.interval(after), f"{after.count:,}"),
        ),
    )
    drawn = scores.spans(say("Before and after"), {source: (before, "plain"), mended: (after, "good")})
    return (table, *drawn)


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
    far = distances(adaptation)
    longest = max(far.values(), default=0.0) or 1.0
    order = list(far)
    rows = tuple(
        (
            shifts.name(site),
            Bar(far[site] / longest, f"{far[site]:.2f}"),
            Told(f"{100 * adaptation.weights[site]:.0f} %", "plain") if site in adaptation.weights else "",
        )
        for site in order[:ROWS]
    )
    hidden = len(order) - len(rows)
    note = say("Distance in source standard deviations; source kept is the share of the old statistics in the new.")
    return Table(
        say("How far the statistics had to move, farthest first"),
        (say("site"), say("distance"), say("source kept")),
        rows,
        note=follow(note, say("{hidden} more in --format json.", hidden=hidden)) if hidden else note,
    )
