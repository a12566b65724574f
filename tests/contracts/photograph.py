"""Everything about a model, and about this process, that a verb must give back as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
VALUES = (int, float, str, bool, type(None))


def photograph(model: nn.Module, *, identity: bool = True) -> dict[str, Any]:
    """Modes, classes, tensors bit for bit, hooks, plain attributes and `state_dict`, each under a telling key.

    With `identity`, also which tensor objects there are: an optimiser or a graph of the user's may hold them.
    """
    seen: dict[str, Any] = {}
    for name, module in parts(model):
        seen[f"{name}: class"] = type(module).__name__
        seen[f"{name}: mode"] = module.training
        for hooks in HOOKS:
            seen[f"{name}: {hooks}"] = list(getattr(module, hooks, {}))
        for key, value in vars(module).items():
            if isinstance(value, VALUES):
                seen[f"{name}: .{key}"] = value
            elif callable(value) and not isinstance(value, nn.Module):
                seen[f"{name}: .{key}"] = id(value)
        for key, tensor in (module._parameters | module._buffers).items():
            seen[f"{name}: {key}"] = _tensor(tensor, identity=identity)
    seen["state_dict"] = {k: bits(v) for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    return seen


def process() -> dict[str, Any]:
    """The global random number generators and torch's global switches."""
    return {
        "torch": bits(torch.get_rng_state()),
        "numpy": [np.asarray(part).tolist() for part in np.random.get_state()],
        "python": random.getstate(),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


def parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module, in wrappers too, and the layers that Keras keeps in lists of its own."""
    yield from model.named_modules()
    for name, module in list(model.named_modules()):
        for layer in getattr(module, "_flatten_layers", list)():
            yield f"{name}/{layer.name}", layer
            yield from ((f"{name}/{layer.name}/{n}", m) for n, m in layer.named_children())


def bits(tensor: Tensor) -> tuple[Any, ...]:
    """A tensor's shape, dtype and bytes: equal for equal bits only, NaN included."""
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        return ("uninitialised",)
    if hasattr(tensor, "__tensor_flatten__"):  # a quantised weight: several tensors behind one face
        return tuple(bits(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0] if name)
    flat = tensor.detach().cpu().clone().reshape(-1)
    return tuple(tensor.shape), tensor.dtype, flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _tensor(tensor: Tensor | None, *, identity: bool) -> Any:
    if tensor is None:
        return None
    lazy = isinstance(tensor, nn.parameter.UninitializedTensorMixin)
    faced = hasattr(tensor, "__tensor_flatten__")
    who = (id(tensor), 0 if faced else tensor.data_ptr()) if identity and not lazy else ()
    grad = None if tensor.grad is None else bits(tensor.grad)
    return bits(tensor), who, tensor.requires_grad, grad


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The keys under which two photographs differ."""
    return [key for key in before.keys() | after.keys() if before.get(key, "absent") != after.get(key, "absent")]
