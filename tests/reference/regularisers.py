"""Slow float64 twins of the regularisers' penalties, from the papers' formulas."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def l2_sp(near: list[tuple[Array, Array]], fresh: list[Array], alpha: float, beta: float) -> float:
    """Li et al. 2018, eq. 3: pairs (w, w0), and the new head's w."""
    pull = sum((float(a) - float(b)) ** 2 for w, w0 in near for a, b in zip(w.ravel(), w0.ravel(), strict=True))
    size = sum(float(a) ** 2 for w in fresh for a in w.ravel())
    return 0.5 * alpha * pull + 0.5 * beta * size


def bss(features: Array, eta: float, k: int) -> float:
    """Chen et al. 2019, eq. 3, by the eigenvalues of the smaller Gram matrix; features (N, D)."""
    gram = features @ features.T if features.shape[0] <= features.shape[1] else features.T @ features
    return eta * float(np.sort(np.linalg.eigvalsh(gram))[:k].sum())


def relation(chances: Array, labels: NDArray[np.int64], classes: int) -> Array:
    """p(source class | target class): rows are means of (N, S) over the samples of each target class."""
    return np.array(
        [np.mean([p for p, y in zip(chances, labels, strict=True) if y == c], axis=0) for c in range(classes)]
    )


def co_tuning(logits: Array, wanted: Array, weight: float) -> float:
    """You et al. 2020, eq. 1: cross-entropy of the source head's logits (N, S) with the wanted shares (N, S)."""
    total = 0.0
    for row, share in zip(logits, wanted, strict=True):
        exps = [np.exp(v - row.max()) for v in row]
        total -= sum(s * np.log(e / sum(exps)) for s, e in zip(share, exps, strict=True))
    return weight * total / len(logits)


def delta(now: Array, source: Array, share: Array, weight: float) -> float:
    """Li et al. 2019, eq. 4, one layer: feature maps (N, C, *), attention (C,)."""
    samples, channels = now.shape[:2]
    total = 0.0
    for n in range(samples):
        for c in range(channels):
            gap = (now[n, c] - source[n, c]).ravel()
            total += channels * share[c] / gap.size * float(gap @ gap)
    return 0.5 * weight * total
