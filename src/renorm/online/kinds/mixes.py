"""Moments of a stream at one site, at a class mix other than the one in which its images came; all in source units."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from renorm.moments import TINY

Pair = tuple[Tensor, Tensor]  # mean and variance
WIDEST = 30.0  # the factor between standard deviations of target and source that is believed


class Tally(NamedTuple):
    """Sums over samples, by group of classes, of a site's moments. Shapes: (G,), (G, C), (G, C)."""

    samples: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def empty(cls, groups: int, channels: int) -> Tally:
        """Nothing booked yet."""
        size = (groups, channels)
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in (groups, size, size)))

    def plus(self, count: Tensor, first: Tensor, second: Tensor) -> Tally:
        """With samples of these moments more, `count` (G,) of each group."""
        each = count[:, None]
        return Tally(self.samples + count, self.first + each * first, self.second + each * second)

    def times(self, share: float) -> Tally:
        """Every sample counted `share`."""
        return Tally(self.samples * share, self.first * share, self.second * share)

    def even(self) -> Pair:
        """Mean and variance with all groups that were seen counted the same, those of a single sample half. Shapes: (C,)."""
        weights = self.samples / (self.samples + 1)
        each = (weights / weights.sum().clamp_min(TINY) / self.samples.clamp_min(TINY))[:, None]
        mean = (each * self.first).sum(0)
        return mean, ((each * self.second).sum(0) - mean.square()).clamp_min(TINY)

    def pooled(self) -> Pair:
        """Mean and variance of all samples alike. Shapes: (C,)."""
        total = self.samples.sum().clamp_min(TINY)
        mean = self.first.sum(0) / total
        return mean, (self.second.sum(0) / total - mean.square()).clamp_min(TINY)


class Counts(NamedTuple):
    """What came so far, older samples counted less: how many, and by class. Shapes: (K,) each.

    classes   sums of probabilities
    chosen    answers
    pure      sums of probabilities, less where a batch has less of a class than the source: those may be mistakes
    """

    images: float = 0.0
    classes: Tensor | None = None
    chosen: Tensor | None = None
    pure: Tensor | None = None

    def plus(self, mean: Tensor, rows: Tensor, share: float, prior: Tensor | None) -> Counts:
        """With a batch of these probabilities more, (N, K), taken for this class mix, and all before it counted `share`."""
        samples = len(rows)
        chosen = torch.bincount(rows.argmax(1), minlength=rows.shape[1]).double()
        pure = None if prior is None else samples * mean * (mean / prior.clamp_min(TINY)).clamp_max(1)
        old = self.classes, self.chosen, self.pure
        new = samples * mean, chosen, pure
        kept = (b if a is None or b is None else share * a + b for a, b in zip(old, new, strict=True))
        return Counts(share * self.images + samples, *kept)

    def state(self) -> dict[str, Tensor]:
        """As named tensors, but for the number of images."""
        return {key: value.clone() for key, value in self._asdict().items() if isinstance(value, Tensor)}


def moved(mean: Tensor, var: Tensor, *, eps: Tensor) -> float:
    """`Shift.moved` from the source, whose moments are 0 and 1, to these. Shapes: (C,), (C,), eps in the same unit (C,)."""
    ratio = (var + eps) / (1 + eps)
    return float((mean.square() / (1 + eps) + (0.5 * ratio.log()).square()).clamp_max(4).mean())


def at_home(mean: Tensor, var: Tensor, there: Pair, home: Pair, *, eps: Tensor) -> Pair:
    """`methods.equal_mix.equal_mix` in source units: the target's moments at the source's own class mix. Shapes: all (C,)."""
    scale2 = _scale2(var, there, eps)
    return mean + scale2.sqrt() * (home[0] - there[0]), scale2 * home[1]


def class_by_class(tally: Tally, there: Pair, classes: Pair, prior: Tensor, own: Tensor, *, eps: Tensor) -> Pair:
    """The target's moments at the class mix `prior`: of each class its own by the share `own`, else as the source's moved.

    A class of the source moves as the whole does from `there`, the source's moments at the mix that came; with `own` 0 this is
    `at_home`. Shapes: tally of G = K groups, there (C,), classes (K, C), prior and own (K,), eps (C,); result (C,).
    """
    mean, var = tally.pooled()
    scale2 = _scale2(var, there, eps)
    as_source = mean + scale2.sqrt() * (classes[0] - there[0])
    samples, share, mix = (each[:, None] for each in (tally.samples.clamp_min(TINY), own, prior))
    first = share * tally.first / samples + (1 - share) * as_source
    second = share * tally.second / samples + (1 - share) * (scale2 * classes[1] + as_source.square())
    whole = (mix * first).sum(0)
    return whole, ((mix * second).sum(0) - whole.square()).clamp_min(TINY)


def _scale2(var: Tensor, there: Pair, eps: Tensor) -> Tensor:
    return ((var + eps) / (there[1] + eps)).clamp(WIDEST**-2, WIDEST**2)


def variety(chosen: Tensor) -> float:
    """How many of the classes that so many answers could show they do show, in [0, 1]: 0 for a single one.

    As the inverse of the sum of squared shares, against the number of classes or a quarter of the answers, whichever is
    smaller. Shapes: chosen (K,), answers of each class.
    """
    total = float(chosen.sum())
    most = min(len(chosen), total / 4)
    if most <= 1:
        return 0.0
    kinds = total**2 / float(chosen.square().sum())
    return min(1.0, (kinds - 1) / (most - 1))


def total_variation(one: Tensor, other: Tensor) -> float:
    """Total variation between two class mixes, in [0, 1]. Shapes: (K,), (K,)."""
    return 0.5 * float((one - other).abs().sum())
