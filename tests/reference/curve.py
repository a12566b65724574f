"""Standard errors of means, image by image in float64."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def single(images: Array, var: Array) -> float:
    """The error of one image's mean in sd `sqrt(var)`, root mean square over channels. Shapes: images (N, C, *), var (C,)."""
    total = 0.0
    for c in range(images.shape[1]):
        means = [image[c].mean() for image in images]
        centre = sum(means) / len(means)
        total += sum((m - centre) ** 2 for m in means) / (len(means) - 1) / var[c]
    return math.sqrt(total / images.shape[1])


def halves(batches: list[Array], var: Array) -> float:
    """The error of the mean of all, from how far the means of every other batch lie apart."""
    one, other = (np.concatenate(batches[start::2]) for start in (0, 1))
    total = 0.0
    for c in range(one.shape[1]):
        gap = np.mean([i[c].mean() for i in one]) - np.mean([i[c].mean() for i in other])
        total += gap * gap / var[c]
    share = math.sqrt(len(one) * len(other)) / (len(one) + len(other))
    return share * math.sqrt(total / one.shape[1])
