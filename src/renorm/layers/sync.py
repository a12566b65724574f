"""Batch norm over the batches of all processes, on any device."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from renorm.kernels import normalised
from renorm.layers.base import Tracking, finite_or


class Sync(Tracking):
    """In training all processes of the default group normalise by the moments of their batches together.

    Batches may differ in size; their moments are pooled without cancellation (Chan et al. 1983), and gradients flow to all.
    Without a process group it is batch norm. Unlike torch's `SyncBatchNorm` it runs on CPUs and keeps its activation.

    """

    name: ClassVar[str] = "sync"
    cites: ClassVar[str] = (
        "@inproceedings{peng2018megdet, title={MegDet: A Large Mini-Batch Object Detector}, author={Peng, Chao and Xiao, Tete "
        "and Li, Zeming and Jiang, Yuning and Zhang, Xiangyu and Jia, Kai and Yu, Gang and Sun, Jian}, booktitle={CVPR}, "
        "year={2018}}"
    )

    def _normalised(self, x: Tensor) -> Tensor:
        if not self.training:
            return self._by_held(x)
        values = x.numel() // self.num_features
        held_mean, held_var = self.running_mean.detach().clone(), self.running_var.detach().clone()

        def rule(
            mean: Tensor, var: Tensor, held_mean: Tensor, held_var: Tensor, weight: Tensor | None, bias: Tensor | None
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            mean, var, _ = _of_all_processes(mean, var, values)
            mean, var = finite_or(mean, var, held_mean, held_var)
            return mean, self._scale(var, weight), bias

        y, mean, var = normalised(x, rule, held_mean, held_var, self.weight, self.bias)
        mean, var, count = _of_all_processes(mean, var, values)
        self._track(mean, var * (count / (count - 1)))
        return y

    def _refuses_one_value(self) -> bool:
        return _processes() == 1  # to stop on one process alone would leave the others waiting


def _of_all_processes(mean: Tensor, var: Tensor, values: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance over all processes, and the number of values. Shapes: (C,), (C,) → (C,), (C,), ()."""
    count = torch.full_like(mean[:1], values)
    if _processes() == 1:
        return mean, var, count[0]
    gathered: Tensor = _Gathered.apply(torch.cat([count, mean, var]))
    counts, means, variances = torch.split(gathered, [1, len(mean), len(mean)], 1)
    total = counts.sum()
    pooled = (means * counts).sum(0) / total
    return pooled, ((variances + (means - pooled).square()) * counts).sum(0) / total, total.detach()


def _processes() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


class _Gathered(torch.autograd.Function):
    """One vector of every process, a row each; the gradient of a process' own is the sum over all processes."""

    @staticmethod
    def forward(vector: Tensor) -> Tensor:
        rows = [torch.empty_like(vector) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(rows, vector.contiguous())
        return torch.stack(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        torch.distributed.all_reduce(total)
        return total[torch.distributed.get_rank()]
