"""The table of suite `estimate`: errors of every witness, intervals on what was left out of the fit, kinds told and true."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from renorm.accuracy import FAR, SPREAD, Signals, combined, half_width, spread
from renorm.bench.base import Row
from renorm.bench.corruptions import CLEAN
from renorm.bench.markdown import table as markdown
from renorm.bench.strangers import Digits, XRays
from renorm.kind import Kind, Traces, classes_of, kind

__all__ = ["Fit", "Point", "fit", "points", "table"]

ABOUT = """The first 256 samples of each cell are looked at without their labels; the truth is the accuracy on 600 (400
photographs, and fewer where classes are left out). CIFAR sources are known from 200 lossless test images, the
photographs' from 400.
`@half` is the mean of an image and its corrupted copy. In `known` the profile is given, in `alone` nothing is.

Intervals: two spreads, where nothing moved and where the moments moved far. The second is what the network that needs the
most of it needs for nine in ten of its cells. A network left out is judged by what the others would have given it: how far
that falls short says how little networks foretell one of another kind. With two classes a broken model and its recalibrated
self agree by chance half of the time, and where one class alone is in the data a model that always says the same is wholly
right or wholly wrong: no witness can tell which. The digits network and that of X-rays are trained on the spot; one spread
throughout, set on the other three networks before these two were there, is the row "one spread".
"""
CLASSES = {"resnet8": 10, "resnet20": 10, "mobilenet_vww": 2, "digits_cnn": 10, "xray_cnn": 2}
FARS = tuple(float(value) for value in np.geomspace(0.005, 0.5, 25))
LEVEL = 0.9
BEFORE = 0.26  # the spread in use before the last two networks were there


@dataclass(frozen=True)
class Point:
    """One cell: what was measured and what was true."""

    row: Row

    @property
    def bed(self) -> str:
        return str(self.row.cell["bed"])

    @property
    def family(self) -> str:
        """The shift, whatever its strength and the classes that are left."""
        return str(self.row.cell["shift"]).partition("@")[0] + (" and fewer classes" if self.label else "")

    @property
    def label(self) -> bool:
        return bool(self.row.cell["classes"] < CLASSES[self.bed])

    @property
    def accuracy(self) -> float | None:
        return self.row.values.get("accuracy")

    @cached_property
    def truth(self) -> str:
        if self.accuracy is None:
            return "content"
        moved, mixed = self.row.cell["shift"] != CLEAN, self.label
        return {(False, False): "none", (True, False): "covariate", (False, True): "label"}.get(
            (moved, mixed), "covariate and label"
        )

    def signals(self, known: bool) -> Signals:
        v = self.row.values
        if known:
            return Signals(v["confidence"], v["agreement"], v["mixed"], v["threshold"], v["difference"], v["moved"])
        return Signals(v["confidence"], v["agreement"], None, None, None, v["moved_alone"])

    def told(self, known: bool) -> Kind:
        v = self.row.values
        values = v["moved"] if known else v["moved_alone"]
        own, evened = (v["classes"], v["classes_pooled"]) if known else (v["classes_alone"], v["classes_pooled"])
        sure = v["sure"] / v["home_confidence"] if known else None
        return kind(Traces(values, classes_of(own, evened, values=values, known=known), sure))


@dataclass(frozen=True)
class Fit:
    """The constants of an estimate, as some points would have them."""

    far: float
    ends: tuple[float, float]

    def error(self, point: Point, known: bool) -> float:
        return combined(point.signals(known), far=self.far) - (point.accuracy or 0.0)

    def covers(self, point: Point, known: bool) -> bool:
        found = point.signals(known)
        wide = spread(found.moved, self.ends, self.far)
        half = half_width(combined(found, far=self.far), int(point.row.values["samples"]), wide)
        return abs(self.error(point, known)) <= half


SPREADS = tuple(float(value) for value in np.linspace(0.0, 0.7, 71))


def fit(found: Sequence[Point], known: bool) -> Fit:
    """The `far` of the least mean absolute error, and the least spreads whose intervals hold the truth nine times in ten.

    First the one for what moved little, on the points that did, which are few; then the other, so that they hold it on each
    network: it is what the network that needs the most of it needs.
    """

    def mean_error(far: float) -> float:
        return float(np.mean([abs(Fit(far, (0.0, 0.0)).error(p, known)) for p in found]))

    far = min(FARS, key=mean_error)
    near = _least([p for p in found if p.signals(known).moved < far], known, far, lambda s: (s, s))
    networks = [[p for p in found if p.bed == bed] for bed in dict.fromkeys(p.bed for p in found)]
    return Fit(far, (near, max(_least(of, known, far, lambda s: (near, max(near, s))) for of in networks)))


def _least(found: Sequence[Point], known: bool, far: float, ends: Callable[[float], tuple[float, float]]) -> float:
    def enough(value: float) -> bool:
        return not found or bool(np.mean([Fit(far, ends(value)).covers(p, known) for p in found]) >= LEVEL)

    return next(filter(enough, SPREADS), SPREADS[-1])


def points(rows: Iterable[Row]) -> list[Point]:
    """The cells whose truth is known."""
    return [point for point in map(Point, rows) if point.accuracy is not None]


def table(rows: Sequence[Row]) -> str:
    """Witnesses, then the estimate with each network and each family left out, then kinds."""
    found = points(rows)
    if not found:
        return ABOUT
    parts = [ABOUT]
    cases = {(p.bed, p.row.cell["shift"], p.row.cell["classes"]) for p in found}
    parts.append(f"{len(found)} cells with a truth, {len(cases)} cases of network and shift.\n")
    for known in (True, False):
        parts.append(f"## Errors of the estimates, {'known' if known else 'alone'}\n")
        parts.append(_witnesses(found, known))
        parts.append(f"## Left out of the fit, {'known' if known else 'alone'}\n")
        parts.append(_left_out(found, known))
    parts += ["## Case by case, mean over seeds\n", _cases(found)]
    for known in (True, False):
        parts += [f"## Kind of shift, {'known' if known else 'alone'}\n", _kinds(list(map(Point, rows)), known)]
    return "\n".join(parts)


def _witnesses(found: Sequence[Point], known: bool) -> str:
    ways: dict[str, Callable[[Point], float | None]] = {
        "confidence": lambda p: p.signals(known).confidence,
        "ATC": lambda p: p.signals(known).threshold,
        "DoC": lambda p: p.signals(known).difference,
        "agreement": lambda p: p.signals(known).agreement,
        "agreement at equal mix": lambda p: p.signals(known).mixed,
        "**estimate**": lambda p: combined(p.signals(known)),
    }
    groups = {
        "all": found,
        "corruptions": [p for p in found if not p.label],
        "fewer classes": [p for p in found if p.label],
        "accuracy below 50 %": [p for p in found if (p.accuracy or 0) < 0.5],
    }
    lines = []
    for name, way in ways.items():
        line = [name]
        for members in groups.values():
            errors = [value - (p.accuracy or 0) for p in members if (value := way(p)) is not None]
            line.append(f"{np.mean(np.abs(errors)):.3f} ({np.mean(errors):+.3f})" if errors else "")
        if any(line[1:]):
            lines.append(line)
    return markdown(("mean absolute error (signed bias)", *groups), lines)


def _left_out(found: Sequence[Point], known: bool) -> str:
    whole = Fit(FAR, SPREAD[not known])
    lines = [["nothing: the constants in use", *_judged(whole, found, known)]]
    beds = list(dict.fromkeys(p.bed for p in found))
    lines += [[f"the same, on {bed}", *_judged(whole, [p for p in found if p.bed == bed], known)] for bed in beds]
    lines += [
        [f"one spread, on {bed}", *_judged(Fit(FAR, (BEFORE, BEFORE)), mine, known)]
        for bed in (Digits.name, XRays.name)
        if (mine := [p for p in found if p.bed == bed])
    ]
    for what, of in (("network", "bed"), ("family", "family")):
        pairs: list[tuple[Fit, Point]] = []
        for name in dict.fromkeys(getattr(p, of) for p in found):
            rest = [p for p in found if getattr(p, of) != name]
            out = [p for p in found if getattr(p, of) == name]
            if not rest:
                continue
            made = fit(rest, known)
            pairs += [(made, p) for p in out]
            if of == "bed":
                lines.append([f"{what} {name}", *_judged(made, out, known)])
        if pairs:
            errors = [abs(made.error(p, known)) for made, p in pairs]
            held = [made.covers(p, known) for made, p in pairs]
            lines.append(
                [f"each {what} in turn", "", "", f"{np.mean(errors):.3f}", f"{np.mean(held):.0%}", f"{len(pairs)}"]
            )
    return markdown(("left out", "far", "spreads", "mean absolute error", "interval holds the truth", "cells"), lines)


def _judged(made: Fit, found: Sequence[Point], known: bool) -> list[str]:
    error = np.mean([abs(made.error(p, known)) for p in found])
    held = np.mean([made.covers(p, known) for p in found])
    return [
        f"{made.far:.3f}",
        f"{made.ends[0]:.2f} to {made.ends[1]:.2f}",
        f"{error:.3f}",
        f"{held:.0%}",
        f"{len(found)}",
    ]


def _cases(found: Sequence[Point]) -> str:
    groups: dict[tuple[str, str, str], list[Point]] = {}
    for p in found:
        cell = p.row.cell
        groups.setdefault((p.bed, str(cell["shift"]), f"{cell['classes']} of {CLASSES[p.bed]}"), []).append(p)
    lines = []
    for names, members in groups.items():
        means = [
            np.mean([p.accuracy or 0 for p in members]),
            np.mean([combined(p.signals(True)) for p in members]),
            np.mean([combined(p.signals(False)) for p in members]),
            np.mean([p.row.values["threshold"] for p in members]),
            np.mean([p.row.values["confidence"] for p in members]),
            np.mean([p.row.values["moved"] for p in members]),
        ]
        lines.append([*names, *(f"{100 * mean:.0f}" for mean in means[:5]), f"{means[5]:.3f}"])
    head = ("network", "shift", "classes", "truth, %", "known", "alone", "ATC", "confidence", "moved at equal mix")
    return markdown(head, lines, words=3)


def _kinds(found: Sequence[Point], known: bool) -> str:
    said = [(p.truth, p.told(known)) for p in found]
    names = ("none", "covariate", "label", "covariate and label", "content")
    lines = []
    for true in names:
        told = [each.name for truth, each in said if truth == true]
        if told:
            lines.append([true, *(str(told.count(name)) if name in told else "" for name in names), f"{len(told)}"])
    parts = [markdown(("true, told →", *names, "cells"), lines)]
    bands = []
    for low, high in ((0.0, 0.5), (0.5, 0.7), (0.7, 0.9), (0.9, 1.01)):
        here = [(truth == each.name, each.sure) for truth, each in said if low <= each.sure < high]
        if here:
            right, sure = np.mean([r for r, _ in here]), np.mean([s for _, s in here])
            bands.append([f"{low:.0%} to {min(high, 1):.0%}", f"{sure:.0%}", f"{right:.0%}", f"{len(here)}"])
    parts.append(markdown(("claimed", "mean claim", "right", "cells"), bands))
    return "\n".join(parts)
