"""Moments by exact sums, channel after channel: the two-pass algorithm of Chan, Golub and LeVeque 1983."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Reference(NamedTuple):
    count: int
    mean: Array
    var: Array


def of_channel(values: list[float]) -> tuple[float, float]:
    """Mean and biased variance of some numbers."""
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((v - mean) ** 2 for v in values) / len(values)


def of(x: Array, axis: int = 1) -> Reference:
    """Moments of `x` per index of `axis`."""
    rows = [np.take(x, c, axis=axis).ravel().astype(float).tolist() for c in range(x.shape[axis])]
    pairs = [of_channel(row) for row in rows]
    return Reference(len(rows[0]), np.array([m for m, _ in pairs]), np.array([v for _, v in pairs]))


def of_images(x: Array, axis: int = 1) -> Reference:
    """Moments of the mean that every sample has in every channel."""
    means = np.array(
        [
            [math.fsum(values := np.take(image, c, axis=axis).ravel().tolist()) / len(values) for c in channels]
            for image in (x[n : n + 1] for n in range(x.shape[0]))
            for channels in [range(x.shape[axis])]
        ]
    )
    return of(means)


def pooled(parts: list[Array], axis: int = 1) -> Reference:
    """Moments of the values of several arrays together, which may differ in every size but the channels."""
    rows = [
        [v for part in parts for v in np.take(part, c, axis=axis).ravel().astype(float).tolist()]
        for c in range(parts[0].shape[axis])
    ]
    pairs = [of_channel(row) for row in rows]
    return Reference(len(rows[0]), np.array([m for m, _ in pairs]), np.array([v for _, v in pairs]))


def unbiased(reference: Reference) -> Array:
    """Variance as an estimate of the population's: divided by count − 1."""
    return reference.var * reference.count / (reference.count - 1)


def standard_error(images: Reference, var: Array) -> Array:
    """Standard error of the mean over images, in units of sqrt(var)."""
    return np.array([math.sqrt(v / images.count) / math.sqrt(s) for v, s in zip(unbiased(images), var, strict=True)])


def blend(source: Reference, target: Reference, weight: float, cross_term: bool = True) -> tuple[Array, Array]:
    """Moments of a population of which the share `weight` is source.

    By the law of total variance: the mean of the variances plus the variance of the means.
    """
    means, variances = [], []
    for ms, vs, mt, vt in zip(source.mean, source.var, target.mean, target.var, strict=True):
        mean = weight * ms + (1 - weight) * mt
        within = weight * vs + (1 - weight) * vt
        between = weight * (ms - mean) ** 2 + (1 - weight) * (mt - mean) ** 2
        means.append(mean)
        variances.append(within + (between if cross_term else 0.0))
    return np.array(means), np.array(variances)
