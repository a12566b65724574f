"""Batch norm that corrects its moments for an image whose own lie further off than chance allows."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from renorm.errors import UsageError
from renorm.kernels import by_image, from_images, normalised
from renorm.layers.base import Tracking, finite_or, unbiased


class InstanceAware(Tracking):
    """Each image is normalised by batch norm's moments, moved towards its own by what these exceed `k` standard errors.

    With L positions, mean m and variance v of batch norm, `m + ψ(m_image − m; k √((v + ε) / L))` and
    `v + ψ(v_image − v; k (v + ε) √(2 / (L − 1)))`, ψ the soft threshold: an image like the others is normalised as batch norm
    does, one from elsewhere by itself. m and v are the batch's in training, the running ones in evaluation. With one position
    it is batch norm.

    Raises UsageError for a negative k.
    IABN of NOTE: Gong et al. 2022, eq. 3 to 5.
    """

    name: ClassVar[str] = "instance_aware"
    cites: ClassVar[str] = (
        "@inproceedings{gong2022note, title={NOTE: Robust Continual Test-time Adaptation Against Temporal Correlation}, "
        "author={Gong, Taesik and Jeong, Jongheon and Kim, Taewon and Kim, Yewon and Shin, Jinwoo and Lee, Sung-Ju}, "
        "booktitle={NeurIPS}, year={2022}}"
    )
    keeps: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ("k",)

    def __init__(self, num_features: int, *, k: float = 4.0, **common: Any) -> None:
        super().__init__(num_features, **common)
        if not k >= 0:
            raise UsageError(f"k is a number of standard errors, 0 or more; got {k!r}.")
        self.k: float = k

    def _normalised(self, x: Tensor) -> Tensor:
        images = by_image(x)
        shape, positions, training = x.shape[:2], images[0, 0].numel(), self.training
        held_mean, held_var = self.running_mean.detach().clone(), self.running_var.detach().clone()

        def rule(
            mean: Tensor, var: Tensor, held_mean: Tensor, held_var: Tensor, weight: Tensor | None, bias: Tensor | None
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            mean, var = mean.view(shape), var.view(shape)
            middle, spread = finite_or(*_of_all(mean, var), held_mean, held_var) if training else (held_mean, held_var)
            mean, var = finite_or(mean, var, middle, spread)
            if positions == 1:
                mean, var = middle.expand(shape), spread.expand(shape)
            else:
                noise = spread + self.eps
                mean = middle + _soft(mean - middle, self.k * (noise / positions).sqrt())
                var = spread + _soft(var - spread, self.k * noise * math.sqrt(2 / (positions - 1)))
            scale = self._scale(var, weight)
            return mean.flatten(), scale.flatten(), None if bias is None else bias.expand(shape).flatten()

        y, mean, var = normalised(images, rule, held_mean, held_var, self.weight, self.bias)
        if training:
            mean, var = _of_all(mean.view(shape), var.view(shape))
            self._track(mean, unbiased(var, shape[0] * positions))
        return from_images(y, x)


def _of_all(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of all images, from those of each. Shapes: (N, C) → (C,)."""
    middle = mean.mean(0)
    return middle, (var + (mean - middle).square()).mean(0)


def _soft(value: Tensor, limit: Tensor) -> Tensor:
    return torch.relu(value - limit) - torch.relu(-value - limit)
