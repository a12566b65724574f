"""What norm layers see in one pass, the slow way: keep every input, then measure with the twin of `Moments`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import moments as twin


def observe(
    model: nn.Module,
    layers: dict[str, tuple[nn.Module, int]],
    batches: Iterable[Any],
    *,
    under: str,
    call: Callable[[nn.Module, Any], Any],
) -> dict[str, tuple[twin.Reference, twin.Reference]]:
    """Moments of values and of images at `layers`, {name: (module, channel axis)}; `model` is used up.

    Under "running" all is in evaluation. Under "batch" torch's own batch norms are put in training mode, Keras' are
    told to train, and what has no such mode has its output computed anew.
    """
    model.eval()
    kept: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in layers}
    for name, (module, _) in layers.items():
        module.register_forward_pre_hook(_keep(kept[name]), with_kwargs=True)
        if under == "batch":
            _use_batch(module)
    with torch.no_grad():
        for batch in batches:
            call(model, batch)
    found = {}
    for name, (_, axis) in layers.items():
        if kept[name]:
            means = [np.stack([twin.of(image[None], axis).mean for image in part]) for part in kept[name]]
            found[name] = twin.pooled(kept[name], axis), twin.pooled(means)
    return found


def _keep(into: list[np.ndarray[Any, Any]]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        into.append(args[0].detach().double().numpy())

    return hook


def _use_batch(module: nn.Module) -> None:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.train()
        module.momentum = 0.0  # what is held stays: quantisation-aware convolutions read it too
    elif hasattr(module, "moving_mean"):
        module.register_forward_pre_hook(lambda m, args, kwargs: (args, kwargs | {"training": True}), with_kwargs=True)
    else:
        module.register_forward_hook(_anew)


def _anew(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    eps = getattr(module, "eps", 1e-5)
    out = F.batch_norm(args[0], None, None, module.weight, module.bias, training=True, eps=eps)
    return module.act(module.drop(out)) if hasattr(module, "act") else out
