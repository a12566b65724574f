"""Norm layers as a file holds them: found without the model's code, and without running anything the file contains.

Weights name their layers; an exported graph also says how each batch norm is used and what stands in front of it. Both
become modules that hold the tensors and that cannot run, so that the doctor's rules on state read them as any model's.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from renorm.checkpoints import read_weights
from renorm.errors import CheckpointError, UsageError, require
from renorm.provenance import plain_names
from renorm.said import say

__all__ = ["GRAPHS", "WEIGHTS", "Contents", "Stored", "contents_of", "read_contents", "skeleton"]

WEIGHTS = (".safetensors", ".pt", ".pth", ".th", ".bin", ".ckpt")
GRAPHS = (".onnx", ".pt2")
STATISTICS = ("running_mean", "running_var")
KEYS = (*STATISTICS, "weight", "bias", "num_batches_tracked")
NAMED = re.compile(r"(^|[._])(bn|batch_?norm)\d*([._]|$)", re.IGNORECASE)
CARRIERS = re.compile(
    r"^(aten\.)?(conv\w*|linear|addmm|Conv\w*|Gemm)$"
)  # what a batch norm behind it can be folded into
DTYPES = {6: torch.float16, 7: torch.float32, 8: torch.float64, 13: torch.bfloat16, 4: torch.int32, 5: torch.int64}


@dataclass(frozen=True)
class Stored:
    """One batch norm of a file. `eps`, `momentum` and `training` are None where a file of weights does not say.

    `carrier` is the operation in front that could have absorbed it, "" where there is none or something else reads it.
    """

    name: str
    tensors: Mapping[str, Tensor]
    eps: float | None = None
    momentum: float | None = None
    training: bool | None = None
    carrier: str = ""


@dataclass(frozen=True)
class Contents:
    """What a file holds: its batch norms, whether it is a graph, all its tensors by plain name, and what was remarked."""

    norms: tuple[Stored, ...]
    graph: bool
    state: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    notes: tuple[str, ...] = ()


def read_contents(path: str | os.PathLike[str]) -> Contents:
    """The batch norms of a checkpoint, an ONNX model or a `.pt2` program; nothing in the file is run or unpickled.

    Raises:
        UsageError: another suffix.
        CheckpointError: no such file, damaged, or one that would have to be unpickled.
        MissingExtra: an ONNX model, and onnx is not installed.
    """
    file = Path(path)
    if file.suffix not in (*WEIGHTS, *GRAPHS):
        raise UsageError(
            f"{file} was to be examined without its model; the doctor reads weights ({', '.join(WEIGHTS)}) and exported "
            f"models ({', '.join(GRAPHS)}). Give one of these, or the model: renorm doctor MODEL."
        )
    if file.suffix in WEIGHTS:
        return _weights(file)
    if not file.is_file():
        raise CheckpointError(f"there is no model file {file}. Correct the path.")
    return _onnx(file) if file.suffix == ".onnx" else _program(file)


def skeleton(norms: Sequence[Stored]) -> nn.Module:
    """Modules in evaluation that hold what the file holds, under the file's names; they have no forward to speak of."""
    root = nn.Module()
    for norm in norms:
        layer = _layer(norm)
        if not norm.name:
            return layer.eval()
        *above, last = norm.name.split(".")
        place = root
        for part in above:
            if not isinstance(place._modules.get(part), nn.Module):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, layer)
    return root.eval()


def _layer(norm: Stored) -> nn.Module:
    tensors = norm.tensors
    channels = next(t.numel() for key in KEYS if (t := tensors.get(key)) is not None)
    layer = nn.BatchNorm1d(channels, affine=False)
    if norm.eps is not None:
        layer.eps = norm.eps
    if norm.momentum is not None:
        layer.momentum = norm.momentum
    for key in ("weight", "bias"):
        if (value := tensors.get(key)) is not None:
            layer.register_parameter(key, nn.Parameter(value.clone(), value.is_floating_point()))
    for key in STATISTICS:
        if (value := tensors.get(key)) is not None:
            layer.register_buffer(key, value.clone())
    counter = tensors.get("num_batches_tracked")
    if counter is not None or "running_mean" not in tensors:
        layer.num_batches_tracked = torch.tensor(0) if counter is None else counter.clone()
    elif norm.training is not None:
        layer.num_batches_tracked = torch.tensor(1)  # a graph has no counter to lack
    else:
        layer.num_batches_tracked = None
    return layer


# ── weights ──


def _weights(file: Path) -> Contents:
    weights = read_weights(file)
    return contents_of(weights.state, notes=weights.notes)


def contents_of(state: Mapping[str, Tensor], *, notes: Sequence[str] = ()) -> Contents:
    """The batch norms among tensors by name, as a file of weights or the `state_dict` of a scripted module holds them."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        prefix, _, key = name.rpartition(".")
        layers.setdefault(prefix, {})[key] = value
    norms, guessed = [], 0
    before: Mapping[str, Tensor] = {}
    for name, tensors in layers.items():
        if "running_mean" in tensors or "running_var" in tensors:
            norms.append(Stored(name, {key: tensors[key] for key in KEYS if key in tensors}))
        elif _looks_bare(name, tensors, before):
            norms.append(Stored(name, {key: tensors[key] for key in KEYS if key in tensors}))
            guessed += 1
        before = tensors
    said = list(notes)
    if guessed:
        said.append(
            say(
                "{count} layers hold no running statistics and were taken for batch norms by their names, or by standing "
                "behind a convolution without bias",
                count=guessed,
            )
        )
    if norms:
        said.append(say("weights alone say nothing of eps, momentum and modes: rules on those were left out"))
    return Contents(tuple(norms), graph=False, state=state, notes=tuple(said))


def _looks_bare(name: str, tensors: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> bool:
    """Whether a layer looks like a batch norm whose statistics were not saved."""
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or weight.dim() != 1 or bias is None or bias.shape != weight.shape:
        return False
    if "num_batches_tracked" in tensors or NAMED.search(name):
        return True
    conv = before.get("weight")
    return conv is not None and conv.dim() >= 3 and "bias" not in before and len(conv) == len(weight)


# ── graphs ──


def _onnx(file: Path) -> Contents:
    onnx = require("onnx", extra="export", purpose="reading ONNX")
    try:
        graph = onnx.load(str(file)).graph
        held = {each.name: torch.tensor(onnx.numpy_helper.to_array(each)) for each in graph.initializer if _small(each)}
    except Exception as error:  # protobuf's, the operating system's, numpy's: a file that cannot be read has many
        raise CheckpointError(_unreadable(file, "an ONNX model", error)) from error
    makers = {name: node.op_type for node in graph.node for name in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    norms = []
    for index, node in enumerate(n for n in graph.node if n.op_type == "BatchNormalization"):
        given = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        names = dict(zip(("weight", "bias", *STATISTICS), node.input[1:5], strict=False))
        source = names.get("running_mean", "")
        name = source.removesuffix(".running_mean") if source.endswith(".running_mean") else node.name or f"norm{index}"
        keeps = given.get("momentum", 0.9)  # ONNX: the share of what is kept
        norms.append(
            Stored(
                _dotted(name),
                {key: held[value] for key, value in names.items() if value in held},
                eps=float(given.get("epsilon", 1e-5)),
                momentum=1.0 - float(keeps),
                training=bool(given.get("training_mode", 0)) or sum(map(bool, node.output)) > 1,
                carrier=_carrier(makers.get(node.input[0], ""), readers[node.input[0]]),
            )
        )
    return _graph(file, norms)


def _small(tensor: Any) -> bool:
    return len(tensor.dims) <= 1


def _program(file: Path) -> Contents:
    try:
        with zipfile.ZipFile(file) as archive:
            places = {name.partition("/")[2]: name for name in archive.namelist()}
            model = json.loads(archive.read(places["models/model.json"]))
            state = dict(_tensors(archive, places))
        graph = model["graph_module"]["graph"]
        inputs = model["graph_module"]["signature"]["input_specs"]
        targets: dict[str, str] = {}
        for spec in inputs:
            for kind in ("parameter", "buffer"):
                if kind in spec:
                    targets[spec[kind]["arg"]["name"]] = spec[kind][f"{kind}_name"]
        return _graph(file, list(_program_norms(graph["nodes"], targets, state)), state)
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            _unreadable(file, "a program of torch.export (renorm reads those of torch 2.9 and later)", error)
        ) from error


def _tensors(archive: zipfile.ZipFile, places: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """The vectors and scalars among the weights, from their bytes; what would need a pickle is left out."""
    config = json.loads(archive.read(places["data/weights/model_weights_config.json"]))["config"]
    for name, entry in config.items():
        meta = entry["tensor_meta"]
        sizes = [size["as_int"] for size in meta["sizes"]]
        dtype = DTYPES.get(meta["dtype"])
        if not entry["use_pickle"] and dtype is not None and len(sizes) <= 1:
            raw = bytearray(archive.read(places[f"data/weights/{entry['path_name']}"]))
            yield name, torch.frombuffer(raw, dtype=dtype)[: sizes[0] if sizes else 1].reshape(sizes).clone()


def _program_norms(
    nodes: Sequence[Mapping[str, Any]], targets: Mapping[str, str], state: Mapping[str, Tensor]
) -> Iterator[Stored]:
    makers = {
        out["as_tensor"]["name"]: node["target"] for node in nodes for out in node["outputs"] if "as_tensor" in out
    }
    readers = Counter(arg["as_tensor"]["name"] for node in nodes for arg in _args(node).values() if "as_tensor" in arg)
    for index, node in enumerate(node for node in nodes if "batch_norm" in node["target"]):
        args = _args(node)
        names = {key: targets.get(_name_of(args.get(key)), "") for key in ("weight", "bias", *STATISTICS)}
        home = next((value.rpartition(".")[0] for value in names.values() if value), f"norm{index}")
        came = _name_of(args.get("input"))
        op = makers.get(came, "").removeprefix("torch.ops.").removesuffix(".default")
        yield Stored(
            home,
            {key: state[value] for key, value in names.items() if value in state},
            eps=args.get("eps", {}).get("as_float"),
            momentum=args.get("momentum", {}).get("as_float"),
            training=bool(args.get("training", {}).get("as_bool", "no_training" not in node["target"])),
            carrier=_carrier(op, readers[came]),
        )


def _args(node: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {each["name"]: each["arg"] for each in node["inputs"] if isinstance(each["arg"], Mapping)}


def _name_of(arg: Mapping[str, Any] | None) -> str:
    return str((arg or {}).get("as_tensor", {}).get("name", ""))


def _carrier(op: str, readers: int) -> str:
    return op if readers == 1 and CARRIERS.match(op) else ""


def _graph(file: Path, norms: Sequence[Stored], state: Mapping[str, Tensor] | None = None) -> Contents:
    kept = [norm for norm in norms if norm.tensors]
    notes = []
    if len(kept) < len(norms):
        notes.append(
            say(
                "the statistics of {count} batch norms are computed in the graph, not held",
                count=len(norms) - len(kept),
            )
        )
    plain = {} if state is None else {name: state[key] for name, key in plain_names(state).items()}
    return Contents(_distinct(kept), graph=True, state=plain, notes=tuple(notes))


def _distinct(norms: Sequence[Stored]) -> tuple[Stored, ...]:
    """A layer that is called twice is one layer; of its calls, one in training counts."""
    found: dict[str, Stored] = {}
    for norm in norms:
        if norm.name not in found or norm.training:
            found[norm.name] = norm
    return tuple(found.values())


def _dotted(name: str) -> str:
    return ".".join(part for part in re.split(r"[./:]+", name) if part)


def _unreadable(file: Path, what: str, error: Exception) -> str:
    reason = re.sub(r"\s+", " ", str(error))[:120] or type(error).__name__
    return f"{file} ({file.stat().st_size:,} bytes) cannot be read as {what} ({reason}). Export it again."
