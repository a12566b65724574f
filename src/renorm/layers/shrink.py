"""Batch norm that trusts the batch as far as the batch deserves it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from renorm.errors import UsageError
from renorm.kernels import means_of_images, normalised
from renorm.layers.base import Mixing, finite_or
from renorm.moments import FLOOR, NOISE, TINY, source_share


class Shrink(Mixing):
    """Normalises by `w` of the statistics it holds and `1 − w` of the batch's moments; w follows from how sure the batch is.

    With z the mean over channels of the squared standard error of the batch's mean, images being the independent samples, in
    units of the variance held plus ε: `w = floor + (1 − floor) · noise z / (1 + noise z)`. Means mix linearly and variances
    geometrically. It is the estimator of `recalibrate_(prior="auto")`, batch by batch: a single image is normalised by what
    is held alone, hundreds of them mostly by their own moments.

    Statistics move in training, as batch norm's do, and never in evaluation. The weight is constant for gradients, which flow
    through the batch's part of the moments.

    With `evaluation=False` it does so in training alone, and evaluates as batch norm does.

    Raises UsageError for a `floor` outside [0, 1] or a negative `noise`.
    """

    name: ClassVar[str] = "shrink"
    cites: ClassVar[str] = (
        "@inproceedings{schneider2020covariate, title={Improving robustness against common corruptions by covariate shift "
        "adaptation}, author={Schneider, Steffen and Rusak, Evgenia and Eck, Luisa and Bringmann, Oliver and Brendel, Wieland "
        "and Bethge, Matthias}, booktitle={NeurIPS}, year={2020}}"
    )
    keeps: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ("floor", "noise", "evaluation")
    needs_two_values: ClassVar[bool] = False

    def __init__(
        self, num_features: int, *, floor: float = FLOOR, noise: float = NOISE, evaluation: bool = True, **common: Any
    ) -> None:
        super().__init__(num_features, **common)
        if not 0 <= floor <= 1:
            raise UsageError(f"floor is the least share of what the layer holds, in [0, 1]; got {floor!r}.")
        if not noise >= 0:
            raise UsageError(f"noise is what a squared standard error counts, 0 or more; got {noise!r}.")
        self.floor: float = floor
        self.noise: float = noise
        self.evaluation: bool = evaluation

    def _normalised(self, x: Tensor) -> Tensor:
        if not self.training and not self.evaluation:
            return self._by_held(x)
        held = self._held(x)
        share = self.source_share(x, held.mean, held.var)

        def rule(
            mean: Tensor, var: Tensor, held_mean: Tensor, held_var: Tensor, share: Tensor, weight: Any, bias: Any
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            mean, var = finite_or(mean, var, held_mean, held_var)
            mean = share * held_mean + (1 - share) * mean
            var = (share * (held_var + TINY).log() + (1 - share) * (var + TINY).log()).exp()
            return mean, self._scale(var, weight), bias

        y, mean, var = normalised(x, rule, held.mean, held.var, share, self.weight, self.bias)
        if self.training:
            self._track_values(x, mean, var)
        return y

    def source_share(self, x: Tensor, held_mean: Tensor, held_var: Tensor) -> Tensor:
        """The share of what is held for this batch: a number in [floor, 1], 1 for a single image.

        Channels that are not finite in the batch are left out. Shapes: x (N, C, *), the statistics (C,).
        """
        images = means_of_images(x)
        if images.shape[0] < 2:
            return torch.ones((), dtype=images.dtype, device=images.device)
        noise = images.var(0) / images.shape[0] / (held_var + self.eps)
        finite = torch.isfinite(noise)
        z = torch.where(finite, noise, 0.0).sum() / finite.sum().clamp_min(1)
        return source_share(z, floor=self.floor, noise=self.noise)
