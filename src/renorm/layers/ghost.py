"""Batch norm over virtual small batches inside a large one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from renorm.errors import UsageError
from renorm.kernels import by_image, from_images, normalised, pooled
from renorm.layers.base import Tracking, finite_or, unbiased


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
        self.size = size

    def _normalised(self, x: Tensor) -> Tensor:
        if not self.training:
            return self._by_held(x)
        count, number = x.shape[0], max(1, x.shape[0] // self.size)
        groups = (torch.arange(count, device=x.device) // self.size).clamp_max(number - 1)
        images = by_image(x)
        positions = images[0, 0].numel()
        held_mean, held_var = self.running_mean.detach().clone(), self.running_var.detach().clone()

        def moments(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return pooled(mean.view(count, -1), var.view(count, -1), groups, number)

        def rule(
            mean: Tensor, var: Tensor, held_mean: Tensor, held_var: Tensor, weight: Tensor | None, bias: Tensor | None
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            mean, var, _ = moments(mean, var)
            mean, var = finite_or(mean, var, held_mean, held_var)
            scale = self._scale(var, weight)
            bias = None if bias is None else bias.expand_as(mean)[groups].flatten()
            return mean[groups].flatten(), scale[groups].flatten(), bias

        y, mean, var = normalised(images, rule, held_mean, held_var, self.weight, self.bias)
        means, variances, _ = moments(mean, var)
        for turn in range(number):
            here = self.size if turn < number - 1 else count - self.size * (number - 1)
            self._track(means[turn], unbiased(variances[turn], here * positions))
        return from_images(y, x)
