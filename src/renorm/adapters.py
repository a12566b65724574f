"""What an adapter keeps of a fine-tuned model: the norm layers and the head, as a small file for one base."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from renorm.errors import CheckpointError, UsageError
from renorm.files import refuse_existing, writing
from renorm.heads import NewHead, new_head_, outputs_of
from renorm.provenance import fingerprint, provenance
from renorm.sites import find_sites, parameters_of, unwrap, walk
from renorm.split import Split, split
from renorm.state import Undo

FORMAT = "renorm-adapter-1"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What `load_adapter_` put into a model, and the way back.

    names    the tensors that were written, by name in the model
    head     the modules that are its head; all other tensors written are those of norm layers
    outputs  of the adapter's head; None where the model has no head
    classes  the names of its classes, where the file has them
    origin   where the adapter came from, as `save_adapter` stored it
    """

    path: str
    names: tuple[str, ...]
    head: tuple[str, ...]
    outputs: int | None
    classes: tuple[str, ...] | None
    origin: Mapping[str, Any]
    undo: Undo = field(repr=False)
    new_head: NewHead | None = field(repr=False)

    def restore_(self) -> None:
        """Give the model the norm layers and head it had before, bit for bit; a second call does nothing.

        Raises OpenChange where a later change at the same modules still stands.
        """
        if self.undo.is_open:
            self.undo.restore_()
            if self.new_head is not None:
                self.new_head.restore_()


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    head: Literal["auto"] | str | Sequence[str] = "auto",
    force: bool = False,
) -> int:
    """Write the parameters and statistics of every norm layer, and the head, to a .safetensors file; return its bytes.

    With them goes a fingerprint of all the rest, the base, by which `load_adapter_` knows where they belong.
    Raises UsageError for another suffix or a model without norm layers, FileExists unless `force`.
    """
    target = refuse_existing(path, force=force)
    if target.suffix != ".safetensors":
        raise UsageError(f"an adapter is a .safetensors file; {target} is not. Give a name with that suffix.")
    parts = split(model, head)
    own, base = divided(model, parts)
    if not any(find_sites(model)):
        raise UsageError(f"{type(unwrap(model)).__name__} has no norm layer that an adapter could keep.")
    config = getattr(unwrap(model), "pretrained_cfg", None)
    names = config.get("label_names") if isinstance(config, dict) else None
    metadata = {
        "format": FORMAT,
        "base": fingerprint(base),
        "head": json.dumps(list(parts.head)),
        "outputs": json.dumps(outputs_of(model, parts)),
        "classes": json.dumps(list(names) if names else None),
        "provenance": json.dumps(provenance(command="save_adapter", model=fingerprint(model), data=None)),
    }
    from safetensors.torch import save_file

    with writing(target, force=force) as temporary:
        save_file({name: tensor.cpu().clone().contiguous() for name, tensor in own.items()}, temporary, metadata)
    return target.stat().st_size


def load_adapter_(model: nn.Module, path: str | os.PathLike[str]) -> Adapter:
    """Put the adapter's norm layers and head into `model`, the base it was made for, exactly; all of it, or nothing.

    A head with another number of outputs than the adapter's is replaced by a new one.
    Raises CheckpointError for a file that is no adapter, or one of another base, with the first difference.
    """
    tensors, told = _read(path)
    head, outputs = json.loads(told["head"]), json.loads(told["outputs"])
    classes = json.loads(told["classes"])
    known = dict(walk(unwrap(model)))
    parts = split(model, head or "auto") if all(name in known for name in head) else Split((), ())
    own, base = divided(model, parts)
    _refuse_other_base(path, told, tensors, own, fingerprint(base))
    # norm layers and the head: what stands between them is the base, and stays
    norms = _norms(model)
    places = {name: module for name, module in walk(unwrap(model)) if module in norms or parts.is_head(name)}
    undo = Undo("load_adapter_", places, parameters=True)
    placed = None
    try:
        if outputs is not None and outputs_of(model, parts) != outputs:
            with torch.random.fork_rng(devices=[]):
                placed = new_head_(model, parts, outputs, names=classes)
        held = divided(model, parts)[0]
        for name, tensor in tensors.items():
            if held[name].shape != tensor.shape:
                raise CheckpointError(
                    f"{path} holds {name} of shape {tuple(tensor.shape)}, and the model's is {tuple(held[name].shape)}; "
                    "give the model that the adapter was made for."
                )
            held[name].data.copy_(tensor)
    except BaseException:
        undo.restore_()
        if placed is not None:
            placed.restore_()
        raise
    return Adapter(
        path=str(path),
        names=tuple(tensors),
        head=parts.head,
        outputs=outputs,
        classes=tuple(classes) if classes else None,
        origin=json.loads(told["provenance"]),
        undo=undo,
        new_head=placed,
    )


def head_of(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The modules that are the head of an adapter's model. Raises CheckpointError for a file that is no adapter."""
    return tuple(json.loads(_read(path)[1]["head"]))


def divided(model: nn.Module, parts: Split) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors that an adapter keeps, and those of its base, by name; a counter of batches belongs to neither."""
    norms = _norms(model)
    own: dict[str, Tensor] = {}
    base: dict[str, Tensor] = {}
    seen: set[int] = set()
    parameters = parameters_of(model)
    buffers = {
        f"{name}.{key}" if name else key: buffer
        for name, module in walk(unwrap(model))
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    }
    within = {id(t) for module in norms for t in (*module.parameters(), *module.buffers())}
    for name, tensor in {**parameters, **buffers}.items():
        if id(tensor) in seen or name.endswith("num_batches_tracked"):
            continue
        seen.add(id(tensor))
        kept = id(tensor) in within or parts.is_head(name)
        (own if kept else base)[name] = tensor.detach()
    return own, base


def _norms(model: nn.Module) -> set[nn.Module]:
    return {site.module for site in find_sites(model)}


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            told = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read as an adapter ({error}). Correct the path, or save it again."
        ) from error
    if told.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no adapter: save_adapter did not write it. Whole weights are loaded with `--checkpoint`."
        )
    return tensors, told


def _refuse_other_base(
    path: str | os.PathLike[str],
    told: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    base: str,
) -> None:
    missing = [name for name in tensors if name not in own]
    more = [name for name in own if name not in tensors]
    if missing or more:
        first = f"it has no {missing[0]}" if missing else f"its {more[0]} is not in the file"
        raise CheckpointError(f"{path} was made for another base: {first}. Give the model that it was made for.")
    if base != told["base"]:
        raise CheckpointError(
            f"{path} was made for another base: the layers are the same, but the weights beside norm layers and head are "
            "not. Load the base's own checkpoint first."
        )
