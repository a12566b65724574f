"""The table detective: which columns are in another unit, in each other's place, or hold nothing?

A column lies where its middle and its width are. Two ways of lying are `√(Δmiddle² / (width · width') + ln²(width' / width))`
apart, which grows alike where values are a thousand times too large and a thousand times too small. Sensors age, classes come
in other shares, and then every column moves: a mistake is a column that moved far more than the others, and that lies as it
should once a usual mistake is taken back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import combinations
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from renorm.columns import Columns, rows_of
from renorm.moments import Moments, Observed
from renorm.said import Said, listed, say

__all__ = ["FEWEST", "UNITS", "Mistake", "mistakes_among", "mistakes_in", "read_by", "renamed"]

Kind = Literal["unit", "swapped", "elsewhere", "constant"]
Lying = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Mistake:
    """Columns that do not hold what they held in training: `what` says in words what is the matter with them.

    `unit` names the mistake where the kind is "unit". `before` and `after` are distances, mean over the columns, as they came
    and with the mistake taken back; `usual` is how far nine in ten of the other columns lie at most.
    """

    kind: Kind
    columns: tuple[str, ...]
    what: str
    before: float
    after: float
    usual: float
    unit: str = ""

    @property
    def sure(self) -> bool:
        """Whether it has a name, and a remedy: statistics estimated on such a column would hide it."""
        return self.kind in ("unit", "swapped")

    @property
    def limit(self) -> float:
        """The distance beyond which such columns count as wrong."""
        return 0.0 if self.kind == "constant" else max(START, BEYOND * self.usual)

    @property
    def said(self) -> Said:
        """Which columns, and what is the matter with them."""
        more = len(self.columns) - SHOWN
        names = listed(self.columns[:SHOWN])
        if more > 0:
            names = say("{names} and {count:,} more", names=names, count=more)
        return say("{columns}: {what}", columns=names, what=self.what)

    def __str__(self) -> str:
        return str(self.said)


class Unit(NamedTuple):
    """A usual mistake: what stands there is `scale · right + offset`; `odd` where drift alone could look like it."""

    name: str
    scale: float
    offset: float
    said: Said
    odd: bool = False


def _times() -> Iterator[Unit]:
    for factor in (10, 100, 1000, 10_000, 100_000, 1_000_000, 1_000_000_000):
        yield Unit(f"x{factor}", factor, 0, say("values are {factor:,} times too large", factor=factor))
        yield Unit(f"/{factor}", 1 / factor, 0, say("values are {factor:,} times too small", factor=factor))


def _named() -> Iterator[Unit]:
    for name, scale, offset in (
        ("°F for °C", 1.8, 32.0),
        ("°C for °F", 1 / 1.8, -32 / 1.8),
        ("K for °C", 1.0, 273.15),
        ("°C for K", 1.0, -273.15),
        ("K for °F", 1 / 1.8, 273.15 - 32 / 1.8),
        ("°F for K", 1.8, 32 - 1.8 * 273.15),
    ):
        wrong, _, right = name.partition(" for ")
        yield Unit(name, scale, offset, say("values are in {wrong} where {right} is meant", wrong=wrong, right=right))
    yield Unit("negated", -1, 0, say("values have the other sign"))
    yield Unit("1 - x", -1, 1, say("values are 1 minus what they should be"), odd=True)
    yield Unit("100 - x", -1, 100, say("values are 100 minus what they should be"), odd=True)
    for factor, units in (
        (60, "s, min"),
        (3600, "s, h"),
        (24, "h, d"),
        (2.54, "cm, in"),
        (3.28084, "ft, m"),
        (1.609344, "km, mi"),
        (2.2046226, "lb, kg"),
        (28.349523, "g, oz"),
        (3.6, "km/h, m/s"),
        (57.29578, "°, rad"),
        (4.184, "kJ, kcal"),
        (6.894757, "kPa, psi"),
        (7.500617, "mmHg, kPa"),
        (101.325, "kPa, atm"),
    ):
        large = say("values are {factor:.4g} times too large ({units}?)", factor=factor, units=units)
        small = say("values are {factor:.4g} times too small ({units}?)", factor=factor, units=units)
        yield Unit(f"x{factor:.3g}", factor, 0, large, odd=True)
        yield Unit(f"/{factor:.3g}", 1 / factor, 0, small, odd=True)


UNITS: Mapping[str, Unit] = {unit.name: unit for unit in (*_times(), *_named())}  # the usual ones first
SCALED: Mapping[str, Said] = {
    "standardised": say("values were standardised (mean near 0, spread near 1), which the model does not want"),
    "between 0 and 1": say("values were brought to between 0 and 1, which the model does not want"),
}

# Set on 128 columns of gas sensors, known from their first two batches: 256 rows of each later batch, years later, as they
# are, lie at most 1.6 times as far as nine in ten of their other columns; rows of one gas alone at most 2.7 times (bench
# architectures has the mistakes that were planted, and what was found of them).
BEYOND = 3.0  # times as far as nine in ten of the other columns
START = 1.0  # distance below which nothing is asked: a factor of 2.7 around a middle of 0
REST = 0.35  # share of its distance that a mistake taken back may leave
CLEAR = math.log(2)  # what it may leave though the others lie nearer, where that is no tenth of its distance
SIMPLER = 0.5  # what a later unit may leave of what an earlier one leaves, to be named instead
EXACT = 0.5  # how far the others may lie where odd factors are told apart: two of these are 0.1 apart
WHOLE = 1.5  # distance of the middle column from which one mistake in all columns is asked about
WHOLE_LEFT = 1.0  # and what it may leave
# A gain that ages, or other shares of classes, move all columns by less than this, and a column that holds a few far values by
# more where only its sd is known: from training with the far values to rows without, by up to 150.
GAIN, SAFE = math.log(8), math.log(900)
FEW, ALONE = 4, 2.0  # with fewer other columns than FEW, they are taken to lie as far as this
FEWEST = 32  # rows below which nothing is asked
SHOWN = 6  # columns named in a sentence


def mistakes_in(known: Columns, seen: Columns) -> tuple[Mistake, ...]:
    """What is wrong with the columns `seen`, which stand in the order of those `known`; no column twice.

    Nothing is found in fewer than 32 rows. Where only moments are known, factors below 1,000 are not told from far values.
    """
    if min(known.moments.count, seen.moments.count) < FEWEST:
        return ()
    if known.quantiles is None or seen.quantiles is None:
        known, seen = known.alone(), seen.alone()
    here, there = known.lie(), seen.lie()
    live = (here[1] > 0) & (there[1] > 0)
    found = _Case(known, seen, here, there, live).judged() if bool(live.any()) else []
    # a category that one row in twenty held may well be absent: a column whose tenths were the same is not asked
    varied = here[1] > 0 if known.quantiles is None else known.quantiles[1:-1].std(0) > 0
    constant = [known.names[k] for k in (varied & (there[1] == 0)).nonzero()[:, 0].tolist()]
    if constant:
        what = say("one value in every row, where there were many in training")
        found.append(Mistake("constant", tuple(constant), what, len(constant), len(constant), 0.0))
    return tuple(_together(found))


def mistakes_among(
    batches: Sequence[Any], columns: Columns | None, held: Mapping[str, Moments], seen: Sequence[Mapping[str, Observed]]
) -> tuple[Mistake, ...]:
    """What is wrong with the columns in `batches`; nothing where they are no tables, or nothing tells how these should lie.

    That is told by `columns`, else by the first batch norm that reads the table itself: `held` are its statistics, `seen` what
    each batch sent into it.
    """
    rows = [rows_of(batch) for batch in batches]
    tables = [each for each in rows if each is not None]
    if not tables or len(tables) < len(rows):
        return ()
    known = columns if columns is not None else read_by(held, seen[0], tables[0])
    if known is None or len(known.names) != tables[0].shape[1]:
        return ()
    return mistakes_in(known, Columns.measure(tables))


def read_by(held: Mapping[str, Moments], seen: Mapping[str, Observed], rows: Tensor) -> Columns | None:
    """What a batch norm that reads the table itself knows of its columns; None where there is none.

    `held` are the statistics of each site, `seen` what the batch `rows` (N, C) sent into it.
    """
    own = Moments.of(rows.cpu())
    for name, observed in seen.items():
        moments = observed.values.to("cpu")
        alike = name in held and moments.mean.shape == own.mean.shape
        if alike and torch.allclose(moments.mean, own.mean) and torch.allclose(moments.var, own.var):
            names = tuple(f"column {k}" for k in range(rows.shape[1]))
            return Columns(names, held[name].to("cpu"), None, named=False)
    return None


def renamed(known: Columns, missing: Sequence[str], extra: Columns) -> dict[str, str]:
    """For each column of `known` that is `missing` the one of `extra` that it probably is: of like name, or like values."""
    found: dict[str, str] = {}
    lower = {name.lower().replace(" ", "_"): name for name in extra.names}
    here, there = known.alone().lie(), extra.alone().lie()
    for name in missing:
        near = get_close_matches(name.lower().replace(" ", "_"), list(lower), n=1)
        k = known.names.index(name)
        far = apart((here[0][k : k + 1], here[1][k : k + 1]), there)
        best = int(far.argmin()) if len(far) else 0
        if near:
            found[name] = lower[near[0]]
        elif len(far) and (far[best] < START or len(missing) == len(extra.names) == 1):
            found[name] = extra.names[best]
    return found


@dataclass(frozen=True)
class _Case:
    """Columns as they were `here` and are `there`; `live` have a width in both."""

    known: Columns
    seen: Columns
    here: Lying
    there: Lying
    live: Tensor

    @property
    def robust(self) -> bool:
        """Whether tenths are known, and not sd alone, which may be that of a few far values that other rows do not hold."""
        return self.known.quantiles is not None

    def judged(self) -> list[Mistake]:
        before, after = apart(self.here, self.there), self._taken_back()
        whole = self._whole(before, after)
        if whole is not None:
            return [whole]
        taken: set[int] = set()
        found: list[Mistake] = []
        for places, mistake in (*self._swapped(before), *self._units(before, after)):
            if not taken.intersection(places):
                taken.update(places)
                found.append(mistake)
        return [*found, *self._elsewhere(before, taken)]

    def _taken_back(self) -> dict[str, Tensor]:
        """For every mistake, how far each column lies when it is taken back."""
        middle, width = self.there
        found = {
            name: apart(self.here, ((middle - unit.offset) / unit.scale, width / abs(unit.scale)))
            for name, unit in UNITS.items()
            if self.robust or abs(math.log(abs(unit.scale))) > SAFE
        }
        moments = self.known.moments
        found["standardised"] = apart(self.here, (moments.mean + moments.sd * middle, moments.sd * width))
        if self.known.quantiles is not None and self.seen.quantiles is not None:
            least, most = self.known.quantiles[0], self.known.quantiles[-1]
            outside = (self.seen.quantiles[0] < -0.1) | (self.seen.quantiles[-1] > 1.1)
            far = apart(self.here, (least + (most - least) * middle, (most - least) * width))
            found["between 0 and 1"] = far.masked_fill(outside, torch.inf)
        return found

    def _whole(self, before: Tensor, after: Mapping[str, Tensor]) -> Mistake | None:
        """One mistake in all columns."""
        start = float(before[self.live].median())
        if start < WHOLE or int(self.live.sum()) < 2:
            return None
        best: tuple[str, float] | None = None
        for name, far in after.items():
            unit = UNITS.get(name)
            if unit is not None and (unit.offset or abs(math.log(abs(unit.scale))) < GAIN):
                continue
            left = float(far[self.live].median())
            if left <= min(WHOLE_LEFT, REST * start, SIMPLER * best[1] if best else math.inf):
                best = name, left
        if best is None:
            return None
        names = tuple(self.known.names[k] for k in self.live.nonzero()[:, 0].tolist())
        return Mistake("unit", names, _said(best[0]), start, best[1], best[1], best[0])

    def _units(self, before: Tensor, after: Mapping[str, Tensor]) -> list[tuple[list[int], Mistake]]:
        found = []
        for k in self._far(before, 1):
            usual, start = self._usual(before, [k]), float(before[k])
            most = min(max(usual, min(CLEAR, start / 10)), REST * start)
            best: tuple[str, float] | None = None
            for name, far in after.items():
                odd = name in UNITS and UNITS[name].odd and usual > EXACT
                if not odd and far[k] <= min(most, SIMPLER * best[1] if best else math.inf):
                    best = name, float(far[k])
            if start >= max(START, BEYOND * usual) and best:
                names = (self.known.names[k],)
                found.append(([k], Mistake("unit", names, _said(best[0]), start, best[1], usual, best[0])))
        return found

    def _swapped(self, before: Tensor) -> Iterator[tuple[list[int], Mistake]]:
        """Pairs that lie where they should in each other's place, the best first."""
        middle, width = self.there
        found = []
        for i, j in combinations(self._far(before, 2), 2):
            pair, other = torch.tensor([i, j]), torch.tensor([j, i])
            far = apart((self.here[0][pair], self.here[1][pair]), (middle[other], width[other]))
            if bool((far > REST * before[pair]).any()):
                continue
            usual = self._usual(before, [i, j])
            if bool((before[pair] >= max(START, BEYOND * usual)).all()) and bool((far <= usual).all()):
                names = (self.known.names[i], self.known.names[j])
                start, left = float(before[pair].mean()), float(far.mean())
                found.append(([i, j], Mistake("swapped", names, say("in each other's place"), start, left, usual)))
        yield from sorted(found, key=lambda each: each[1].after)

    def _elsewhere(self, before: Tensor, taken: set[int]) -> Iterator[Mistake]:
        for k in self._far(before, 1) if self.robust else []:
            usual = self._usual(before, [k, *taken])
            if k not in taken and before[k] >= max(START, BEYOND * usual):
                what = say("values lie far from where they lay in training, and other columns do not")
                yield Mistake("elsewhere", (self.known.names[k],), what, float(before[k]), float(before[k]), usual)

    def _usual(self, before: Tensor, without: Sequence[int]) -> float:
        """How far nine in ten of the other columns lie at most, and no less than chance alone puts them."""
        live = self.live.clone()
        live[list(without)] = False
        others = before[live]
        if len(others) < FEW:
            return max(ALONE, float(others.max()) if len(others) else 0.0)
        fewest = min(self.known.moments.count, self.seen.moments.count)
        return max(float(others.quantile(0.9)), 2 / math.sqrt(fewest))

    def _far(self, before: Tensor, count: int) -> list[int]:
        """The columns that could be far beyond the others when `count` of them are left out; others cannot."""
        places = self.live.nonzero()[:, 0]
        rest = before[places].sort().values[: max(len(places) - count, 0)]
        usual = float(rest.quantile(0.9)) if len(rest) >= FEW else 0.0
        far: list[int] = places[before[places] >= max(START, BEYOND * usual)].tolist()
        return far


def apart(one: Lying, other: Lying) -> Tensor:
    """How far two ways of lying are apart; infinite where a width is 0. Shapes: (C,)."""
    across = (other[0] - one[0]).square() / (one[1] * other[1])
    return (across + (other[1] / one[1]).log().square()).sqrt().nan_to_num(nan=torch.inf)


def _together(found: Iterable[Mistake]) -> Iterator[Mistake]:
    """Columns with one and the same mistake as one; pairs stay pairs."""
    groups: dict[tuple[object, ...], list[Mistake]] = {}
    for each in found:
        groups.setdefault((each.kind, each.unit, each.columns if each.kind == "swapped" else ()), []).append(each)
    for same in groups.values():
        names = tuple(name for each in same for name in each.columns)
        before, after = (sum(values) / len(same) for values in zip(*((m.before, m.after) for m in same), strict=True))
        first = same[0]
        yield Mistake(first.kind, names, first.what, before, after, max(m.usual for m in same), first.unit)


def _said(name: str) -> Said:
    return SCALED[name] if name in SCALED else UNITS[name].said
