"""`prior="auto"`, channel by channel in float64, from the images themselves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def blended(images: Array, mean: Array, var: Array, eps: float) -> tuple[float, Array, Array]:
    """The source's share, and the mean and biased variance to hold. Shapes: images (N, C, *), mean and var (C,)."""
    count, channels = images.shape[:2]
    z = 0.0
    for c in range(channels):
        of_images = [images[n, c].mean() for n in range(count)]
        centre = sum(of_images) / count
        spread = sum((m - centre) ** 2 for m in of_images) / (count - 1)
        z += spread / count / (var[c] + eps) / channels
    share = 0.1 + 0.9 * 20 * z / (1 + 20 * z)
    new_mean, new_var = [], []
    for c in range(channels):
        values = images[:, c].ravel()
        new_mean.append(share * mean[c] + (1 - share) * values.mean())
        new_var.append(np.exp(share * np.log(var[c]) + (1 - share) * np.log(values.var())))
    return share, np.array(new_mean), np.array(new_var)
