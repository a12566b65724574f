"""Batch norm on a variational posterior's mean, by which its divergence from the prior cannot vanish."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from renorm.errors import UsageError
from renorm.layers.base import BatchNormTensors, Tracking
from renorm.said import say


class PosteriorNorm(Tracking):
    """Batch norm for the mean of a Gaussian posterior q(z|x), with its weight fixed at `gamma` and its bias trained.

    Over a training batch the mean of KL(q(z|x) ‖ N(0, 1)) is at least `floor`, `½ Σ (γ² + β²)` over the dimensions, whatever
    the encoder does, but for the share ε / (var + ε) that eps takes from γ²: the posterior cannot collapse onto the prior.
    The log variance stays as it is. `recalibrate_` leaves this layer alone unless it is named.

    Raises UsageError for a `gamma` that is not above 0, and what every layer raises.
    Zhu et al. 2020, equation 9.
    """

    name: ClassVar[str] = "posterior"
    cites: ClassVar[str] = (
        "@inproceedings{zhu2020batch, title={A Batch Normalized Inference Network Keeps the {KL} Vanishing Away}, "
        "author={Zhu, Qile and Bi, Wei and Liu, Xiaojiang and Ma, Xiyao and Li, Xiaolin and Wu, Dapeng}, booktitle={ACL}, "
        "year={2020}}"
    )
    keeps: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ("gamma",)
    weight: nn.Parameter
    stays: ClassVar[str] = say(
        "its statistics set how far posteriors lie from the prior, which the decoder was trained for"
    )

    def __init__(self, num_features: int, *, gamma: float = 0.5, **common: Any) -> None:
        if not 0 < gamma < float("inf"):
            raise UsageError(f"gamma is the standard deviation that posterior means are given, above 0; got {gamma!r}.")
        self.gamma = gamma
        super().__init__(num_features, **common)

    @property
    def floor(self) -> Tensor:
        """The least that the KL divergence from a standard normal prior can be, in nats, summed over the dimensions."""
        weight = self._gains()
        squares = weight.square() if self.bias is None else weight.square() + self.bias.square()
        return squares.sum() / 2

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.weight is not None:
            nn.init.constant_(self.weight, self.gamma)
            self.weight.requires_grad_(False)

    def take_(self, held: BatchNormTensors) -> None:
        """Hold a batch norm's statistics and bias; its weight gives way to `gamma`."""
        super().take_(held)
        if held.weight is not None:
            self.weight = nn.Parameter(torch.full_like(held.weight, self.gamma), requires_grad=False)

    def _gains(self) -> Tensor:
        return torch.full_like(self.running_mean, self.gamma) if self.weight is None else self.weight

    def _normalised(self, x: Tensor) -> Tensor:
        mean, var, training = self.running_mean, self.running_var, self.training
        if training:
            mean, var = torch.zeros_like(mean), torch.zeros_like(var)
        y = nn.functional.batch_norm(x, mean, var, self._gains(), self.bias, training, 1.0, self.eps)
        if training:
            self._track(mean, var)
        return y
