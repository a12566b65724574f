"""The table of suite `recalibrate`: mean errors, and the issue's targets with what was measured against each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from renorm.bench.base import Row
from renorm.bench.corruptions import CLEAN
from renorm.bench.intervals import Interval, paired, ratio
from renorm.bench.markdown import table as markdown

__all__ = ["table"]

COLUMNS = {
    "source": "source",
    "update_bn": "torch `update_bn`",
    "fvcore": "fvcore `update_bn_stats`",
    "prior_0": "`prior=0`",
    "auto": '`prior="auto"`',
    "check": "auto, `check=` unlabelled",
    "check_32": "auto, `check=` 32 labels",
    "profile": "`source=profile`",
}
PEERS = ("update_bn", "fvcore")
CLASSES = {"resnet20": 10, "mobilenet_vww": 2}
COUNTS = (16, 64, 256, "all")


@dataclass(frozen=True)
class Point:
    """The errors, in per cent, of every way on the same images, shift and seed."""

    bed: str
    shift: str
    classes: int
    images: str | int
    seed: int
    errors: dict[str, float]

    @property
    def label_shifted(self) -> bool:
        return self.classes < CLASSES[self.bed]

    @property
    def helpful(self) -> bool:
        """A real covariate shift with all classes: where re-estimation should help."""
        return self.shift != CLEAN and not self.label_shifted


class Verdict(NamedTuple):
    """One target sentence, what was measured, and whether it holds."""

    target: str
    measured: str
    holds: bool


def table(rows: Sequence[Row]) -> str:
    """Targets first, then mean errors by number of images, shift by shift, and where only some classes are present."""
    points = _points(rows)
    parts = [ABOUT]
    beds = [bed for bed in CLASSES if any(point.bed == bed for point in points)]
    if len(beds) > 1:
        parts += ["## Targets, all networks together\n", _targets(points)]
    for bed in beds:
        here = [point for point in points if point.bed == bed]
        parts += [f"## {bed}: targets\n", _targets(here)]
        parts.append(f"## {bed}: error in %, mean over shifts and seeds, by number of adapting images\n")
        parts.append(_means(("images",), here, COUNTS, lambda p, count: not p.label_shifted and p.images == count))
        shifts = list(dict.fromkeys(point.shift for point in here))
        for count in ("all", 16):
            parts.append(f"## {bed}: error in % shift by shift, {count} images\n")
            parts.append(
                _means(
                    ("shift",),
                    here,
                    shifts,
                    lambda p, shift, count=count: p.shift == shift and p.images == count and not p.label_shifted,
                )
            )
        some = sorted(
            {(p.shift, p.classes) for p in here if p.label_shifted}, key=lambda c: (shifts.index(c[0]), -c[1])
        )
        parts.append(f"## {bed}: error in % where only some classes are present, all images\n")
        parts.append(_means(("shift", "classes"), here, some, lambda p, case: (p.shift, p.classes) == case))
    return "\n".join(parts)


ABOUT = """\
Networks, images and their parts are described in `renorm/bench/beds.py`, corruptions in
`renorm/bench/corruptions.py`. A seed chooses the images that adapt (for the photographs also those that are measured
and those of the source's profile); the error is measured on other images of the same shift and the same classes.
`as_it_is` is the data set without a corruption; for CIFAR-10 that is its JPEG version, for the photographs the clean
ones. Every way sees the same images in the same batches of 64. `check=` unlabelled looks at the images that adapt;
with 32 labels it looks at 32 other ones. Differences are paired, by shift and seed, with a 95 % t-interval; shares of
gain have a bootstrap interval. Gain is the source's error minus that of `prior="auto"` without a check, over the
corruptions with all classes and every number of images. A miss is left standing.
"""


def _points(rows: Sequence[Row]) -> list[Point]:
    """The rows of one (network, shift, classes, images, seed) together."""
    found: dict[tuple[str, str, int, str | int, int], dict[str, float]] = {}
    for row in rows:
        cell = row.cell
        key = cell["bed"], cell["shift"], cell["classes"], cell["images"], cell["seed"]
        found.setdefault(key, {})[cell["way"]] = row.values["error"]
    # The source's error is measured once, beside all images, and holds for any number of them.
    for (bed, shift, classes, _, seed), errors in found.items():
        whole = found.get((bed, shift, classes, "all", seed), {})
        if "source" in whole:
            errors.setdefault("source", whole["source"])
    return [Point(*key, errors) for key, errors in found.items()]


def _means(head: Sequence[str], points: Sequence[Point], groups: Iterable[object], belongs: Callable[..., bool]) -> str:
    """A line per group with the mean error of each way over the points that belong to it."""
    lines = []
    for group in groups:
        name = [str(part) for part in (group if isinstance(group, tuple) else (group,))]
        members = [point for point in points if belongs(point, group)]
        values = [[point.errors[way] for point in members if way in point.errors] for way in COLUMNS]
        if any(values):
            lines.append([*name, *(f"{np.mean(v):.1f}" if v else "–" for v in values)])
    return markdown([*head, *COLUMNS.values()], lines, words=len(head))


def _targets(points: Sequence[Point]) -> str:
    verdicts = [verdict for judge in JUDGES for verdict in judge(points)]
    return markdown(("target", "measured", "verdict"), map(_judged, verdicts), words=3)


def _judged(verdict: Verdict) -> tuple[str, str, str]:
    return verdict.target, verdict.measured, "pass" if verdict.holds else "**miss**"


# ── targets ──


def _pairs(points: Iterable[Point], way: str, other: str) -> list[float]:
    return [p.errors[way] - p.errors[other] for p in points if way in p.errors and other in p.errors]


def _best(points: Sequence[Point], ways: Sequence[str]) -> str | None:
    """Of `ways`, the one with the lowest mean error."""
    means = {way: [p.errors[way] for p in points if way in p.errors] for way in ways}
    known = {way: float(np.mean(values)) for way, values in means.items() if values}
    return min(known, key=lambda way: known[way]) if known else None


def _against(points: Sequence[Point], way: str, others: Sequence[str], target: str, most: float) -> list[Verdict]:
    """Whether `way` minus the best of `others` is at most `most` points, on average over `points`."""
    best = _best(points, others)
    pairs = _pairs(points, way, best) if best else []
    if not best or not pairs:
        return []
    gap = paired(pairs)
    return [Verdict(target, f"{gap.text()} against {COLUMNS[best]}", gap.mean <= most)]


def _averages(points: Sequence[Point]) -> list[Verdict]:
    found = []
    for count in COUNTS:
        here = [p for p in points if p.images == count and not p.label_shifted]
        target = f"{count} images: auto no worse than the better peer and the source, on average"
        found += _against(here, "auto", (*PEERS, "source"), target, 0.0)
    here = [p for p in points if p.images == "all" and not p.label_shifted]
    return found + _against(here, "auto", PEERS, "all images: auto 1 point ahead of the better peer", -1.0)


def _harm(points: Sequence[Point]) -> list[Verdict]:
    cases = _cases([p for p in points if not p.helpful], "check")
    if not cases:
        return []
    worst, gap = max(cases.items(), key=lambda case: case[1].mean)
    over = sum(interval.mean > 0.5 for interval in cases.values())
    target = "harm cases, `check=` unlabelled: at most 0.5 points worse than the source"
    return [Verdict(target, f"{over} of {len(cases)} cases above; worst {gap.text()} ({worst})", over == 0)]


def _kept(points: Sequence[Point]) -> list[Verdict]:
    found = []
    for way, share in (("check", 0.70), ("check_32", 0.80), ("profile", 0.95)):
        here = [p for p in points if p.helpful and {way, "auto", "source"} <= p.errors.keys()]
        if not here:
            continue
        gains = [p.errors["source"] - p.errors["auto"] for p in here]
        kept = ratio([p.errors["source"] - p.errors[way] for p in here], gains)
        text = f"{100 * kept.mean:.0f} % [{100 * kept.low:.0f}, {100 * kept.high:.0f}]"
        found.append(
            Verdict(f"{COLUMNS[way]}: at least {100 * share:.0f} % of the gain kept", text, kept.mean >= share)
        )
    return found


def _never_worse(points: Sequence[Point]) -> list[Verdict]:
    cases = _cases(points, "profile")
    if not cases:
        return []
    worse = [case for case, gap in cases.items() if gap.low > 0]
    worst, gap = max(cases.items(), key=lambda case: case[1].mean)
    text = f"{len(worse)} of {len(cases)} cases; largest mean {gap.text()} ({worst})"
    return [Verdict("`source=profile`: never worse than the source beyond the paired interval", text, not worse)]


def _label_shift(points: Sequence[Point]) -> list[Verdict]:
    here = [p for p in points if p.label_shifted]
    target = "some classes only: profile 10 points better than plain re-estimation"
    return _against(here, "profile", (*PEERS, "prior_0"), target, -10.0)


def _cases(points: Iterable[Point], way: str) -> dict[str, Interval]:
    """For each shift, classes and number of images: how much worse than the source `way` is, over the seeds."""
    groups: dict[str, list[Point]] = {}
    for p in points:
        groups.setdefault(f"{p.bed}, {p.shift}, {p.classes} of {CLASSES[p.bed]} classes, {p.images} images", []).append(
            p
        )
    pairs = {case: _pairs(members, way, "source") for case, members in groups.items()}
    return {case: paired(differences) for case, differences in pairs.items() if differences}


JUDGES = (_averages, _harm, _kept, _never_worse, _label_shift)
