"""What a repaired layer's numbers are, one by one."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def layer(weight: Array, bias: Array, x: Array, goal: Array, *, scales: bool) -> tuple[Array, Array]:
    """A linear layer whose outputs on `x` have the mean (and spread) of `goal`. Shapes: x (N, in), goal (N, out)."""
    new, shifted = np.array(weight), np.array(bias)
    for o in range(len(bias)):
        given = [float(sum(weight[o, i] * row[i] for i in range(len(row))) + bias[o]) for row in x]
        mean, wanted = sum(given) / len(given), sum(goal[:, o]) / len(goal)
        spread = math.sqrt(sum((v - mean) ** 2 for v in given) / len(given))
        aimed = math.sqrt(sum((v - wanted) ** 2 for v in goal[:, o]) / len(goal))
        scale = aimed / spread if scales else 1.0
        for i in range(weight.shape[1]):
            new[o, i] = weight[o, i] * scale
        shifted[o] = (bias[o] - mean) * scale + wanted
    return new, shifted


def norm(seen: Array, told: Array, mean: Array, var: Array) -> tuple[Array, Array]:
    """What a batch norm that reads `seen` must hold, where its source read `told` and held mean and var. Shapes: (N, C)."""
    held = np.array(mean), np.array(var)
    for c in range(len(mean)):
        ratio = seen[:, c].std() / told[:, c].std()
        held[0][c] = seen[:, c].mean() + ratio * (mean[c] - told[:, c].mean())
        held[1][c] = var[c] * ratio**2
    return held
