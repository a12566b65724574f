"""The table of suite `online`: mean errors by stream, regret against the source, and the targets with what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from renorm.bench.base import Row
from renorm.bench.corruptions import CLEAN
from renorm.bench.intervals import Interval, paired
from renorm.bench.markdown import table as markdown

__all__ = ["table"]

ABOUT = """\
Networks and images are described in `renorm/bench/beds.py`, streams in `renorm/bench/streams.py`. Errors are those of the
answers that a stream gave as the images came, nothing is answered twice. A way is a method of `renorm.online` with its
official defaults; `+profile` knows a profile of the source, `+guard` falls back to the source. Regret is a way's error minus
the source's on the same stream, paired by shift and seed, with a 95 % t-interval; below 0 is better. `as_it_is` is the data
without a corruption; for CIFAR-10 that is its JPEG version. A mean over fewer points than ours says how many. Time is the
processor's, on one thread beside other work, as a multiple of plain inference by the same code on the same kind of machine.
UnMix-TNS begins with random components, which shift every channel (see `renorm/online/unmix.py`): these small networks feel
that, and streams this short end before it has worn off. Gas sensors and heart beats come in time, patient after patient
(`renorm/bench/series.py`). A miss is left standing.
"""
FORWARD = ("batch", "prior", "ema", "unmix", "hybrid+profile", "lame")  # published, without gradients
OURS = "shrink+guard"
PUBLISHED = (*FORWARD, "tent", "eata", "rdumb", "roid", "tbr")


class Point(NamedTuple):
    """One stream: the error, in per cent, of every way on the same images in the same order."""

    bed: str
    shift: str
    stream: str
    batch: int
    seed: int
    values: dict[str, Mapping[str, float]]
    made: dict[str, tuple[str, str]]  # by which state of the code, and where

    def error(self, way: str) -> float:
        return self.values[way]["error"]


class Verdict(NamedTuple):
    """One target sentence, what was measured, and whether it holds."""

    target: str
    measured: str
    holds: bool


def table(rows: Sequence[Row], ways: Iterable[str]) -> str:
    """Targets first; then errors by stream and by shift, regret and worst regime of every way, and what it costs."""
    points, ways = _points(rows), list(ways)
    parts = [
        ABOUT,
        "## Targets\n",
        markdown(("target", "measured", "verdict"), map(_judged, _targets(points)), words=3),
    ]
    for bed in dict.fromkeys(p.bed for p in points):
        streams: dict[str, list[Point]] = {}
        shifts: dict[str, list[Point]] = {}
        for p in points:
            if p.bed == bed:
                streams.setdefault(f"{p.stream}, {p.batch}", []).append(p)
                if (p.stream, p.batch) == ("iid", 64):
                    shifts.setdefault(p.shift, []).append(p)
        parts += [f"## {bed}: error in %, mean over shifts and seeds, by stream\n", _errors(streams, ways)]
        if len(shifts) > 1:
            parts += [f"## {bed}: error in %, in random order, by shift\n", _errors(shifts, ways)]
    if orders := _published_orders(points):
        head = ("stream", "better", "than", "published", "here, difference", "")
        parts += ["## Published orders, on ResNet-20\n", PUBLISHED_ABOUT, markdown(head, orders, words=6)]
    parts += ["## Regret against the source, and where it is worst\n", _regrets(points, ways)]
    return "\n".join(parts)


PUBLISHED_ABOUT = """\
CIFAR-10-C at severity 5: single domains in batches of 64 by ResNet-18 (Gong et al. 2022), mixed domains by WRN-28 (the
benchmark of Doebler et al.), where two methods were more than 2 points apart. Their streams have 10,000 images a corruption,
in which methods with gradients move further than here.
"""
ORDERS = (  # stream, the better way, the worse one, their published errors
    ("iid", "batch", "source", "21.6 < 42.3"),
    ("iid", "tent", "batch", "18.8 < 21.6"),
    ("sorted", "source", "batch", "42.3 < 73.4"),
    ("sorted", "source", "tent", "42.3 < 76.4"),
    ("sorted", "batch", "tent", "73.4 < 76.4"),
    ("sorted", "lame", "source", "36.2 < 42.3"),
    ("mixed", "batch", "source", "33.8 < 43.5"),
)


def _published_orders(points: Sequence[Point]) -> Sequence[tuple[str, ...]]:
    lines = []
    for order, better, worse, published in ORDERS:
        gaps = [
            p.error(better) - p.error(worse)
            for p in points
            if p.bed == "resnet20" and _is(p, order) and {better, worse} <= p.values.keys()
        ]
        if gaps:
            gap = paired(gaps)
            verdict = (
                "the same" if gap.mean < 0 else "not the other way beyond chance" if gap.low <= 0 else "**another**"
            )
            lines.append((order, better, worse, published, gap.text(), verdict))
    return lines


def _points(rows: Sequence[Row]) -> list[Point]:
    found: dict[tuple[str, str, str, int, int], dict[str, Row]] = {}
    for row in rows:
        cell = row.cell
        kind = cell["stream"] + (" ×10" if cell["long"] else "")
        key = cell["bed"], cell["shift"], kind, cell["batch"], cell["seed"]
        found.setdefault(key, {})[cell["way"]] = row
    return [
        Point(*key, {way: row.values for way, row in rows.items()}, {w: (r.code, r.where) for w, r in rows.items()})
        for key, rows in found.items()
        if "source" in rows
    ]


def _regrets(points: Sequence[Point], ways: Sequence[str]) -> str:
    lines = []
    for way in ways:
        cases = _cases(points, way, "source")
        if not cases or way == "source":
            continue
        whole = paired([p.error(way) - p.error("source") for p in points if way in p.values])
        worst, gap = max(cases.items(), key=lambda case: case[1].mean)
        harmed = sum(interval.low > 0 and interval.mean > 0.5 for interval in cases.values())
        both = [(p.values[way], p.values["source"]) for p in points if way in p.values and p.batch == 64]
        alike = [p.values for p in points if p.batch == 64 and way in p.made and p.made[way] == p.made["source"]]
        times = [values[way]["milliseconds"] / values["source"]["milliseconds"] for values in alike]
        lines.append(
            [
                way,
                whole.text(),
                f"{harmed} of {len(cases)}",
                f"{gap.mean:+.1f}",
                worst,
                f"{np.median(times):.2f}" if times else "–",
                f"{max(mine['state_bytes'] for mine, _ in both) / 1000:.0f}" if both else "–",
            ]
        )
    head = ("way", "mean regret", "cells worse by > 0.5", "worst", "where", "time, × source", "state, kB")
    return markdown(head, lines, words=5)


def _cases(points: Sequence[Point], way: str, other: str) -> dict[str, Interval]:
    """For each stream: how much worse `way` is than `other`, over the seeds."""
    groups: dict[str, list[float]] = {}
    for p in points:
        if way in p.values and other in p.values:
            groups.setdefault(f"{p.bed}, {p.shift}, {p.stream}, batches of {p.batch}", []).append(
                p.error(way) - p.error(other)
            )
    return {case: paired(differences) for case, differences in groups.items()}


def _errors(columns: Mapping[str, Sequence[Point]], ways: Iterable[str]) -> str:
    """A line for each way that was tried, over the points at which ours was, or all where it was not."""
    lines = []
    for way in ways:
        cells = [_mean([p for p in points if OURS in p.values] or points, way) for points in columns.values()]
        if any(cell != "–" for cell in cells):
            lines.append([way, *cells])
    return markdown(["way", *columns], lines, words=1)


def _mean(points: Sequence[Point], way: str) -> str:
    """The mean error; of how many where that is not all, which is then another mean than the column's."""
    known = [p.error(way) for p in points if way in p.values]
    some = f" ({len(known)} of {len(points)})" if len(known) < len(points) else ""
    return f"{np.mean(known):.1f}{some}" if known else "–"


def _judged(verdict: Verdict) -> tuple[str, str, str]:
    return verdict.target, verdict.measured, "pass" if verdict.holds else "**miss**"


# ── targets ──


def _targets(points: Sequence[Point]) -> list[Verdict]:
    return [verdict for judge in JUDGES for verdict in judge(points)]


def _no_regret(points: Sequence[Point]) -> list[Verdict]:
    found = []
    for way in ("shrink+guard", "shrink+profile+guard"):
        cases = _cases(points, way, "source")
        if not cases:
            continue
        whole = paired([p.error(way) - p.error("source") for p in points if way in p.values])
        found.append(Verdict(f"{way}: mean regret at most 0", whole.text(), whole.mean <= 0))
        harmed = [case for case, gap in cases.items() if gap.low > 0 and gap.mean > 0.5]
        worst, gap = max(cases.items(), key=lambda case: case[1].mean)
        target = f"{way}: worse by more than 0.5 beyond the interval in at most 5 % of streams, never by more than 2"
        text = f"{len(harmed)} of {len(cases)}; largest mean {gap.text()} ({worst})"
        found.append(Verdict(target, text, len(harmed) <= 0.05 * len(cases) and gap.mean <= 2))
        for order in ("iid", "bursts", "sorted"):
            clean = [
                p.error(way) - p.error("source")
                for p in points
                if _is(p, order) and p.shift == CLEAN and way in p.values
            ]
            if clean:
                gap = paired(clean)
                most = 1.5 if order == "sorted" and "profile" in way else 0.5
                found.append(Verdict(f"{way}: clean, {order}: at most {most:g} worse", gap.text(), gap.mean <= most))
    return found


def _is(p: Point, order: str, batch: int = 64) -> bool:
    return p.stream == order and p.batch == batch


def _against_published(points: Sequence[Point]) -> list[Verdict]:
    found = []
    for bed in dict.fromkeys(p.bed for p in points):
        for order, batch, others, most in (
            ("iid", 64, PUBLISHED, 1.0),
            ("iid", 16, FORWARD, 1.0),
            ("iid", 1, FORWARD, 1.0),
            ("sorted", 64, ("source", *FORWARD), 0.0),
        ):
            here = [p for p in points if p.bed == bed and _is(p, order, batch) and OURS in p.values]
            gaps = {
                way: paired([p.error(OURS) - p.error(way) for p in here if way in p.values])
                for way in others
                if any(way in p.values for p in here)
            }
            if not gaps:
                continue
            best = max(gaps, key=lambda way: gaps[way].mean)
            gap = gaps[best]
            target = f"{bed}, {order}, batches of {batch}: {OURS} within {most:g} of the best of {len(gaps)} other ways"
            found.append(Verdict(target, f"{gap.text()} against {best}", gap.mean <= most))
    return found


def _orders(points: Sequence[Point]) -> list[Verdict]:
    """How much worse one stream is than another made of the same images."""
    found = []
    for bed in dict.fromkeys(p.bed for p in points):
        for way, order, batch, most in (
            ("shrink+guard", "bursts", 64, 3.0),
            ("shrink+guard", "iid", 1, 1.5),
            ("shrink+profile+guard", "bursts", 64, 2.0),
            ("shrink+profile+guard", "sorted", 64, 3.0),
            ("shrink+profile+guard", "iid", 1, 1.0),
        ):
            iid = {
                (p.shift, p.seed): p.error(way) for p in points if p.bed == bed and _is(p, "iid") and way in p.values
            }
            gaps = [
                p.error(way) - iid[p.shift, p.seed]
                for p in points
                if p.bed == bed and _is(p, order, batch) and way in p.values and (p.shift, p.seed) in iid
            ]
            if gaps:
                gap = paired(gaps)
                name = f"{bed}, {way}: {order}, batches of {batch}, within {most:g} of random order in batches of 64"
                found.append(Verdict(name, gap.text(), gap.mean <= most))
    return found


def _guarded(points: Sequence[Point]) -> list[Verdict]:
    found = []
    for way in ("tent+guard", "eata+guard", "rdumb+guard", "roid+guard", "tbr+guard"):
        cases = _cases(points, way, "source")
        if cases:
            worst, gap = max(cases.items(), key=lambda case: case[1].mean)
            target = f"{way}: never more than 1 worse than the source"
            found.append(Verdict(target, f"largest mean {gap.text()} ({worst})", gap.mean <= 1))
    return found


JUDGES: tuple[Callable[[Sequence[Point]], list[Verdict]], ...] = (_no_regret, _against_published, _orders, _guarded)
