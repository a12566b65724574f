"""How many images a stable estimate takes: the standard error of a layer's mean against how many were read, from one pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from renorm.moments import Moments, Observed, merge_all

__all__ = ["Curve", "curve"]


@dataclass(frozen=True)
class Curve:
    """The least certain site's error, in source standard deviations, root mean square over channels.

    site      its name
    single    the error of one image's mean; n independent images have `single / sqrt(n)`
    halves    (images, error) as measured: half the difference between the means of every other batch, so many read by then.
              Far above `single / sqrt(n)` the batches are no independent samples: they are ordered, or come in clusters
    images    how many were read
    """

    site: str
    single: float
    halves: tuple[tuple[int, float], ...]
    images: int

    def error(self, images: float) -> float:
        """The standard error to be expected of so many independent images."""
        return self.single / math.sqrt(images)

    def needed(self, error: float) -> int:
        """How many independent images bring the standard error down to `error`."""
        return max(2, math.ceil((self.single / error) ** 2))

    @property
    def clustered(self) -> float:
        """How many times larger the measured error is than that of independent images; 1 where nothing was measured."""
        ratios = [measured / self.error(images) for images, measured in self.halves[-3:]]
        return sum(ratios) / len(ratios) if ratios and self.single else 1.0


def curve(
    seen: Mapping[str, Observed], parts: Sequence[Mapping[str, Observed]], held: Mapping[str, Tensor]
) -> Curve | None:
    """The curve of the site that is least certain; None where no site saw two images.

    `parts` are the same pass batch by batch; `held` the variance, eps included, that each site divides by. Shapes: (C,).
    """
    single = {
        name: _rms((found.images.unbiased / held[name].to(found.images.mean)).sqrt())
        for name, found in seen.items()
        if name in held and found.images.count > 1
    }
    single = {name: value for name, value in single.items() if math.isfinite(value)}
    if not single:
        return None
    worst = max(single, key=lambda name: single[name])
    halves = []
    here = [part[worst].images for part in parts if worst in part]
    for count in range(2, len(here) + 1, 2):
        one, other = (merge_all(here[start:count:2]) for start in (0, 1))
        halves.append((int(one.count + other.count), _halved(one, other, held[worst])))
    return Curve(worst, single[worst], tuple(halves), int(seen[worst].images.count))


def _halved(one: Moments, other: Moments, var: Tensor) -> float:
    """The standard error of the mean of both, from how far the two lie apart: half of it where they are as large."""
    share = math.sqrt(one.count * other.count) / (one.count + other.count)
    return share * _rms((one.mean - other.mean) / var.to(one.mean).sqrt())


def _rms(values: Tensor) -> float:
    return float(torch.sqrt(values.double().square().mean()))
