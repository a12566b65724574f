"""StochNorm: each channel is normalised by the batch or by what it holds, at random."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from renorm.errors import UsageError
from renorm.layers.stochastic import Stochastic
from renorm.regularisers.base import Penalty, Regulariser, Start


@dataclass(frozen=True, kw_only=True)
class StochNorm(Regulariser):
    """Trains through `renorm.layers.Stochastic` (Kou et al. 2020); adds nothing to the loss.

    p   how often a channel is normalised by the batch; 0.5 is the authors' choice
    """

    name: ClassVar[str] = "stochnorm"
    cites: ClassVar[str] = Stochastic.cites
    layer: ClassVar[str] = Stochastic.name

    p: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or not isinstance(self.p, int | float) or not 0 <= self.p <= 1:
            raise UsageError(f"p of stochnorm is a probability, in [0, 1]; got {self.p!r}.")

    def layer_options(self) -> dict[str, Any]:
        return {"p": self.p}

    @contextmanager
    def over(self, start: Start) -> Iterator[Penalty]:
        yield lambda step: torch.zeros(())
