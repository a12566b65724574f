"""Other packages' ways to re-estimate statistics and to fold, called as their users do."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import deepcopy

from torch import Tensor, nn

from renorm.errors import require
from renorm.sites import find_sites

__all__ = ["fuse_by_graph", "fuse_in_order", "fvcore", "update_bn"]


def update_bn(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Change `model` by torch.optim.swa_utils.update_bn over a loader, as its documentation shows."""
    from torch.optim.swa_utils import update_bn as torch_update_bn

    torch_update_bn(batches, model)
    model.eval()


def fvcore(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Change `model` by fvcore.nn.update_bn_stats over every batch; it takes layers in train mode (Wu & Johnson 2021).

    Raises:
        MissingExtra: fvcore is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.jit, which fvcore's other modules still use
        precise_bn = require("fvcore.nn.precise_bn", extra="bench", purpose="comparing with fvcore")
    model.train()
    precise_bn.update_bn_stats(model, batches, num_iters=len(batches))
    model.eval()


def fuse_by_graph(model: nn.Module) -> nn.Module:
    """A copy folded by torch.fx.experimental.optimization.fuse; whatever it raises passes through."""
    from torch.fx.experimental.optimization import fuse

    fused: nn.Module = fuse(model)
    return fused


def fuse_in_order(model: nn.Module) -> nn.Module:
    """A copy folded as `mmcv.cnn.fuse_conv_bn` does: each norm into the 2d convolution registered before it."""
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    model = deepcopy(model)
    norms = {id(site.module): site for site in find_sites(model) if site.kind == "batch"}

    def below(parent: nn.Module) -> None:
        last = ""
        for name, child in parent.named_children():
            site = norms.get(id(child))
            if site is not None and last:
                conv, (mean, var) = parent._modules[last], site.tensors or (None, None)
                if isinstance(conv, nn.Conv2d) and mean is not None and var is not None:
                    affine = [getattr(site.module, held) for held in ("weight", "bias")]
                    conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, mean, var, site.eps, *affine)
                parent._modules[name] = nn.Identity()
                last = ""
            elif isinstance(child, nn.Conv2d):
                last = name
            elif site is None:
                below(child)

    below(model)
    return model
