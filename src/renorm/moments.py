"""Per-channel moments as values with an algebra: measure, merge, blend.

Everything renorm knows about data is one of these. Axes are written `(N, C, *)`: N samples, C channels, the rest positions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from renorm.errors import BatchError, UsageError

S = TypeVar("S", float, Tensor)


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and biased variance of `count` values per channel; `merge` of any split equals `of` the whole.

    Shapes: mean and var (C,), float64 on the device of the values (on the CPU where the device has no float64, as MPS).
    `count` is `math.inf` for moments that are known rather than measured, such as the statistics a layer holds.
    """

    count: float
    mean: Tensor
    var: Tensor

    @classmethod
    def of(cls, x: Tensor, *, axis: int = 1) -> Moments:
        """Moments of `x` per index of `axis`, over all other axes, computed in float64.

        Shapes: x (N, C, *), any rank of at least two (with `axis=1`); a vector is (N,) values of one channel.
        Raises BatchError when `x` holds no values.
        """
        x = x.detach()
        if x.dim() == 1:
            x = x[:, None]
        channels = x.shape[axis]
        if x.numel() == 0:
            raise BatchError(
                f"moments were asked of a tensor of shape {tuple(x.shape)}, which holds no values; "
                "pass at least one sample per channel."
            )
        values = as_float64(x).movedim(axis, 0).reshape(channels, -1)
        var, mean = torch.var_mean(values, dim=1, correction=0)
        return cls(values.shape[1], mean, var)

    @property
    def sd(self) -> Tensor:
        """Square root of the biased variance, (C,)."""
        return self.var.sqrt()

    @property
    def unbiased(self) -> Tensor:
        """Variance times n/(n−1), what torch stores in `running_var`, (C,); the biased one where the count is 1 or unknown."""
        if math.isinf(self.count) or self.count <= 1:
            return self.var
        return self.var * (self.count / (self.count - 1))

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of values together, without cancellation (Chan, Golub and LeVeque 1983, eq. 2.1)."""
        if math.isinf(self.count) or math.isinf(other.count):
            raise UsageError(
                "moments with an unknown count (a layer's own statistics) were asked to merge; "
                "use `blend` with a weight instead."
            )
        count = self.count + other.count
        share = other.count / count
        return self._mix(other, share, cross_term=True, count=count)

    def blend(
        self, target: Moments, *, source_weight: float | Tensor, cross_term: bool = True, geometric: bool = False
    ) -> Moments:
        """These moments, counted `source_weight`, mixed with `target`'s, counted the rest; the count is the target's.

        With w = `source_weight` the mean is `w μs + (1−w) μt` and the variance `w σs² + (1−w) σt² + w(1−w)(μs−μt)²`: the
        moments of a population that is w source. `cross_term=False` leaves the last term out, as Schneider et al. 2020
        (eq. 4) and most of the literature do; `geometric=True` takes `σs²^w · σt²^(1−w)` instead, which is halfway in scale
        at w = ½ however far apart the two are. w = 1 gives the source, w = 0 the target, whichever is chosen.

        Shapes: source_weight a number or (C,), within [0, 1].
        Raises UsageError for a weight outside [0, 1].
        """
        weight = torch.as_tensor(source_weight, dtype=torch.float64, device=self.mean.device)
        if not bool(((weight >= 0) & (weight <= 1)).all()):
            raise UsageError(f"source_weight is a share of the source in [0, 1]; got {source_weight}.")
        mixed = self._mix(target, 1 - weight, cross_term=cross_term, count=target.count)
        if geometric:
            return Moments(target.count, mixed.mean, self.var.pow(weight) * target.var.pow(1 - weight))
        return mixed

    def _mix(self, other: Moments, share: float | Tensor, *, cross_term: bool, count: float) -> Moments:
        gap = other.mean - self.mean
        # one minus the share, not (1 - share) folded into a lerp: both ends must come out exactly
        var = (1 - share) * self.var + share * other.var
        if cross_term:
            var = var + share * (1 - share) * gap.square()
        return Moments(count, (1 - share) * self.mean + share * other.mean, var)

    def without(self, part: Moments) -> Moments:
        """What is left when the values of `part`, which are among these, are taken away: `merge` undone, up to rounding."""
        count = self.count - part.count
        mean = (self.mean * self.count - part.mean * part.count) / count
        share = count / self.count
        spread = self.var - (1 - share) * part.var - share * (1 - share) * (mean - part.mean).square()
        return Moments(count, mean, (spread / share).clamp_min(0))

    def to(self, device: torch.device | str) -> Moments:
        """The same moments on another device."""
        return Moments(self.count, self.mean.to(device), self.var.to(device))


class Observed(NamedTuple):
    """What one pass measured at a place: moments of all N·H·W `values`, and moments of the N per-image means (`images`)."""

    values: Moments
    images: Moments

    @classmethod
    def of(cls, x: Tensor, *, axis: int = 1) -> Observed:
        """Both moments of `x`. Shapes: x (N, C, *)."""
        return cls(Moments.of(x, axis=axis), Moments.of(image_means(x, axis=axis)))

    def merge(self, other: Observed) -> Observed:
        """What both passes measured together."""
        return Observed(self.values.merge(other.values), self.images.merge(other.images))

    def without(self, part: Observed | None) -> Observed:
        """What is left without `part`, up to rounding; everything where that is None."""
        return self if part is None else Observed(self.values.without(part.values), self.images.without(part.images))

    def standard_error(self, var: Tensor) -> Tensor:
        """Standard error of the mean in units of the standard deviation `sqrt(var)`, with images as the independent samples.

        Shapes: var and the result (C,). Infinite for a single image: its mean says nothing about the spread of means.
        """
        if self.images.count <= 1:
            return torch.full_like(self.images.mean, math.inf)
        return (self.images.unbiased / self.images.count / var.clamp_min(TINY)).sqrt()


TINY = 1e-12  # below any variance a trained layer holds, above the square of float32's rounding at unit scale

# Both set on ResNet-20 (CIFAR-10) and MobileNet (VWW), some twenty shifts each, 16 images to all of them.
FLOOR = (
    0.10  # the source's share however many images there are: its own train/test gap does not shrink with more of them
)
NOISE = 20.0  # squared standard errors of the mean (source sd) count this much against the target


def source_share(z: S, *, floor: float = FLOOR, noise: float = NOISE) -> S:
    """The source's share by the noise of the target's moments: `floor + (1 − floor) · noise z / (1 + noise z)`, 1 at z = ∞.

    z is the mean over channels of the squared standard error of the target's mean, in source standard deviations.
    """
    return 1 - (1 - floor) / (1 + noise * z)


def merge_all(moments: Iterable[Moments]) -> Moments:
    """Moments of all the values together."""
    return functools.reduce(Moments.merge, moments)


def image_means(x: Tensor, *, axis: int = 1) -> Tensor:
    """Mean of every sample and channel over positions, at least float32. Shapes: x (N, C, *) → (N, C)."""
    x = x.detach()
    if x.dim() == 1:
        x = x[:, None]
    x = x.movedim(axis, 1)
    if x.dim() == 2:
        return x if x.dtype in (torch.float32, torch.float64) else x.float()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.mean(dim=tuple(range(2, x.dim())), dtype=wide)


def as_float64(x: Tensor) -> Tensor:
    """`x` in float64, on the CPU where its device has none (MPS)."""
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)
