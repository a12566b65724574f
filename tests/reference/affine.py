"""Batch norm in evaluation, number by number."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def batch_norm(x: Array, mean: Array, var: Array, weight: Array, bias: Array, eps: float) -> Array:
    """`(x − mean) / sqrt(var + eps) · weight + bias` per channel. Shapes: x (N, C, *)."""
    out = np.empty_like(x, dtype=np.float64)
    for index in np.ndindex(*x.shape):
        c = index[1]
        out[index] = (x[index] - mean[c]) / math.sqrt(var[c] + eps) * weight[c] + bias[c]
    return out
