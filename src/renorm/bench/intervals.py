"""How sure a mean is: 95 % intervals of paired differences and of ratios of means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from renorm.errors import UsageError

__all__ = ["Interval", "paired", "ratio"]

LEVEL = 0.95
DRAWS = 4000  # bootstrap draws: the ends of a 95 % interval are then good to about 2 % of its width


class Interval(NamedTuple):
    """A mean over `pairs` pairs with the ends of its 95 % interval; in the values' unit."""

    mean: float
    low: float
    high: float
    pairs: int

    def text(self, digits: int = 1) -> str:
        """As in `+1.2 [+0.8, +1.6]`."""
        return f"{self.mean:+.{digits}f} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


def paired(differences: Sequence[float]) -> Interval:
    """The mean of paired differences with Student's t-interval; one difference alone has an infinite one.

    Each pair shares its images, its shift and its seed, so what the two sides have in common cancels.

    Raises:
        UsageError: there is no difference at all.
    """
    values = np.asarray(differences, dtype=float)
    if not values.size:
        raise UsageError("an interval of paired differences needs at least one pair; the rows in question are missing")
    mean, count = float(values.mean()), values.size
    if count == 1:
        return Interval(mean, -np.inf, np.inf, 1)
    from scipy import stats

    half = float(stats.t.ppf(0.5 + LEVEL / 2, count - 1) * values.std(ddof=1) / np.sqrt(count))
    return Interval(mean, mean - half, mean + half, count)


def ratio(numerators: Sequence[float], denominators: Sequence[float], *, seed: int = 0) -> Interval:
    """The ratio of two means with a percentile bootstrap interval over the pairs (Efron & Tibshirani 1993, ch. 13).

    A mean of single ratios would let pairs with a denominator near zero decide.

    Raises:
        UsageError: the sides differ in length, or there is no pair.
    """
    top, bottom = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    if top.shape != bottom.shape or not top.size:
        raise UsageError(f"a ratio of means needs pairs; found {top.size} numerators and {bottom.size} denominators")
    draws = np.random.default_rng(seed).integers(0, top.size, size=(DRAWS, top.size))
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = top[draws].mean(1) / bottom[draws].mean(1)
        low, high = np.nanquantile(spread, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
        return Interval(float(top.mean() / bottom.mean()), float(low), float(high), top.size)
