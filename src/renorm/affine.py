"""Batch norm in evaluation as what it is: one scale and one shift per channel, with composition and inverse."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from renorm.errors import UsageError


class Affine(NamedTuple):
    """The map `y = scale · x + shift` per channel. Shapes: scale and shift (C,), or (N, C) for one map a sample."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Affine:
        """The map equal to `(x − mean) / sqrt(var + eps) · weight + bias` up to rounding. Shapes: all (C,)."""
        scale = torch.rsqrt(var + eps)
        if weight is not None:
            scale = scale * weight
        shift = -mean * scale
        return cls(scale, shift if bias is None else shift + bias)

    def __call__(self, x: Tensor, *, axis: int = 1) -> Tensor:
        """Apply the map along `axis`. Shapes: x (N, C, *) → the same; with (N, C) maps each sample by its own."""
        return x * self._along(self.scale, x, axis) + self._along(self.shift, x, axis)

    def then(self, following: Affine) -> Affine:
        """The one map equal to applying this one, then `following`."""
        return Affine(self.scale * following.scale, self.shift * following.scale + following.shift)

    def inverse(self) -> Affine:
        """The map that takes this one back: `a.then(a.inverse())` is the identity up to rounding.

        Raises UsageError where a channel's scale is 0, which no map can take back.
        """
        dead = int((self.scale == 0).sum())
        if dead:
            raise UsageError(
                f"the inverse of a scale and shift was asked for, but {dead} of {self.scale.numel()} scales are 0; "
                "leave those channels out."
            )
        return Affine(1 / self.scale, -self.shift / self.scale)

    @staticmethod
    def _along(value: Tensor, x: Tensor, axis: int) -> Tensor:
        shape = [1] * x.dim()
        shape[axis] = value.shape[-1]
        if value.dim() == 2:
            shape[0] = value.shape[0]
        return value.reshape(shape)
