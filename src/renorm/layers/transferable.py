"""Batch norm that normalises source and target apart and favours the channels in which they are alike."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from renorm.layers.base import BatchNormTensors
from renorm.layers.per_domain import Sets


class Transferable(Sets):
    """Source and target have statistics of their own and one affine; each channel is scaled by `(1 + α) / 2`.

    `α_c = C p_c / Σ p` with `p_c = 1 / (1 + d_c)` and `d_c = |μs / σs − μt / σt|`, from the batch in training, in evaluation
    from what is held, and constant for gradients. The paper scales by `1 + α`, which doubles a pretrained network's
    activations where the domains are equal; here equal domains leave it as it was.

    In training the first half of a batch is the source, the second the target, unless `ids` (N,) say otherwise: "source" or 1,
    "target" or 0. Evaluation takes all for target, whose statistics are torch's own in the state.

    TransNorm: Wang et al. 2019, eq. 2 to 4.
    """

    name: ClassVar[str] = "transferable"
    cites: ClassVar[str] = (
        "@inproceedings{wang2019transferable, title={Transferable Normalization: Towards Improving Transferability of Deep "
        "Neural Networks}, author={Wang, Ximei and Jin, Ying and Long, Mingsheng and Wang, Jianmin and Jordan, Michael I}, "
        "booktitle={NeurIPS}, year={2019}}"
    )
    shares_affine: ClassVar[bool] = True

    def __init__(self, num_features: int, **common: Any) -> None:
        super().__init__(num_features, ["target", "source"], **common)

    def plain(self) -> BatchNormTensors:
        held, factor = super().plain(), self._factor(self._all("running_mean"), self._all("running_var"))
        if bool((factor == 1).all()):
            return held
        weight = factor if held.weight is None else held.weight.detach() * factor
        return held._replace(weight=nn.Parameter(weight.to(held.mean.dtype)))

    def _default(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[0], device=x.device)
        return (places * 2 < x.shape[0]).long() if self.training else torch.zeros_like(places)

    def _modified(self, mean: Tensor, var: Tensor, weight: Tensor | None) -> Tensor | None:
        factor = self._factor(mean.detach(), var.detach())
        return factor.expand_as(mean) if weight is None else weight * factor

    def _factor(self, mean: Tensor, var: Tensor) -> Tensor:
        """`(1 + α) / 2` per channel. Shapes: (2, C) → (C,)."""
        ratio = mean * torch.rsqrt(var + self.eps)
        near = 1 / (1 + (ratio[1] - ratio[0]).abs())
        return (1 + near / near.mean()) / 2
