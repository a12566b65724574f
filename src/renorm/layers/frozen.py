"""Batch norm that never normalises by the batch and whose statistics never move."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from renorm.kernels import by_constants
from renorm.layers.base import BatchNormTensors, Tracking


class Frozen(Tracking):
    """In training as in evaluation, `(x − running mean) / sqrt(running var + ε) · weight + bias`; nothing moves.

    `train_affine=True` lets weight and bias train. They are parameters either way, so that keys and optimizers stay as
    they are; statistics and affine are told apart, which `requires_grad=False` and `eval()` on a batch norm do not do.
    """

    name: ClassVar[str] = "frozen"
    options: ClassVar[tuple[str, ...]] = ("train_affine",)
    needs_two_values: ClassVar[bool] = False

    def __init__(self, num_features: int, *, train_affine: bool = False, **common: Any) -> None:
        super().__init__(num_features, **common)
        self.train_affine: bool = train_affine
        self._set_flags()

    def take_(self, held: BatchNormTensors) -> None:
        super().take_(held)
        self._set_flags()

    def _set_flags(self) -> None:
        for parameter in self.parameters():
            parameter.requires_grad_(self.train_affine)

    def _normalised(self, x: Tensor) -> Tensor:
        trains = any(p is not None and p.requires_grad for p in (self.weight, self.bias))
        if trains or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._by_held(x)
        bias = torch.zeros_like(self.running_mean) if self.bias is None else self.bias
        return by_constants(x, self.running_mean, self._scale(self.running_var, self.weight), bias)
