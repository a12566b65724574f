"""A model as a file that ships: ONNX, torch.export or weights, folded, checked against the model, with its origin inside.

The format follows the suffix: `.onnx`, `.pt2` (torch.export) or `.safetensors`. What was written is read back and run before
it gets its name, so that a file that stands there gives the model's answers.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from renorm.calls import Call, map_tensors, read, refuse_valueless, tensors_in
from renorm.checkpoints import read as read_weights
from renorm.checkpoints import write
from renorm.errors import ModelError, UsageError, require
from renorm.files import refuse_existing, writing
from renorm.fold import Folded, fold
from renorm.prove import distance, share
from renorm.provenance import fingerprint, provenance
from renorm.said import say
from renorm.sites import device_of, find_sites, unwrap
from renorm.state import evaluating, preserving

__all__ = ["SUFFIXES", "Exported", "export", "preflight", "writable"]

TOLERANCE = 1e-4  # of the largest output: other kernels sum in another order, a wrong graph is percents off


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A file that was written and read back.

    `max_rel_error` is the largest difference from the model's outputs, as a share of the largest, over the example and one
    of another batch size; `folded` says which batch norms it still has; `notes` are what the preflight remarked.
    """

    path: Path
    format: str
    max_rel_error: float
    folded: Folded | None
    notes: tuple[str, ...]


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Any,
    *,
    folds: bool = True,
    dynamic_batch: bool = True,
    tolerance: float = TOLERANCE,
    origin: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Exported:
    """Write `model`, in evaluation, to `path`, and prove that the file gives what the model gives.

    `example` is one batch, as a loader gives it. With `folds` batch norms are absorbed first where they can be. With
    `dynamic_batch` the file takes any number of samples. The file carries its origin (`origin` is added to it): under
    "provenance" in ONNX metadata, in the extra files of a .pt2, in the metadata of .safetensors. The model is untouched.

    Raises:
        UsageError: another suffix, or a batch norm in training mode.
        FileExists: a file stands there and `force` is not given.
        ModelError: torch cannot export the model, ONNX lacks one of its operations, or the file's answers differ by more
            than `tolerance` of the largest output; nothing is written then, with `force` or without.
        MissingExtra: ONNX was asked for, and onnx, onnxscript or onnxruntime is not installed.
    """
    target = writable(path, force=force)
    if target.suffix == ".onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            require(name, extra="export", purpose=f"writing {target.name}")
    inner = unwrap(model)
    notes = preflight(inner)
    folded = fold(inner, example) if folds and _has_statistics(inner) else None
    with preserving(inner):
        made = (copy.deepcopy(inner) if folded is None else folded.model).eval()
        call = read(example, model=inner)
        refuse_valueless(call, device_of(inner))
        call = _several(call)
        if target.suffix == ".onnx":
            made, call = made.cpu(), _moved(call, torch.device("cpu"))
        else:
            call = _moved(call, device_of(inner))
        calls = [call, _fewer(call)] if dynamic_batch else [call]
        expected = [_outputs(inner, each) for each in calls]
        text = json.dumps(_origin(inner, folded, origin), default=str)
        with writing(target, force=force) as temporary, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters', about their own internals
            answers = _WRITERS[target.suffix](made, temporary, call, dynamic_batch, text)
            error = max(distance(mine, answers(each)) for mine, each in zip(expected, calls, strict=True))
            if not error <= tolerance:
                raise ModelError(
                    f"{target.name} gives other answers than the model: they differ by {share(error)}, and {tolerance:.1e} is "
                    "allowed. Nothing was written. Export without folding to see whether folding is the cause (folds=False)."
                )
    return Exported(path=target, format=target.suffix[1:], max_rel_error=error, folded=folded, notes=notes)


def writable(path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Return `path` if `export` may write there; call it before the work starts.

    Raises:
        UsageError: another suffix, or as `files.refuse_existing`.
        FileExists: a file stands there and `force` is not given.
    """
    if Path(path).suffix not in _WRITERS:
        raise UsageError(
            f"cannot write {path}: models are exported as {', '.join(_WRITERS)}. Give one of these suffixes."
        )
    return refuse_existing(path, force=force)


def preflight(model: nn.Module) -> tuple[str, ...]:
    """What a reader should know of the model's batch norms before it ships.

    Raises UsageError where one is in training mode: the file would normalise each batch by itself, for good.
    """
    sites = [site for site in find_sites(model) if site.kind == "batch"]
    training = [site.name or "the model itself" for site in sites if site.module.training]
    if training:
        raise UsageError(
            f"{len(training)} of {len(sites)} batch norms are in training mode, {training[0]} first: the file would normalise "
            "each batch by itself. Call model.eval() first."
        )
    notes = []
    bare = [site.name for site in sites if site.tensors is None]
    if bare:
        notes.append(
            say(
                "{count} batch norms hold no statistics ({site} first): answers depend on the batch",
                count=len(bare),
                site=bare[0],
            )
        )
    fresh = [site.name for site in sites if site.tensors and _is_fresh(*site.tensors)]
    if fresh:
        notes.append(
            say(
                "the statistics of {count} batch norms were never calibrated ({site} first): mean 0, variance 1",
                count=len(fresh),
                site=fresh[0],
            )
        )
    if endless := [site.name for site in sites if getattr(site.module, "momentum", 0.1) is None]:
        notes.append(
            say(
                "momentum is None at {count} batch norms ({site} first): harmless in this file, but "
                "torch.compile(fullgraph=True) cannot trace their training",
                count=len(endless),
                site=endless[0],
            )
        )
    return tuple(notes)


def _is_fresh(mean: Tensor, var: Tensor) -> bool:
    return bool((mean == 0).all() and (var == 1).all())


def _has_statistics(model: nn.Module) -> bool:
    return any(site.kind == "batch" and site.tensors is not None for site in find_sites(model))


Answers = Callable[[Call], list[Tensor]]


def _write_weights(model: nn.Module, path: Path, call: Call, dynamic: bool, origin: str) -> Answers:
    write(model, path, provenance=json.loads(origin), force=True)
    state = read_weights(path)

    def answers(given: Call) -> list[Tensor]:
        model.load_state_dict({name: state[name] for name in model.state_dict()})
        return _outputs(model, given)

    return answers


def _write_program(model: nn.Module, path: Path, call: Call, dynamic: bool, origin: str) -> Answers:
    torch.export.save(_traced(model, call, dynamic), path, extra_files={"provenance": origin})
    loaded = torch.export.load(path).module()
    return lambda given: _outputs(loaded, given)


def _write_onnx(model: nn.Module, path: Path, call: Call, dynamic: bool, origin: str) -> Answers:
    onnx = require("onnx", extra="export", purpose="writing ONNX")
    runtime = require("onnxruntime", extra="export", purpose="checking ONNX")
    traced = _traced(model, call, dynamic)
    try:
        program = torch.onnx.export(traced, dynamo=True, verbose=False)
    except Exception as error:
        raise ModelError(f"{type(model).__name__} cannot be written as ONNX: {_reason(error)}.") from error
    assert program is not None
    program.save(path, external_data=False)
    written = onnx.load(path)
    entry = written.metadata_props.add()
    entry.key, entry.value = "provenance", origin
    onnx.save(written, path)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def answers(given: Call) -> list[Tensor]:
        arrays = [tensor.numpy() for tensor in tensors_in((given.args, given.kwargs))]
        return [torch.from_numpy(a) for a in session.run(None, dict(zip(names, arrays, strict=True)))]

    return answers


_WRITERS: dict[str, Callable[[nn.Module, Path, Call, bool, str], Answers]] = {
    ".onnx": _write_onnx,
    ".pt2": _write_program,
    ".safetensors": _write_weights,
}
SUFFIXES: tuple[str, ...] = tuple(_WRITERS)


def _traced(model: nn.Module, call: Call, dynamic: bool) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    shapes, named = tree_map_only(
        Tensor, lambda t: {0: batch} if t.dim() and t.shape[0] == call.samples else None, (call.args, call.kwargs)
    )
    try:
        with torch.no_grad():
            return torch.export.export(
                model, call.args, call.kwargs, dynamic_shapes=_by_name(model, shapes, named) if dynamic else None
            )
    except Exception as error:
        hint = " Where it fixes the number of samples, export with dynamic_batch=False." if dynamic else ""
        raise ModelError(f"torch.export cannot trace {type(model).__name__}: {_reason(error)}.{hint}") from error


def _by_name(model: nn.Module, shapes: Sequence[Any], named: Mapping[str, Any]) -> Any:
    # torch wants either a sequence for positions or a mapping for all; with keywords only the latter will do
    if not named:
        return tuple(shapes)
    names = list(inspect.signature(model.forward).parameters)
    return dict(zip(names, shapes, strict=False)) | dict(named)


def _several(call: Call) -> Call:
    """With two samples at least: torch.export takes a batch of one for a constant."""
    return _resized(call, lambda t: torch.cat([t, t])) if call.samples == 1 else call


def _fewer(call: Call) -> Call:
    """The same inputs with one sample fewer."""
    return _resized(call, lambda t: t[:-1])


def _resized(call: Call, change: Callable[[Tensor], Tensor]) -> Call:
    args, kwargs = map_tensors(
        lambda t: change(t) if t.dim() and t.shape[0] == call.samples else t, (call.args, call.kwargs)
    )
    return Call(args, kwargs, None, len(tensors_in((args, kwargs))[0]))


def _moved(call: Call, device: torch.device) -> Call:
    args, kwargs = map_tensors(lambda t: t.to(device), (call.args, call.kwargs))
    return Call(args, kwargs, None, call.samples)


def _outputs(model: nn.Module, call: Call) -> list[Tensor]:
    device = device_of(model)
    args, kwargs = map_tensors(lambda t: t.to(device), (call.args, call.kwargs))
    with evaluating(model):
        return [t.detach().cpu().clone() for t in tensors_in(model(*args, **kwargs))]


def _origin(model: nn.Module, folded: Folded | None, more: Mapping[str, Any] | None) -> dict[str, Any]:
    made: dict[str, Any] = {"command": "renorm.export", "model": fingerprint(model), "data": None, **(more or {})}
    if folded is not None:
        made |= {"folded": folded.folded, "kept": folded.kept}
    return provenance(**made)


def _reason(error: BaseException) -> str:
    """The line of a long message that says what is wrong."""
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__
    lines = [line.strip() for each in reversed(chain) for line in str(each).splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"No .*(?:found|registered|decomp)|not supported|Unsupported", line)]
    return (telling or lines or [type(error).__name__])[0][:200].rstrip(".")
