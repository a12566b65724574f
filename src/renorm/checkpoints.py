"""Weights on disk: read without running code that a file may hold, loaded all or not at all, written with their origin.

Names are compared plain (`provenance.plain_names`) on both sides: a file saved from a wrapped model loads into a bare
one, and the other way round.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from renorm.errors import CheckpointError, UsageError
from renorm.files import refuse_existing, sha256, writing
from renorm.provenance import plain_names, plain_state
from renorm.said import listed, say
from renorm.sites import unwrap

__all__ = [
    "Loaded",
    "Weights",
    "load_",
    "read",
    "read_weights",
    "writable",
    "write",
]

AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "shadow")
NESTS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module")
SUFFIXES = (".safetensors", ".pt", ".pth")
SHOWN = 5  # names of each kind in a message: three kinds and the advice fit on one screen


class Weights(NamedTuple):
    """What a checkpoint file holds: tensors by plain name, what was chosen or left out, and where they came from."""

    state: dict[str, Tensor]
    notes: tuple[str, ...]
    provenance: dict[str, Any] | None  # as `write` stored it; None for files of others


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What `load_` did. Names are plain; `shapes` is {name: (shape in the file, shape in the model)}."""

    path: str
    sha256: str
    count: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] | None = None


def read(path: str | os.PathLike[str], *, averaged: bool = True) -> dict[str, Tensor]:
    """The tensors of a checkpoint by plain name, on the CPU; `read_weights` also says what was left out.

    Raises:
        CheckpointError: as `read_weights`.
    """
    return read_weights(path, averaged=averaged).state


def read_weights(path: str | os.PathLike[str], *, averaged: bool = True) -> Weights:
    """Read safetensors, or a torch file of weights alone (zip or legacy, saved from any device), to the CPU.

    The weights may lie under `state_dict`, `model` and the like. Where a running average (EMA) lies beside them it is
    taken, being what its authors evaluate; `averaged=False` takes the other.

    Raises:
        CheckpointError: no such file, damaged, of another format, without tensors, or holding Python objects.
    """
    file = Path(path)
    if not os.path.isfile(file):
        raise CheckpointError(f"there is no checkpoint file {file}. Correct the path.")
    with file.open("rb") as stream:
        start = stream.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file} is a Git LFS pointer, not weights. Fetch the file itself: git lfs pull.")
    if start[8:9] == b"{" or file.suffix == ".safetensors":
        return _read_safetensors(file)
    return _pick(file, _read_torch(file), averaged)


def load_(model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True, averaged: bool = True) -> Loaded:
    """Copy a checkpoint's tensors into `model`: all of them, or, when anything does not fit, none.

    With `strict=False` those that fit by name and shape are copied and the report lists the others. Counters
    (`num_batches_tracked`) may be missing on either side, names that share one tensor may have it once.

    Raises:
        CheckpointError: as `read_weights`, or names or shapes differ, listed by kind.
    """
    weights = read_weights(path, averaged=averaged)
    inner = unwrap(model)
    own = {name: value for name, value in inner.state_dict().items() if isinstance(value, Tensor)}
    names = plain_names(own)
    shapes = {
        name: (tuple(value.shape), tuple(own[names[name]].shape))
        for name, value in weights.state.items()
        if name in names and not is_lazy(own[names[name]]) and value.shape != own[names[name]].shape
    }
    fitting = {names[name]: value for name, value in weights.state.items() if name in names and name not in shapes}
    missing, counters = _missing(own, names, weights.state)
    unexpected = tuple(n for n in weights.state if n not in names and not _is_optional(n))
    counters += sum(n not in names and _is_optional(n) for n in weights.state)
    notes = weights.notes
    if counters:
        notes += (
            say("{count} counters or extra states stand on one side only; the model's were kept", count=counters),
        )
    report = Loaded(
        path=str(path),
        sha256=sha256(path),
        count=len(fitting),
        missing=missing,
        unexpected=unexpected,
        shapes=shapes,
        notes=notes,
        provenance=weights.provenance,
    )
    if strict and (missing or unexpected or shapes):
        raise CheckpointError(_misfit(report, inner))
    inner.load_state_dict(fitting, strict=False)
    return report


def writable(path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Return `path` if `write` may write there. Call it before the work starts.

    Raises:
        UsageError: a suffix other than .safetensors, .pt and .pth, or as `files.refuse_existing`.
        FileExists: a file stands there and `force` is not given.
    """
    if Path(path).suffix not in SUFFIXES:
        raise UsageError(
            f"cannot write {path}: weights are written as {', '.join(SUFFIXES)}. Give one of these suffixes."
        )
    return refuse_existing(path, force=force)


def write(
    model_or_state: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    provenance: Mapping[str, Any],
    force: bool = False,
) -> None:
    """Write the weights by plain name: `.safetensors`, or `.pt`/`.pth` that torch reads with `weights_only=True`.

    The origin goes into the metadata of a .safetensors file; in a .pt file it lies under `provenance`.
    A tensor under several names is written under each, so that the file loads strictly everywhere.

    Raises:
        FileExists, UsageError: as `writable`.
    """
    target = writable(path, force=force)
    state = {name: value.cpu().contiguous() for name, value in plain_state(model_or_state).items()}
    origin = json.dumps(dict(provenance), default=str)
    with writing(target, force=force) as temporary:
        if target.suffix == ".safetensors":
            from safetensors.torch import save_file

            # safetensors refuses tensors that share memory
            save_file(
                {name: value.clone() for name, value in state.items()},
                temporary,
                {"format": "pt", "provenance": origin},
            )
        else:
            torch.save({"state_dict": state, "provenance": json.loads(origin)}, temporary)


def _read_safetensors(file: Path) -> Weights:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
            found = {name: opened.get_tensor(name) for name in opened.keys()}
    except SafetensorError as error:
        raise CheckpointError(_damaged(file, error)) from error
    try:
        origin = json.loads(metadata["provenance"])
    except (KeyError, ValueError):
        origin = None
    return _finish(file, found, (), origin if isinstance(origin, dict) else None)


def _read_torch(file: Path) -> object:
    try:
        # Namespace: training scripts often save their arguments beside the weights; setting attributes is all it does.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged pickle raises KeyError, ValueError, EOFError, … alike
        text = str(error)
        if "TorchScript" in text:
            raise CheckpointError(
                f"{file} is a TorchScript program, not weights. Where you trust it, re-save its weights: "
                f"torch.save(torch.jit.load({str(file)!r}).state_dict(), 'weights.pt')."
            ) from error
        if isinstance(error, pickle.UnpicklingError) and (found := re.findall(r"(?:GLOBAL|class) ([\w.]*\w)", text)):
            raise CheckpointError(_pickled(file, found[0])) from error
        raise CheckpointError(_damaged(file, error)) from error


def _pickled(file: Path, name: str) -> str:
    return (
        f"{file} holds Python objects ({name}), which may run code when they are read; renorm never unpickles them.\n"
        "Where you trust the file and have its code at hand, re-save its weights alone, then give weights.pt:\n"
        f"  import torch; m = torch.load({str(file)!r}, weights_only=False, map_location='cpu')\n"
        "  torch.save(m.state_dict() if hasattr(m, 'state_dict') else m['state_dict'], 'weights.pt')"
    )


def _damaged(file: Path, error: Exception) -> str:
    reason = re.sub(r"\s+", " ", str(error))[:120] or type(error).__name__
    return (
        f"{file} ({file.stat().st_size:,} bytes) is damaged, or neither safetensors nor a torch file ({reason}). "
        "Fetch or save it again."
    )


def _pick(file: Path, found: object, averaged: bool) -> Weights:
    """Walk down to the mapping that holds the tensors, noting what was chosen and what was left aside."""
    notes: list[str] = []
    origin = found.get("provenance") if isinstance(found, Mapping) else None
    order = (*AVERAGED, *NESTS) if averaged else (*NESTS, *AVERAGED)
    while isinstance(found, Mapping):
        nested = [key for key in order if isinstance(found.get(key), Mapping) and _has_tensors(found[key])]
        if not nested:
            break
        if len(nested) > 1:
            notes.append(
                say("took {name!r}; the file holds {others} too", name=nested[0], others=listed(map(repr, nested[1:])))
            )
        if aside := [str(key) for key in found if key not in nested and key != "provenance"]:
            notes.append(say("left aside beside {name!r}: {others}", name=nested[0], others=listed(aside)))
        found = found[nested[0]]
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"{file} holds a {type(found).__name__}, not tensors by name. Save model.state_dict() instead."
        )
    return _finish(file, found, tuple(notes), origin if isinstance(origin, dict) else None)


def _has_tensors(found: Mapping[Any, Any]) -> bool:
    return any(isinstance(v, Tensor) or (isinstance(v, Mapping) and _has_tensors(v)) for v in found.values())


def _finish(file: Path, found: Mapping[Any, Any], notes: tuple[str, ...], origin: dict[str, Any] | None) -> Weights:
    state = {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not state:
        keys = ", ".join(str(key) for key in list(found)[:SHOWN]) or "nothing"
        raise CheckpointError(f"{file} holds no tensors (found: {keys}). Save model.state_dict() instead.")
    if dropped := len(found) - len(state):
        notes += (say("dropped {count} entries that are no tensors", count=dropped),)
    return Weights({plain: state[name].detach() for plain, name in plain_names(state).items()}, notes, origin)


def _is_optional(name: str) -> bool:
    """True for what a plain checkpoint may lack: torch's counter, and the `extra.*` of renorm's own layers."""
    parts = name.split(".")
    return parts[-1] == "num_batches_tracked" or "extra" in parts


def _missing(
    own: Mapping[str, Tensor], names: Mapping[str, str], given: Mapping[str, Tensor]
) -> tuple[tuple[str, ...], int]:
    """Plain names that the file lacks, less other names of what it has and optional ones; how many of the last."""
    places = {name: _place(own[key]) for name, key in names.items()}
    held = {places[name] for name in given if name in names} - {None}
    lacking = [name for name in names if name not in given]
    missing = tuple(name for name in lacking if not _is_optional(name) and places[name] not in held)
    return missing, sum(map(_is_optional, lacking))


def _place(value: Tensor) -> tuple[int, torch.Size] | None:
    """Where a tensor lies: the names of a shared one have the same place. None where it holds no memory."""
    return None if is_lazy(value) or not value.data_ptr() else (value.data_ptr(), value.shape)


def _misfit(report: Loaded, model: nn.Module) -> str:
    lines = [f"{report.path} does not fit {type(model).__name__}; nothing was loaded."]
    for kind, names in (("missing in", report.missing), ("unexpected in", report.unexpected)):
        if names:
            lines.append(f"  {len(names)} {kind} the file: {_some(names)}")
    if report.shapes:
        shapes = [f"{name} {theirs}, here {ours}" for name, (theirs, ours) in report.shapes.items()]
        lines.append(f"  {len(shapes)} of another shape: {_some(shapes, '; ')}")
    lines.append(f"  {_advice(report)}")
    return "\n".join(lines)


def _advice(report: Loaded) -> str:
    if not report.count and not report.shapes:
        return "Not one name is shared: give the model that the file was saved from."
    heads = {name.rpartition(".")[0] for name in report.shapes}
    sizes = {(theirs[:1], ours[:1]) for theirs, ours in report.shapes.values()}
    tails = {(theirs[1:], ours[1:]) for theirs, ours in report.shapes.values()}
    if not report.missing and not report.unexpected and len(heads) == len(sizes) == 1 and all(a == b for a, b in tails):
        (theirs,), (ours,) = sizes.pop()
        return (
            f"Only {heads.pop()} differs, {theirs} outputs against {ours}: build the model with num_classes={theirs}."
        )
    return "Give the model that the file was saved from, or load what fits with strict=False."


def _some(names: tuple[str, ...] | list[str], separator: str = ", ") -> str:
    rest = f"{separator}… ({len(names) - SHOWN} more)" if len(names) > SHOWN else ""
    return separator.join(names[:SHOWN]) + rest
