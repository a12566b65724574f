"""Columns of a table by hand: where a column lies, and how far two ways of lying are apart, value by value in float64."""

from __future__ import annotations

import math

import numpy as np


def lie(values: list[float]) -> tuple[float, float]:
    """Mean and sd of the nine inner tenths, by a normal distribution's; of all values where the tenths are the same."""
    tenths = [_tenth(sorted(values), k) for k in range(1, 10)]
    middle, width = _mean_sd(tenths)
    return (middle, width / 0.7794) if width > 0 else _mean_sd(values)


def apart(one: tuple[float, float], other: tuple[float, float]) -> float:
    (m, s), (n, t) = one, other
    return math.sqrt((n - m) ** 2 / (s * t) + math.log(t / s) ** 2)


def _tenth(ordered: list[float], k: int) -> float:
    place = k * (len(ordered) - 1) / 10
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _mean_sd(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def moments(table: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and biased variance of each column."""
    pairs = [_mean_sd([float(v) for v in column]) for column in table.T]
    return [mean for mean, _ in pairs], [sd**2 for _, sd in pairs]
