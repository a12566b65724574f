"""The catalogue's layers as the tests need them: lived in, in a precision, in a mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from renorm.layers.base import Tracking, catalogue

TRACKING = {name: layer for name, layer in catalogue().items() if issubclass(layer, Tracking)}
every_layer = pytest.mark.parametrize("name", sorted(catalogue()))
every_tracking = pytest.mark.parametrize("name", sorted(TRACKING))
CONSTANT = {"frozen"}  # statistics that never move


def lived(name: str, channels: int = 4, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The layer with statistics, counters and affine off their defaults, in training."""
    generator = torch.Generator().manual_seed(1)
    layer = catalogue()[name](channels, dtype=dtype, **options)

    def draw(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for key, tensor in layer.state_dict(keep_vars=True).items():
            last = key.rpartition(".")[2]
            if last in ("num_batches_tracked", "tracked"):
                tensor.fill_(7)
            elif last.endswith("mean"):
                draw(tensor, -0.4, 0.6)
            elif last.endswith("var"):
                draw(tensor, 0.5, 2.0)
            else:
                draw(tensor, 0.6, 1.4)
    return layer


def images(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 1.5, at: float = 0.3
) -> Tensor:
    """Values whose images differ in mean, so that no two are alike."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * spread + at
    x = x + torch.randn(shape[0], shape[1], *[1] * (len(shape) - 2), generator=generator) * 0.5
    return x.to(dtype)
