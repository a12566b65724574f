"""Ours: source and batch moments blended by how certain the batch is, instead of by a coin."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from renorm.errors import UsageError
from renorm.layers.shrink import Shrink as Layer
from renorm.moments import FLOOR, NOISE
from renorm.regularisers.base import Penalty, Regulariser, Start, check_weight


@dataclass(frozen=True, kw_only=True)
class Shrink(Regulariser):
    """Trains through `renorm.layers.Shrink`, which in evaluation is batch norm then; adds nothing to the loss.

    floor   the least share of what a layer holds
    noise   what a squared standard error of the batch counts against it
    """

    name: ClassVar[str] = "shrink"
    layer: ClassVar[str] = Layer.name

    floor: float = FLOOR
    noise: float = NOISE

    def __post_init__(self) -> None:
        check_weight(self, "floor", "noise")
        if self.floor > 1:
            raise UsageError(f"floor of shrink is a share, in [0, 1]; got {self.floor!r}.")

    def layer_options(self) -> dict[str, Any]:
        return {"floor": self.floor, "noise": self.noise, "evaluation": False}

    @contextmanager
    def over(self, start: Start) -> Iterator[Penalty]:
        yield lambda step: torch.zeros(())
