"""What a folded layer's numbers are, one by one: weights and biases of a layer that carries a scale and a shift."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def after(weight: Array, bias: Array, scale: Array, shift: Array) -> tuple[Array, Array]:
    """A layer followed by `scale · y + shift`. Shapes: weight (out, in / groups, *kernel)."""
    new = np.empty_like(weight)
    for index in np.ndindex(*weight.shape):
        new[index] = weight[index] * scale[index[0]]
    return new, np.array([bias[o] * scale[o] + shift[o] for o in range(len(bias))])


def before(weight: Array, bias: Array, scale: Array, shift: Array, groups: int) -> tuple[Array, Array]:
    """A layer that reads `scale · x + shift`. Shapes: weight (out, in / groups, *kernel), scale and shift (in,)."""
    new, added = np.empty_like(weight), np.array(bias)
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    for index in np.ndindex(*weight.shape):
        channel = index[0] // outputs * inputs + index[1]
        new[index] = weight[index] * scale[channel]
        added[index[0]] += weight[index] * shift[channel]
    return new, added
