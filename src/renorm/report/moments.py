"""Moments that were measured or merged: what they are of, how far their parts lie apart, what they are good for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from renorm.observation import Observation
from renorm.report.base import Table, Words
from renorm.shift import Shift

FEW = 32  # samples: with fewer, a mean says much about each of them


def verdict(seen: Observation, *, output: str) -> Words:
    """What was measured and where it was written."""
    channels = sum(len(site.values.mean) for site in seen.values())
    text = (
        f"The file holds a mean, a variance and a count for each of {channels:,} channels, and no sample of the data. "
        + (
            f"Use it: renorm recalibrate MODEL --moments {output} -o OUT"
            if seen.under == "batch"
            else "Measured under the statistics the model holds: they tell how far the data lie from those. To recalibrate, "
            "observe with --under batch."
        )
    )
    if seen.samples < FEW:
        text += (
            f". With {seen.samples} samples only, a mean still says much about each of them: think before sharing it."
        )
    title = f"Moments of {seen.samples:,} samples at {len(seen)} batch norms are written to {output}"
    return Words(text, "good", title)


def parts(both: Observation, each: Mapping[str, Observation]) -> Table:
    """The files that were merged, and how far each lies from all of them together."""
    rows = []
    for name, seen in each.items():
        far = {site: Shift.between(both[site].values, part.values).layer.wasserstein2 for site, part in seen.items()}
        worst = max(far, key=far.__getitem__, default="")
        rows.append((name, f"{seen.samples:,}", f"{seen.batches:,}", f"{far.get(worst, 0):.2f}", worst or "itself"))
    return Table(
        "What was merged",
        ("file", "samples", "batches", "farthest from all", "at"),
        tuple(rows),
        note="Distance from the pooled moments in their standard deviations, mean over the channels of the farthest site.",
    )


def result(seen: Observation) -> dict[str, Any]:
    """The numbers, for machines; the moments themselves are in the file."""
    return {
        "under": seen.under,
        "samples": seen.samples,
        "batches": seen.batches,
        "sites": {name: len(site.values.mean) for name, site in seen.items()},
        "unvisited": list(seen.unvisited),
        "parts": max(1, len(seen.parts)),
        "approximate": seen.caveat or None,
    }
