"""Moments that were measured or merged: what they are of, how far their parts lie apart, what they are good for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from renorm.observation import Observation
from renorm.report.base import Table, Words
from renorm.said import follow, say
from renorm.shift import Shift

FEW = 32  # samples: with fewer, a mean says much about each of them


def verdict(seen: Observation, *, output: str) -> Words:
    """What was measured and where it was written."""
    channels = sum(len(site.values.mean) for site in seen.values())
    held = say(
        "The file holds a mean, a variance and a count for each of {channels:,} channels, and no sample of the data.",
        channels=channels,
    )
    if seen.under == "batch":
        use = say("Use it: renorm recalibrate MODEL --moments {output} -o OUT", output=output)
    else:
        use = say(
            "Measured under the statistics the model holds: they tell how far the data lie from those. To recalibrate, "
            "observe with --under batch."
        )
    few = say(
        "With {samples} samples only, a mean still says much about each of them: think before sharing it.",
        samples=seen.samples,
    )
    title = say(
        "Moments of {samples:,} samples at {sites} batch norms are written to {output}",
        samples=seen.samples,
        sites=len(seen),
        output=output,
    )
    return Words(follow(held, few, use) if seen.samples < FEW else follow(held, use), "good", title)


def parts(both: Observation, each: Mapping[str, Observation]) -> Table:
    """The files that were merged, and how far each lies from all of them together."""
    rows = []
    for name, seen in each.items():
        far = {site: Shift.between(both[site].values, part.values).layer.wasserstein2 for site, part in seen.items()}
        worst = max(far, key=far.__getitem__, default="")
        rows.append(
            (
                name,
                f"{seen.samples:,}",
                f"{seen.batches:,}",
                f"{far.get(worst, 0):.2f}",
                worst or say("the model itself"),
            )
        )
    note = say(
        "Distance from the pooled moments in their standard deviations, mean over the channels of the farthest site."
    )
    columns = (say("file"), say("samples"), say("batches"), say("farthest from all"), say("at"))
    return Table(say("What was merged"), columns, tuple(rows), note=note)


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
