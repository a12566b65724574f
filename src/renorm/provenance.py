"""Where a result came from: fingerprints of models and data, versions, command and time.

A *plain* name is a tensor's name without what wrappers put before it: `module.` (DDP, DataParallel, averaging),
`_orig_mod.` (torch.compile) and `model.` (Lightning).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor, nn

from renorm.sites import unwrap

__all__ = ["fingerprint", "plain_names", "plain_state", "provenance", "version"]

PREFIXES = ("module.", "model.")  # dropped where every name has them; `_orig_mod.` is torch's own and goes everywhere


def plain_names(state: Mapping[str, object]) -> dict[str, str]:
    """{plain name: name} for every name, and where all have the same wrapper's prefix, without it."""
    names = {name.replace("_orig_mod.", ""): name for name in state}
    while prefix := next((p for p in PREFIXES if any(n.startswith(p) for n in names)), None):
        # torch's AveragedModel counts in `n_averaged`, beside its `module.`
        rest = {name: key for name, key in names.items() if name != "n_averaged"}
        if not all(name.startswith(prefix) for name in rest):
            break
        names = {name.removeprefix(prefix): key for name, key in rest.items()}
    return names


def plain_state(model_or_state: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model (wrappers removed) or of a state, detached, by plain name."""
    if isinstance(model_or_state, nn.Module):
        model_or_state = unwrap(model_or_state).state_dict()
        names = {name.replace("_orig_mod.", ""): name for name in model_or_state}
    else:
        names = plain_names(model_or_state)
    values = {plain: model_or_state[name] for plain, name in names.items()}
    return {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}


def fingerprint(model_or_state: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over the plain names, types, shapes and bytes of the tensors; their order and device do not matter."""
    digest = hashlib.sha256()
    state = plain_state(model_or_state)
    for name, plain in sorted(plain_names(state).items()):
        value = state[plain].cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def provenance(
    *, command: str, model: str | None, data: str | None, checkpoint: str | None = None, **more: Any
) -> dict[str, Any]:
    """Where a result came from, as plain values: versions, time (UTC), command, and fingerprints.

    `model` is the `fingerprint` of the model before any change, None where there is none, `checkpoint` the `sha256` of its
    file, `data` the fingerprint of the data set; `more` is kept as it is.
    """
    return {
        "renorm": version("renorm"),
        "torch": torch.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "checkpoint": checkpoint,
        "model": model,
        "data": data,
        **more,
    }


def version(package: str) -> str:
    """The installed version of a package, "source" for one that runs uninstalled from its source."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source"
