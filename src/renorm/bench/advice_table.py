"""The tables of suite `advice`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import isnan
from statistics import fmean, median

from renorm.bench.base import Row
from renorm.bench.intervals import paired
from renorm.bench.markdown import table as markdown

__all__ = ["CANDIDATES", "KNOWN", "STAY", "table"]

KNOWN = ("nothing", "a profile", "labels")
LEAVE = "leave it as it is"
CANDIDATES = (
    LEAVE,
    "recalibrate",
    "recalibrate with the profile",
    "recalibrate, source forgotten",
    "fine-tune",
)
STAY = ("Frozen (fine-tuning) or Group (from scratch)", "yes, recalibrated and then frozen", "yes")
HARM = 2.0  # points of error

ABOUT = """\
ResNet-20 (CIFAR-10) and MobileNetV1-0.25 (photographs: a person, or none), as published. 256 images are read. Nothing here is
simulated: errors of means are those of groups of images, errors of plans those on 800 (200) others.
"""
SETTINGS = """\
"Told" is the standard error of a batch's mean at the least certain layer, in source sd, as the advice has it from 256 images;
"measured" that of 2,000 (400) images in groups of that size. At most 0.2 is called enough. "Images" are those that leave 0.05;
"left" is what groups of so many leave, where there are four of them. Means over seeds; a choice is that of most seeds.
"""
PLANS = """\
The error of what was put first, beside that of leaving the model, and of the best of all that were tried (which nobody can
know beforehand). Each is applied to all 256 images.
"""
COST = """\
Median seconds of trying a candidate on both halves, as a multiple of those of leaving the model: its answers for 256 images.
"""
TIME = """\
Times as fast as the network as it is, one thread, ways taking turns.
"""


def table(rows: Sequence[Row]) -> str:
    """Settings, plans, what they cost, ways to run."""
    parts: dict[str, Callable[[Sequence[Row]], str]] = {"settings": _settings, "plan": _plans, "time": _times}
    text = [ABOUT]
    for part, made in parts.items():
        mine = [row for row in rows if row.cell["part"] == part]
        if mine:
            text.append(made(mine))
    return "\n".join(text)


def _settings(rows: Sequence[Row]) -> str:
    head = ("network", "data", "images a step", "told", "measured", "enough?", "momentum", "images", "left")
    lines = []
    for (bed, shift, batch), mine in _grouped(rows, "bed", "shift", "batch"):
        wanted = _most(row.values["wanted"] for row in mine)
        enough = "yes" if _most(row.values["enough"] for row in mine) else f"{wanted:.0f} or more"
        momentum = f"{_most(row.values['momentum'] for row in mine):g}"
        numbers = (_mean(mine, "told"), _mean(mine, "true"))
        rest = (f"{fmean(row.values['images'] for row in mine):,.0f}", _mean(mine, "left", 3))
        lines.append((bed, shift, batch, *numbers, enough, momentum, *rest))
    return "\n".join(["## Settings\n", SETTINGS, markdown(head, lines, words=2), _staying(rows), _narrow(rows)])


def _staying(rows: Sequence[Row]) -> str:
    lines = [
        (bed, shift, batch, STAY[int(_most(row.values["stay"] for row in mine))], _share(mine, "changed"))
        for (bed, shift, batch), mine in _grouped(rows, "bed", "shift", "batch")
    ]
    head = ("network", "data", "images a step", "stay with batch norm?", "answers that the batch changes")
    return markdown(head, lines, words=4)


def _narrow(rows: Sequence[Row]) -> str:
    lines = [
        (bed, shift, _share(mine, "narrow"), _share(mine, "near eps"))
        for (bed, shift), mine in _grouped(rows, "bed", "shift")
    ]
    return markdown(("network", "data", "answers that bfloat16 changes", "variances below ten eps"), lines, words=2)


def _plans(rows: Sequence[Row]) -> str:
    lines = []
    for (known,), mine in _grouped(rows, "known"):
        gains = [_chosen(row) - row.values[f"error, {LEAVE}"] for row in mine]
        lost = [_chosen(row) - _best(row) for row in mine]
        harmed = f"{sum(gain >= HARM for gain in gains)} of {len(gains)}"
        lines.append((known, str(len(mine)), paired(gains).text(), paired(lost).text(), harmed, f"{max(gains):+.1f}"))
    harm = f"worse than leaving by {HARM:g} or more"
    head = ("known", "cases", "chosen − left as it is", "chosen − best", harm, "largest harm")
    return "\n".join(["## Plans: error in points\n", PLANS, markdown(head, lines), _cases(rows), _costs(rows)])


def _cases(rows: Sequence[Row]) -> str:
    lines = []
    for (bed, shift, classes, known), mine in _grouped(rows, "bed", "shift", "classes", "known"):
        named = shift if classes != "1" else f"{shift}, one class only"
        first = CANDIDATES[int(_most(row.values["chosen"] for row in mine))]
        chosen, best = (f"{fmean(map(error, mine)):.1f}" for error in (_chosen, _best))
        lines.append((bed, named, known, first, _mean(mine, f"error, {LEAVE}", 1), chosen, best))
    head = ("network", "data", "known", "put first", "left as it is", "chosen", "best of all tried")
    return markdown(head, lines, words=4)


def _costs(rows: Sequence[Row]) -> str:
    lines = []
    for name in CANDIDATES[1:]:
        times = [_ratio(row, name) for row in rows if f"seconds, {name}" in row.values]
        if times:
            lines.append((name, f"{median(times):.1f}", f"{min(times):.1f}–{max(times):.1f}", str(len(times))))
    return "\n".join(["## What trying costs\n", COST, markdown(("candidate", "times", "range", "cases"), lines)])


def _times(rows: Sequence[Row]) -> str:
    ways = list(dict.fromkeys(way for row in rows for way in row.values))
    lines = [
        (
            row.cell["bed"],
            str(row.cell["batch"]),
            *(f"{row.values[way]:.2f}" if way in row.values else "–" for way in ways),
        )
        for row in rows
    ]
    return "\n".join(["## Which way to run it\n", TIME, markdown(("network", "images at once", *ways), lines)])


def _ratio(row: Row, name: str) -> float:
    return row.values[f"seconds, {name}"] / row.values[f"seconds, {LEAVE}"]


def _chosen(row: Row) -> float:
    return row.values[f"error, {CANDIDATES[int(row.values['chosen'])]}"]


def _best(row: Row) -> float:
    return min(value for name, value in row.values.items() if name.startswith("error, "))


def _grouped(rows: Sequence[Row], *factors: str) -> list[tuple[tuple[str, ...], list[Row]]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(str(row.cell[factor]) for factor in factors), []).append(row)
    return list(found.items())


def _most(values: Iterable[float]) -> float:
    held = list(values)
    return max(held, key=held.count)


def _mean(rows: Sequence[Row], name: str, digits: int = 2) -> str:
    values = [row.values[name] for row in rows if not isnan(row.values[name])]
    return f"{fmean(values):.{digits}f}" if values else "–"


def _share(rows: Sequence[Row], name: str) -> str:
    values = [row.values[name] for row in rows if not isnan(row.values[name])]
    return f"{fmean(values):.1%}" if values else "–"
