"""What the layers give in training, in float64 NumPy, channel by channel from the values; `x` is (N, C, *)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
EPS = 1e-5


def columns(x: Array) -> list[Array]:
    """The values of each channel."""
    return [x[:, c].ravel() for c in range(x.shape[1])]


def by_moments(x: Array, mean: Sequence[float], var: Sequence[float], weight: Array, bias: Array) -> Array:
    """Each channel normalised by these moments."""
    y = np.empty_like(x)
    for c in range(x.shape[1]):
        y[:, c] = (x[:, c] - mean[c]) / np.sqrt(var[c] + EPS) * weight[c] + bias[c]
    return y


def batch(x: Array, weight: Array, bias: Array) -> Array:
    return by_moments(x, [v.mean() for v in columns(x)], [v.var() for v in columns(x)], weight, bias)


def moved(held: float, new: float, momentum: float) -> float:
    """An exponential average by torch's convention."""
    return (1 - momentum) * held + momentum * new


def weighed(x: Array, counts: Array) -> tuple[list[float], list[float], list[float]]:
    """Mean, biased and unbiased variance per channel, positions counted by `counts` (N, *)."""
    means, biased, unbiased = [], [], []
    flat = counts.ravel()
    for values in columns(x):
        mean = sum(w * v for w, v in zip(flat, values, strict=True)) / flat.sum()
        var = sum(w * (v - mean) ** 2 for w, v in zip(flat, values, strict=True)) / flat.sum()
        size = flat.sum() ** 2 / (flat**2).sum()
        means, biased = [*means, mean], [*biased, var]
        unbiased.append(var * size / (size - 1))
    return means, biased, unbiased


def blended(x: Array, mean: Array, var: Array, weight: Array, bias: Array, share: float) -> Array:
    means = [share * mean[c] + (1 - share) * v.mean() for c, v in enumerate(columns(x))]
    variances = [share * var[c] + (1 - share) * v.var() for c, v in enumerate(columns(x))]
    return by_moments(x, means, variances, weight, bias)


def shrink_share(x: Array, var: Array) -> float:
    count, channels = x.shape[:2]
    z = 0.0
    for c in range(channels):
        of_images = [float(x[n, c].mean()) for n in range(count)]
        centre = sum(of_images) / count
        spread = sum((m - centre) ** 2 for m in of_images) / (count - 1)
        z += spread / count / (var[c] + EPS) / channels
    return 0.1 + 0.9 * 20 * z / (1 + 20 * z)


def shrink(x: Array, mean: Array, var: Array, weight: Array, bias: Array, share: float) -> Array:
    means = [share * mean[c] + (1 - share) * v.mean() for c, v in enumerate(columns(x))]
    variances = [np.exp(share * np.log(var[c]) + (1 - share) * np.log(v.var())) for c, v in enumerate(columns(x))]
    return by_moments(x, means, variances, weight, bias)


def batch_renorm(x: Array, mean: Array, var: Array, weight: Array, bias: Array, r_max: float, d_max: float) -> Array:
    y = np.empty_like(x)
    for c, values in enumerate(columns(x)):
        here, held = np.sqrt(values.var() + EPS), np.sqrt(var[c] + EPS)
        r = min(max(here / held, 1 / r_max), r_max)
        d = min(max((values.mean() - mean[c]) / held, -d_max), d_max)
        y[:, c] = ((x[:, c] - values.mean()) / here * r + d) * weight[c] + bias[c]
    return y


def stochastic(x: Array, mean: Array, var: Array, weight: Array, bias: Array, chosen: Array) -> Array:
    by_batch, by_held = batch(x, weight, bias), by_moments(x, list(mean), list(var), weight, bias)
    return np.stack([(by_batch if chosen[c] else by_held)[:, c] for c in range(x.shape[1])], 1)


def per_domain(x: Array, ids: Sequence[int], weight: Array, bias: Array) -> Array:
    """Shapes: weight and bias (domains, C)."""
    y = np.empty_like(x)
    rows = np.asarray(ids)
    for domain in sorted(set(ids)):
        y[rows == domain] = batch(x[rows == domain], weight[domain], bias[domain])
    return y


def transferable_factor(source: Array, target: Array) -> Array:
    """(1 + α) / 2 per channel: more than 1 where the two domains are alike."""
    near = []
    for s, t in zip(columns(source), columns(target), strict=True):
        ratio = s.mean() / np.sqrt(s.var() + EPS) - t.mean() / np.sqrt(t.var() + EPS)
        near.append(1 / (1 + abs(ratio)))
    alpha = len(near) * np.array(near) / sum(near)
    return np.asarray((1 + alpha) / 2)


def soft(value: float, limit: float) -> float:
    return np.sign(value) * max(abs(value) - limit, 0.0)


def instance_aware(
    x: Array, mean: Sequence[float], var: Sequence[float], weight: Array, bias: Array, k: float
) -> Array:
    y = np.empty_like(x)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            values = x[n, c].ravel()
            size = values.size
            m = mean[c] + soft(values.mean() - mean[c], k * np.sqrt((var[c] + EPS) / size))
            v = var[c] + soft(values.var() - var[c], k * (var[c] + EPS) * np.sqrt(2 / (size - 1)))
            y[n, c] = (x[n, c] - m) / np.sqrt(v + EPS) * weight[c] + bias[c]
    return y


def group(x: Array, groups: int, weight: Array, bias: Array) -> Array:
    y = np.empty_like(x)
    size = x.shape[1] // groups
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            first = c // size * size
            values = x[n, first : first + size]
            y[n, c] = (x[n, c] - values.mean()) / np.sqrt(values.var() + EPS) * weight[c] + bias[c]
    return y
