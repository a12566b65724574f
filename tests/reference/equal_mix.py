"""Equal label mix, channel by channel in float64, from images themselves rather than from kept sums."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def at_mix(images: Array, labels: NDArray[np.int64], mix: Array) -> tuple[Array, Array]:
    """Mean and biased variance per channel of a population with classes `mix`. Shapes: images (N, C, *), labels (N,)."""
    means, variances = [], []
    for c in range(images.shape[1]):
        first = second = 0.0
        for k, share in enumerate(mix):
            values = images[labels == k, c].ravel()
            first += share * values.mean()
            second += share * (values**2).mean()
        means.append(first)
        variances.append(second - first**2)
    return np.array(means), np.array(variances)


def equal_mix(
    target: tuple[Array, Array],
    there: tuple[Array, Array],
    home: tuple[Array, Array],
    eps: float,
    widest: float,
) -> tuple[Array, Array]:
    """What the target's (mean, variance) would be at the source's own class mix."""
    mean, var = [], []
    for t, tv, mu_pi, v_pi, mu_0, v_0 in zip(*target, *there, *home, strict=True):
        a = min(max(np.sqrt((tv + eps) / (v_pi + eps)), 1 / widest), widest)
        mean.append(t + a * (mu_0 - mu_pi))
        var.append(a * a * v_0)
    return np.array(mean), np.array(var)


def class_mix(probabilities: Array, prior: Array, rounds: int, belief: Array | None = None) -> Array:
    """Saerens et al. 2002: posteriors reweighted by the mix they imply, sample after sample; shares believed by a power."""
    mix = prior.copy()
    for _ in range(rounds):
        total = np.zeros_like(mix)
        for row in probabilities:
            weighted = row * mix / prior
            total += weighted / weighted.sum()
        mix = total / len(probabilities)
        if belief is not None:
            powers = [p * (m / p) ** b for p, m, b in zip(prior, mix, belief, strict=True)]
            mix = np.array(powers) / sum(powers)
    return mix
