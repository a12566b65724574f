"""One item of `batches` in, a model's logits out: how every verb calls a model it has never seen."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from renorm.errors import BatchError, OneShot, UsageError
from renorm.sites import device_of, unwrap

LABELS = ("labels", "label", "targets", "target", "y")  # where labels ride in a dict, dataclass or object
LOGITS = ("logits", "out", "output", "outputs", "pred", "preds", "prediction", "predictions")

Forward = Callable[[nn.Module, Any], Any]
Output = str | int | Callable[[Any], Tensor]


class Call(NamedTuple):
    """One batch, taken apart: how to call the model, the labels that must stay out of the call, and how many samples."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Any
    samples: int


class Result(NamedTuple):
    """What a model made of one batch: its output, the logits in it (None where nothing says which), labels, samples."""

    output: Any
    logits: Tensor | None
    labels: Any
    samples: int


@dataclass(frozen=True, kw_only=True)
class Caller:
    """How a verb runs a model on batches.

    forward        (model, batch) → output, for a model that the usual ways of calling do not fit
    output         which leaf of the output is the logits: a key, an index, or output → logits
    device         where to run; None: where the model is
    autocast       a dtype for torch.autocast, such as torch.bfloat16; None: as the surroundings have it
    channels_last  lay out 4-d and 5-d inputs with channels last
    """

    forward: Forward | None = None
    output: Output | None = None
    device: torch.device | str | None = None
    autocast: torch.dtype | None = None
    channels_last: bool = False

    def __post_init__(self) -> None:
        if self.forward is not None and not callable(self.forward):
            raise UsageError(f"forward is a function of (model, batch); got {self.forward!r}.")
        if self.output is not None and not (isinstance(self.output, str | int) or callable(self.output)):
            raise UsageError(f"output is a key, an index or a function of the model's output; got {self.output!r}.")

    def run(self, model: nn.Module, batch: Any, *, index: int = 0) -> Result:
        """Run `model` on one batch, in whatever mode it is in, and say what came out.

        An exception of the model's own passes through, with a note on the batch (`index`, shapes) that it met.
        Raises BatchError for a batch that holds no tensor, no sample, or a number that is not finite; UsageError for a model
        on the meta device.
        """
        model = unwrap(model)
        device = torch.device(self.device) if self.device is not None else device_of(model)
        call = read(batch, model=None if self.forward else model)
        refuse_valueless(call, device, index=index)
        moved = self._moved(batch if self.forward else (call.args, call.kwargs), device)
        _refuse_non_finite((call.args, call.kwargs), index)  # labels may be missing, and NaN
        if call.samples == 0:
            raise BatchError(f"batch {index} holds no samples; leave empty batches out of the loader.")
        try:
            with self._precision(device):
                output = self.forward(model, moved) if self.forward else model(*moved[0], **moved[1])
        except Exception as error:
            error.add_note(f"renorm: the model met this in batch {index}, whose inputs are {_shapes(moved)}.")
            if isinstance(error, TypeError) and "argument" in str(error) and self.forward is None:
                error.add_note(
                    "renorm: where it takes other arguments, say how to call it: forward=lambda model, batch: …"
                )
            raise
        return Result(output, self.find(output), call.labels, call.samples)

    def logits(self, result: Result, *, asked: str) -> Tensor:
        """The result's logits. Raises UsageError, saying who `asked` and what the model gave, where there are none."""
        if result.logits is None:
            raise UsageError(
                f"{asked} needs the model's logits, but its output is {_describe(result.output)}; "
                "say which part with output= (a key, an index or a function)."
            )
        return result.logits

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext() if self.autocast is None else torch.autocast(device.type, dtype=self.autocast)

    def _moved(self, value: Any, device: torch.device) -> Any:
        def move(tensor: Tensor) -> Tensor:
            tensor = tensor.to(device, non_blocking=True)
            if self.channels_last and tensor.is_floating_point() and tensor.dim() in (4, 5):
                layout = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
                tensor = tensor.contiguous(memory_format=layout)
            return tensor

        return map_tensors(move, value)

    def find(self, output: Any) -> Tensor | None:
        """The logits in a model's output; None where nothing says which part they are."""
        if callable(self.output):
            return _as_tensor(self.output(output))
        if self.output is not None:
            try:
                part = getattr(output, str(self.output)) if _has_field(output, self.output) else output[self.output]
            except (KeyError, IndexError, TypeError):
                raise UsageError(
                    f"output={self.output!r} was asked of the model's output, which is {_describe(output)}."
                ) from None
            return _as_tensor(part)
        return _find_logits(output)


def read(batch: Any, *, model: nn.Module | None = None) -> Call:
    """Take one batch apart: a tensor, a tuple or list (inputs first, labels second), a dict, a dataclass or another object.

    Labels ride as the second element or under `labels`, `target` and the like, and are kept out of the call. A dict's other
    entries become keyword arguments; with `model` given, those its `forward` does not accept are left out, what it requires is
    an input whatever its name, and a single tensor under a name it does not know is passed by position. Inputs that are a tuple
    are passed as several arguments where `forward` takes so many.
    Raises BatchError where no tensor can be found to pass.
    """
    if _is_array(batch):
        inputs, labels = batch, None
    elif isinstance(batch, Mapping):
        inputs, labels = dict(batch), None
    elif isinstance(batch, list | tuple) and not _label_field(batch):
        if not batch:
            raise BatchError("an empty tuple was found where a batch should be; pass (inputs,) or (inputs, labels).")
        inputs, labels = batch[0], batch[1] if len(batch) > 1 else None
        inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    elif dataclasses.is_dataclass(batch) or hasattr(batch, "_fields"):
        names = batch._fields if hasattr(batch, "_fields") else [f.name for f in dataclasses.fields(batch)]
        inputs, labels = {name: getattr(batch, name) for name in names}, None
    else:
        name = _label_field(batch)
        inputs, labels = batch, getattr(batch, name) if name else None

    if isinstance(inputs, dict):
        needed = {
            p.name for p in _parameters(model) or () if p.default is p.empty
        }  # then it is an input, whatever its name
        found = [inputs.pop(name) for name in LABELS if name in inputs and name not in needed]
        args, kwargs = _fit_keywords(inputs, model)
        labels = found[0] if found else labels
    else:
        args, kwargs = _fit_positions(inputs, model), {}
    args, kwargs, labels = map_arrays((args, kwargs, labels))
    return Call(args, kwargs, labels, _samples(args, kwargs))


def several_passes(batches: Iterable[Any], *, asked: str) -> Iterable[Any]:
    """`batches`, if it can be read more than once.

    Raises OneShot, saying what was `asked` for, when it is an iterator, which would be empty the second time; UsageError
    where it is no iterable of batches.
    """
    _refuse_other_than_batches(batches, asked)
    if isinstance(batches, Iterator):
        raise OneShot(
            f"{asked} reads its batches several times, but was given a {type(batches).__name__}, which can be read once; "
            "pass a list or a DataLoader."
        )
    return batches


def nonempty(batches: Iterable[Any], *, asked: str, required: bool = True) -> Iterator[tuple[int, Any]]:
    """The batches with their index.

    Raises UsageError where `batches` is no iterable of batches, BatchError where there is none in it and one is `required`.
    """
    _refuse_other_than_batches(batches, asked)
    numbered = enumerate(batches)
    first = next(numbered, None)
    if first is None:
        if required:
            raise BatchError(
                f"{asked} was given batches, but there was none in them; check the loader (an iterator read before?)."
            )
        return numbered
    return itertools.chain([first], numbered)


def _refuse_other_than_batches(batches: Any, asked: str) -> None:
    if isinstance(batches, str | bytes | nn.Module) or not isinstance(batches, Iterable):
        raise UsageError(
            f"{asked} takes an iterable of batches, such as a list or a DataLoader; got {type(batches).__name__}."
        )
    if isinstance(batches, Tensor):
        # iterating would take it apart into samples without a batch dimension
        raise UsageError(
            f"{asked} takes an iterable of batches; got one tensor of shape {tuple(batches.shape)}: put it in a list."
        )


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with every tensor in its tuples, lists, mappings and dataclasses replaced by `function(tensor)`."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, v) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(function, v) for v in value)
    if isinstance(value, Mapping):
        return {k: map_tensors(function, v) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {f.name: map_tensors(function, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **changes)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in tuples, lists, mappings and dataclasses, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, value)
    return found


def map_arrays(value: Any) -> Any:
    """`value` with NumPy arrays, at the top or one level down, as tensors that share their memory."""
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return type(value)(map_arrays(v) for v in value)
    if isinstance(value, dict):
        return {k: map_arrays(v) for k, v in value.items()}
    if _is_array(value) and not isinstance(value, Tensor):
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    return value


def uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Inside, compiled parts of `model` run eagerly: a hook added after compilation would be silently passed over."""
    stack = ExitStack()
    for (
        module
    ) in model.modules():  # torch's own listing: `walk` looks through compiled parts, which are what is wanted here
        if getattr(module, "_compiled_call_impl", None) is not None:
            stack.callback(setattr, module, "_compiled_call_impl", module._compiled_call_impl)
            module._compiled_call_impl = None
        own = module._modules  # where looking for what is not there is cheap; a scripted module's has no get()
        inner = own["_orig_mod"] if "_orig_mod" in own else None
        if inner is not None:
            stack.callback(setattr, module, "forward", module.forward)
            module.forward = inner.__call__
    return stack


def _fit_keywords(inputs: dict[str, Any], model: nn.Module | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    parameters = _parameters(model)
    if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters):
        return (), inputs
    accepted = {p.name for p in parameters}
    kept = {name: value for name, value in inputs.items() if name in accepted}
    if kept:
        return (), kept
    loose = [value for value in inputs.values() if _is_array(value)]
    if len(loose) == 1:
        return (loose[0],), {}
    raise BatchError(
        f"a batch with entries {', '.join(map(repr, inputs)) or 'none'} was to be passed to a model whose forward takes "
        f"{', '.join(sorted(accepted)) or 'nothing'}; rename the entries, or say how to call it with forward=."
    )


def _fit_positions(inputs: Any, model: nn.Module | None) -> tuple[Any, ...]:
    if not isinstance(inputs, list | tuple) or not inputs:
        return (inputs,)
    parameters = _parameters(model)
    if parameters is None:
        return tuple(inputs) if isinstance(inputs, tuple) else (inputs,)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    open_ended = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    # a list may be one argument (torchvision's detectors); loaders turn tuples into lists, so ask what forward requires
    several = open_ended or len(positional) >= len(inputs) if isinstance(inputs, tuple) else len(required) >= 2
    return tuple(inputs) if several else (inputs,)


def _parameters(model: nn.Module | None) -> list[inspect.Parameter] | None:
    if model is None:
        return None
    function: Any = getattr(model, "call", model.forward) if hasattr(model, "_layers") else model.forward  # Keras: call
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None


def _samples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    for value in (*args, *kwargs.values()):
        if isinstance(value, list) and value and all(isinstance(v, Tensor) for v in value):
            return len(value)  # a list of images of different sizes
        for tensor in tensors_in(value):
            return tensor.shape[0] if tensor.dim() else 1
    for value in args:
        size = getattr(value, "batch_size", None) or getattr(value, "num_graphs", None)
        if isinstance(size, int):
            return size
    raise BatchError(
        f"a batch of {', '.join(_describe(v) for v in (*args, *kwargs.values())) or 'nothing'} holds no tensor to pass to the "
        "model; pass tensors, (inputs, labels), a dict or a dataclass of tensors."
    )


def refuse_valueless(call: Call, device: torch.device, *, index: int = 0) -> None:
    """Raise UsageError for a model, BatchError for a batch, on the meta device: there tensors have shapes and no values."""
    if device.type == "meta":
        raise UsageError(
            "the model was to be run, and it is on the meta device, where weights have no values; give them some first "
            "(model.to_empty(device=...), then load_state_dict)."
        )
    if any(tensor.is_meta for tensor in tensors_in((call.args, call.kwargs))):
        raise BatchError(
            f"batch {index} is on the meta device, where tensors have no values; pass one that holds numbers."
        )


def _refuse_non_finite(value: Any, index: int) -> None:
    for tensor in tensors_in(value):
        # one sum is finite unless an entry is not: cheaper than looking at each
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
            bad = ~torch.isfinite(tensor)
            if bool(bad.any()):
                samples = bad.flatten(1).any(1).nonzero().flatten().tolist() if tensor.dim() > 1 else []
                raise BatchError(
                    f"batch {index} holds {int(bad.sum())} numbers that are NaN or infinite, first in sample "
                    f"{samples[0] if samples else 0} of the batch; statistics would be ruined by them. Leave those samples out."
                )


def _find_logits(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    for name in LOGITS:
        part = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(part, Tensor):
            return part
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    tensors = tensors_in(output)
    return tensors[0] if len(tensors) == 1 else None


def _as_tensor(part: Any) -> Tensor:
    if not isinstance(part, Tensor):
        raise UsageError(f"output= names a part of the model's output that is {_describe(part)}, not a tensor.")
    return part


def _has_field(output: Any, name: str | int) -> bool:
    return isinstance(name, str) and not isinstance(output, Mapping) and hasattr(output, name)


def _label_field(batch: Any) -> str | None:
    return next((name for name in LABELS if hasattr(batch, name)), None)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or (type(value).__module__ == "numpy" and hasattr(value, "__array_interface__"))


def _shapes(value: Any) -> str:
    return (
        ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors_in(value)) or "no tensors"
    )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a mapping with {', '.join(map(str, value))}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
