"""The tables of the suite `architectures`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean

from renorm.bench import markdown
from renorm.bench.base import Row

__all__ = ["table"]


def table(rows: Sequence[Row]) -> str:
    """Every part that has rows, each under its heading; means over the seeds, and the least and most in brackets."""
    parts = {"sequence": _sequence, "vae": _vae, "gas": _adapted, "ecg": _adapted}
    chosen = {part: [row for row in rows if row.cell["part"] == part] for part in parts}
    return "\n".join(f"## {TITLES[part]}\n\n{parts[part](found)}" for part, found in chosen.items() if found)


TITLES = {
    "sequence": "Digits (8 × 8) read as sequences",
    "vae": "Digits written pixel by pixel from a latent variable",
    "gas": "Gas sensors: trained on batches 1 and 2, accuracy on later ones (%)",
    "ecg": "Heart beats: patients that were left out, accuracy (%)",
}


def _sequence(rows: Sequence[Row]) -> str:
    lines = []
    for (reading, way), found in _grouped(rows, "case", "way"):
        reached = [row for row in found if row.values["steps_to_goal"]]
        steps = _spread([row.values["steps_to_goal"] for row in reached], 0)
        seconds = _spread([row.values["seconds_to_goal"] for row in reached], 1)
        pace = _spread([1000 * row.values["training_seconds"] / row.values["steps"] for row in found], 0)
        lines.append([reading, way, _values(found, "error", 1), f"{len(reached)}/{len(found)}", steps, seconds, pace])
    head = ["read by", "network", "error %", "runs at 90 %", "steps to 90 %", "processor s to 90 %", "ms a step"]
    said = "64 hidden units, the same learning rate, schedule and forget bias for both; error on 797 images never trained on.\n"
    return f"{said}\n{markdown.table(head, lines, words=2)}"


def _vae(rows: Sequence[Row]) -> str:
    names = ("reconstruction", "divergence", "floor", "bound", "information", "active")
    lines = [
        [way, *(_values(found, name, 0 if name == "active" else 2) for name in names)]
        for (way,), found in _grouped(rows, "way")
    ]
    said = (
        "Nats a digit, on 797 digits never trained on. 16 latent dimensions; active: posterior means with a variance "
        "above 0.01.\n"
    )
    head = ["way", "reconstruction", "KL", "its floor", "sum (−ELBO)", "mutual information", "active"]
    return f"{said}\n{markdown.table(head, lines)}"


def _adapted(rows: Sequence[Row]) -> str:
    ways = list(dict.fromkeys(row.cell["way"] for row in rows))
    known = {(row.cell["case"], row.cell["seed"], row.cell["way"]): row.values["accuracy"] for row in rows}
    lines = []
    for case in dict.fromkeys(row.cell["case"] for row in rows):
        lines.append(
            [case, *(_spread([v for (c, _, w), v in known.items() if (c, w) == (case, way)], 1) for way in ways)]
        )
    worst = []
    for way in ways:
        gaps = [v - known[c, s, "source"] for (c, s, w), v in known.items() if w == way and (c, s, "source") in known]
        worst.append(f"{min(gaps):+.1f}" if gaps else "")
    lines.append(["worst, against source", *worst])
    return markdown.table(["case", *ways], lines)


def _grouped(rows: Sequence[Row], *factors: str) -> Iterable[tuple[tuple[str, ...], list[Row]]]:
    keys = dict.fromkeys(tuple(str(row.cell[factor]) for factor in factors) for row in rows)
    for key in keys:
        yield key, [row for row in rows if tuple(str(row.cell[factor]) for factor in factors) == key]


def _values(rows: Sequence[Row], name: str, digits: int) -> str:
    return _spread([row.values[name] for row in rows], digits)


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"
