"""Batch norm whose training normalises as its evaluation does, within bounds: for small batches."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from renorm.errors import UsageError
from renorm.kernels import normalised
from renorm.layers.base import Mixing, finite_or


class BatchRenorm(Mixing):
    """In training `((x − μ) / σ · r + d) · weight + bias`, with r = σ / σ_held and d = (μ − μ_held) / σ_held, held constant.

    With r in [1/r_max, r_max] and d in [−d_max, d_max] unclipped, that is what evaluation gives, while gradients flow through
    the batch's moments. Over the number of batches tracked, the bounds open linearly from batch norm (r = 1, d = 0) at
    `start` to r_max at `r_end` and d_max at `d_end`. Evaluation is batch norm's. Each σ is `sqrt(ε + variance)`, and what is
    held is the variance, as in torch, where the paper averages standard deviations.

    Raises UsageError for an r_max below 1, a negative d_max, or a schedule that ends before it starts.

    Ioffe 2017, algorithm 1 and section 4.
    """

    name: ClassVar[str] = "batch_renorm"
    cites: ClassVar[str] = (
        "@inproceedings{ioffe2017renorm, title={Batch Renormalization: Towards Reducing Minibatch Dependence in "
        "Batch-Normalized Models}, author={Ioffe, Sergey}, booktitle={NeurIPS}, year={2017}}"
    )
    options: ClassVar[tuple[str, ...]] = ("r_max", "d_max", "start", "r_end", "d_end")

    def __init__(
        self,
        num_features: int,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        start: int = 5_000,
        r_end: int = 40_000,
        d_end: int = 25_000,
        momentum: float | None = 0.01,
        **common: Any,
    ) -> None:
        super().__init__(num_features, momentum=momentum, **common)
        if not (r_max >= 1 and d_max >= 0):
            raise UsageError(f"r is clipped to [1/r_max, r_max] and d to ±d_max; got r_max={r_max!r}, d_max={d_max!r}.")
        if not 0 <= start <= min(r_end, d_end):
            raise UsageError(
                f"the bounds open from `start` on, until r_end and d_end; got {start!r}, {r_end!r} and {d_end!r}."
            )
        self.r_max: float = r_max
        self.d_max: float = d_max
        self.start: int = start
        self.r_end: int = r_end
        self.d_end: int = d_end

    def _normalised(self, x: Tensor) -> Tensor:
        if not self.training:
            return self._by_held(x)
        held = self._held(x)

        def rule(
            mean: Tensor, var: Tensor, held_mean: Tensor, held_var: Tensor, batches: Tensor, weight: Any, bias: Any
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            mean, var = finite_or(mean, var, held_mean, held_var)
            r, d = self._corrections(mean.detach(), var.detach(), held_mean, held_var, batches.to(mean.dtype))
            d = d if weight is None else d * weight
            return mean, r * self._scale(var, weight), d if bias is None else d + bias

        y, mean, var = normalised(x, rule, held.mean, held.var, held.batches, self.weight, self.bias)
        self._track_values(x, mean, var)
        return y

    def _corrections(
        self, mean: Tensor, var: Tensor, held_mean: Tensor, held_var: Tensor, batches: Tensor
    ) -> tuple[Tensor, Tensor]:
        r_max = 1 + (self.r_max - 1) * self._opened(batches, self.r_end)
        d_max = self.d_max * self._opened(batches, self.d_end)
        sd = torch.sqrt(held_var + self.eps)
        r, d = torch.sqrt(var + self.eps) / sd, (mean - held_mean) / sd
        return torch.minimum(torch.maximum(r, 1 / r_max), r_max), torch.minimum(torch.maximum(d, -d_max), d_max)

    def _opened(self, batches: Tensor, end: int) -> Tensor:
        """How far a bound is open after so many batches, 0 to 1."""
        return ((batches - self.start + 1) / (end - self.start + 1)).clamp(0, 1)
