"""How far two moments lie apart, per channel and per layer, in source standard deviations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from renorm.moments import TINY, Moments, Observed


class LayerShift(NamedTuple):
    """A layer's shift in one number a distance: the mean over its channels."""

    mean_gap: float
    log_sd_ratio: float
    sym_kl: float
    wasserstein2: float


class Shift(NamedTuple):
    """Distances of Gaussians with a channel's source and target moments; all are 0 exactly where the moments agree.

    Shapes: every field (C,), float64.

    mean_gap       |μt − μs| / σs, the standardised mean difference
    log_sd_ratio   ln(σt / σs), signed: positive where the target varies more
    sym_kl         ½ [(σt² + δ²)/σs² + (σs² + δ²)/σt²] − 1 with δ = μt − μs, the sum of both KL divergences (MECTA, eq. 5)
    wasserstein2   sqrt(δ² + (σt − σs)²) / σs, the 2-Wasserstein distance in source standard deviations (Schneider 2020, sec. 5)
    """

    mean_gap: Tensor
    log_sd_ratio: Tensor
    sym_kl: Tensor
    wasserstein2: Tensor

    @classmethod
    def between(cls, source: Moments, target: Moments, *, eps: float = 0.0) -> Shift:
        """Distances from `source` to `target`; `eps` is added to both variances, as the layer's own eps does."""
        source_var, target_var = (m.var.clamp_min(0) + max(eps, TINY) for m in (source, target.to(source.mean.device)))
        gap = target.mean.to(source.mean.device) - source.mean
        source_sd, target_sd = source_var.sqrt(), target_var.sqrt()
        both = (target_var + gap.square()) / source_var + (source_var + gap.square()) / target_var
        return cls(
            mean_gap=gap.abs() / source_sd,
            log_sd_ratio=0.5 * torch.log(target_var / source_var),
            sym_kl=0.5 * both - 1,
            wasserstein2=(gap.square() + (target_sd - source_sd).square()).sqrt() / source_sd,
        )

    @property
    def layer(self) -> LayerShift:
        """The mean over channels of each distance (of the absolute value, for the signed log ratio)."""
        return LayerShift(*(float(field.abs().mean()) for field in self))

    @property
    def moved(self) -> float:
        """Mean over channels of `mean_gap² + log_sd_ratio²`, each channel counted as 4 at the most.

        The one number a layer's weights follow from: a few dead channels, whose variance is all rounding, must not decide.
        """
        return float((self.mean_gap.square() + self.log_sd_ratio.square()).clamp_max(4).mean())


def net_distance(source: Moments, seen: Observed, *, eps: float) -> float:
    """The 2-Wasserstein distance in source sd, less what sampling alone adds, mean over channels.

    A channel's squared distance is too large by the squared standard errors of its mean and of its sd, which for
    images is about twice that of the mean alone.
    """
    shift = Shift.between(source, seen.values, eps=eps)
    error = seen.standard_error(source.var + eps)
    squared = shift.wasserstein2.square() - 2 * error.square().to(shift.wasserstein2.device)
    return float(squared.clamp_min(0).sqrt().mean())
