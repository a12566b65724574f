"""Batch norm over virtual small batches inside a large one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from renorm.errors import UsageError
from renorm.layers.base import Tracking


class Ghost(Tracking):
    """In training every `size` consecutive images are normalised by their own moments, and move the statistics in their turn.

    A batch of B is then what B / size batches of `size` are to batch norm one after the other, in outputs and statistics: a
    large batch trains as gradient accumulation over small ones does, and the other way round. What is left at the end joins
    the last ghost batch. Evaluation is batch norm's.

    Raises UsageError for a size below 1.
    Hoffer et al. 2017, algorithm 1.
    """

    name: ClassVar[str] = "ghost"
    cites: ClassVar[str] = (
        "@inproceedings{hoffer2017train, title={Train longer, generalize better: closing the generalization gap in large batch "
        "training of neural networks}, author={Hoffer, Elad and Hubara, Itay and Soudry, Daniel}, booktitle={NeurIPS}, "
        "year={2017}}"
    )
    options: ClassVar[tuple[str, ...]] = ("size",)

    def __init__(self, num_features: int, *, size: int = 32, **common: Any) -> None:
        super().__init__(num_features, **common)
        if size < 1:
            raise UsageError(f"size is the number of images in a ghost batch, 1 or more; got {size!r}.")
        self.size: int = size

    def _normalised(self, x: Tensor) -> Tensor:
        if not self.training:
            return self._by_held(x)
        whole = max(1, x.shape[0] // self.size) * self.size
        sizes = [self.size] * (whole // self.size)
        sizes[-1] += x.shape[0] - whole
        return torch.cat([self._by_batch(part) for part in torch.split(x, sizes)])
