"""Batch norm that, in training, normalises each channel by the batch or by what it holds, at random."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from renorm.errors import UsageError
from renorm.kernels import normalised
from renorm.layers.base import Mixing, finite_or


class Stochastic(Mixing):
    """In training each channel is normalised by the batch with probability `p`, else by the statistics held before it.

    Gradients flow through the moments of the channels normalised by the batch. Evaluation is batch norm's. It keeps a
    fine-tuned network near the statistics of its source when there is little data.

    Raises UsageError for a `p` outside [0, 1].

    StochNorm: Kou et al. 2020, eq. 4 and 5.
    """

    name: ClassVar[str] = "stochastic"
    cites: ClassVar[str] = (
        "@inproceedings{kou2020stochastic, title={Stochastic Normalization}, author={Kou, Zhi and You, Kaichao and Long, "
        "Mingsheng and Wang, Jianmin}, booktitle={NeurIPS}, year={2020}}"
    )
    options: ClassVar[tuple[str, ...]] = ("p",)

    def __init__(self, num_features: int, *, p: float = 0.5, **common: Any) -> None:
        super().__init__(num_features, **common)
        if not 0 <= p <= 1:
            raise UsageError(f"p is the probability that a channel is normalised by the batch, in [0, 1]; got {p!r}.")
        self.p: float = p

    def _normalised(self, x: Tensor) -> Tensor:
        if not self.training:
            return self._by_held(x)
        held = self._held(x)
        of_the_batch = torch.rand(self.num_features, device=x.device) < self.p

        def rule(
            mean: Tensor, var: Tensor, held_mean: Tensor, held_var: Tensor, chosen: Tensor, weight: Any, bias: Any
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            mean, var = finite_or(mean, var, held_mean, held_var)
            mean = torch.where(chosen, mean, held_mean.to(mean.dtype))
            var = torch.where(chosen, var, held_var.to(var.dtype))
            return mean, self._scale(var, weight), bias

        y, mean, var = normalised(x, rule, held.mean, held.var, of_the_batch, self.weight, self.bias)
        self._track_values(x, mean, var)
        return y
