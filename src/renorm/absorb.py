"""A scale and a shift, carried by the weight and bias of a convolution or linear layer beside the norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["Absorber", "Side"]

Side = Literal["after", "before", "beside"]  # where the norm stands, seen from the layer that carries its map


@dataclass(frozen=True)
class Absorber:
    """One weight that takes a map over, so that the norm may be left out.

    The norm stands `after` the layer (the map goes to its outputs), `before` it (to its inputs), or `beside` it: both read
    the same and are summed, so that `scale − 1` is added to the middle of the kernel from each channel to itself.
    `module` and `weight` name the parameter; `bias` names the one that takes the shift, None where there is no shift to
    take. As (groups, a, b, *kernel) the weight has its outputs along `out_dim`, 1 or 2, and its inputs along the other.
    `scale` and `shift` are one number per channel of that side, in float64.
    """

    side: Side
    module: str
    weight: str
    bias: tuple[str, str] | None
    groups: int
    out_dim: int
    scale: Tensor
    shift: Tensor

    def absorb_(self, modules: Mapping[str, nn.Module]) -> None:
        """Change weight and bias in place (a bias that was None is created), computing in float64."""
        weight: Tensor = getattr(modules[self.module], self.weight)
        grouped = weight.detach().double().reshape(self.groups, weight.shape[0] // self.groups, *weight.shape[1:])
        along = 3 - self.out_dim if self.side == "before" else self.out_dim
        shape = [1] * grouped.dim()
        shape[0], shape[along] = self.groups, grouped.shape[along]
        scale, shift = (v.to(weight.device).reshape(shape) for v in (self.scale, self.shift))
        added, kept = shift.flatten(), torch.ones_like(shift).flatten()
        if self.side == "beside":
            channel = torch.arange(grouped.shape[1], device=weight.device)
            middle = grouped
            for size in grouped.shape[3:]:
                middle = middle.select(3, size // 2)  # the next dimension takes its place
            middle[:, channel, channel] += scale.reshape(self.groups, -1) - 1
        elif self.side == "before":
            spread = [d for d in range(1, grouped.dim()) if d != self.out_dim]
            added = (grouped * shift).sum(spread).flatten()
            grouped = grouped * scale
        else:
            grouped, kept = grouped * scale, scale.flatten()
        weight.data.copy_(grouped.reshape(weight.shape))
        if self.bias is not None:
            self._shift_(modules[self.bias[0]], self.bias[1], kept, added, like=weight)

    def _shift_(self, home: nn.Module, name: str, kept: Tensor, added: Tensor, *, like: Tensor) -> None:
        held: Tensor | None = getattr(home, name)
        if held is None:
            setattr(home, name, nn.Parameter(added.to(like.dtype), requires_grad=like.requires_grad))
        else:
            held.data.copy_(held.detach().double() * (kept if self.side == "after" else 1) + added)
