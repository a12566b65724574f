"""Other packages' ways to re-estimate statistics, called as their users do; each changes `model` in place."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor, nn

from renorm.errors import require

__all__ = ["fvcore", "update_bn"]


def update_bn(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """torch.optim.swa_utils.update_bn over a loader, as its documentation shows."""
    from torch.optim.swa_utils import update_bn as torch_update_bn

    torch_update_bn(batches, model)
    model.eval()


def fvcore(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """fvcore.nn.update_bn_stats over every batch; it takes the layers that are in train mode (Wu & Johnson 2021).

    Raises:
        MissingExtra: fvcore is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.jit, which fvcore's other modules still use
        precise_bn = require("fvcore.nn.precise_bn", extra="bench", purpose="comparing with fvcore")
    model.train()
    precise_bn.update_bn_stats(model, batches, num_iters=len(batches))
    model.eval()
