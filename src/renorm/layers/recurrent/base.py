"""What recurrent networks with batch norm share: torch's face, packing by length, layers and directions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from renorm.errors import BatchError, UsageError
from renorm.layers.recurrent.steps import Passing, StepNorm

Input = Tensor | PackedSequence
AtStep = Callable[[str, Tensor], Tensor]


class Packed(NamedTuple):
    """Sequences sorted by length, step after step: `sizes[t]` of them still run at step t. Shapes: data (sum of sizes, C)."""

    data: Tensor
    sizes: list[int]
    sorted: Tensor | None
    unsorted: Tensor | None


class Recurrent(nn.Module, ABC):
    """A recurrent network as torch's, keys of weights and biases included, with batch norm at every step.

    `input`, `hidden` and, in an LSTM, `cell` are its norms, each with statistics of its own at each of the first `steps`
    steps; those of layer 1, or of the backward direction, are called `hidden_l1`, `hidden_reverse`, `hidden_l1_reverse`.
    The backward direction counts its steps from the end of each sequence. Padding counts for nothing.

    Shapes: input (T, N, C), (N, T, C) with `batch_first`, (T, C) for one sequence, or packed; `lengths` (N,) for padded ones.
    Raises UsageError for sizes or options that make no sense; on a call BatchError for an input of another width, sequences
    without a step, or lengths that do not fit.
    """

    input_size: int
    hidden_size: int
    num_layers: int
    steps: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    gates: ClassVar[int]
    states: ClassVar[int]
    norms: ClassVar[tuple[str, ...]]
    cites: ClassVar[str] = (
        "@inproceedings{cooijmans2017recurrent, title={Recurrent Batch Normalization}, author={Cooijmans, Tim and Ballas, "
        "Nicolas and Laurent, C{\\'e}sar and G{\\\"u}l{\\c{c}}ehre, {\\c{C}}a{\\u{g}}lar and Courville, Aaron}, "
        "booktitle={ICLR}, year={2017}}"
    )

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        steps: int = 100,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise UsageError(f"{name} is a whole number of 1 or more; got {size!r}.")
        if not 0 <= dropout <= 1:
            raise UsageError(f"dropout is a probability, in [0, 1]; got {dropout!r}.")
        self.input_size, self.hidden_size, self.num_layers, self.steps = input_size, hidden_size, num_layers, steps
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, float(dropout), bidirectional
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        common: dict[str, Any] = {"eps": eps, "momentum": momentum, **where}
        wide = self.gates * hidden_size
        for layer in range(num_layers):
            inputs = input_size if layer == 0 else hidden_size * self.directions
            for suffix in self._suffixes(layer):
                for name, columns in (("weight_ih", inputs), ("weight_hh", hidden_size)):
                    self.register_parameter(f"{name}{suffix}", nn.Parameter(torch.empty(wide, columns, **where)))
                for name in ("bias_ih", "bias_hh") if bias else ():
                    self.register_parameter(f"{name}{suffix}", nn.Parameter(torch.empty(wide, **where)))
                for norm in self.norms:
                    cell = norm == "cell"  # the others' bias would add to that of the gates
                    made = StepNorm(hidden_size if cell else wide, steps, bias=cell, **common)
                    self.add_module(_named(norm, suffix), made)
        self.reset_parameters()

    @property
    def directions(self) -> int:
        """2 where sequences are read from both ends, else 1."""
        return 1 + self.bidirectional

    def reset_parameters(self) -> None:
        """Weights to hidden states orthogonal for each gate, to inputs by Glorot, biases 0; norms at a weight of 0.1."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("bias"):
                nn.init.zeros_(parameter)
                continue
            for gate in parameter.detach().chunk(self.gates):
                init = nn.init.orthogonal_ if name.startswith("weight_hh") else nn.init.xavier_uniform_
                init(gate)
        for module in self.children():
            if isinstance(module, StepNorm):
                module.reset_parameters()

    def flatten_parameters(self) -> None:
        """Nothing; torch's networks have it, and code made for them calls it."""

    def extra_repr(self) -> str:
        shown = [f"{self.input_size}, {self.hidden_size}, steps={self.steps}"]
        shown += [f"num_layers={self.num_layers}"] if self.num_layers > 1 else []
        shown += [f"{name}=True" for name in ("batch_first", "bidirectional") if getattr(self, name)]
        return ", ".join(shown)

    @abstractmethod
    def _step(self, x: Tensor, state: tuple[Tensor, ...], norm: AtStep, weight: Tensor, bias: Tensor | None) -> Any:
        """The states after a step; `norm("hidden", y)` normalises y as at this step.

        Shapes: x (n, gates · H), the normalised input with its bias; states (n, H); weight and bias, of hidden states.
        """

    def _run(self, given: Input, states: Sequence[Tensor] | None, lengths: Any) -> tuple[Input, tuple[Tensor, ...]]:
        """Output in the form of the input, and final states (layers · directions, N, H)."""
        packed, single = self._packed(given, lengths)
        begun = self._initial(states, packed, single)
        data, flip = packed.data, _flipped(packed) if self.bidirectional else None
        finals: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                data = F.dropout(data, self.dropout)
            outputs = []
            for suffix in self._suffixes(layer):
                there = flip if suffix.endswith("_reverse") else None
                state = tuple(part[len(finals)] for part in begun)
                out, final = self._scan(data if there is None else data[there], packed, state, suffix)
                outputs.append(out if there is None else out[there])
                finals.append(final)
            data = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        ended = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
        if packed.unsorted is not None:
            ended = tuple(part[:, packed.unsorted] for part in ended)
        if single:
            return data, tuple(part[:, 0] for part in ended)
        return self._like(given, data, packed, lengths), ended

    def _scan(
        self, data: Tensor, packed: Packed, state: tuple[Tensor, ...], suffix: str
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One layer in one direction: its outputs, packed, and every sequence's states after its own last step."""
        norms = self._norms(suffix)
        passing = {
            name: norm.begin(packed.sizes, packed.unsorted, self._input_bias(suffix) if name == "input" else None)
            for name, norm in norms.items()
        }
        x = F.linear(data, getattr(self, f"weight_ih{suffix}"))
        weight = getattr(self, f"weight_hh{suffix}")
        bias = getattr(self, f"bias_hh{suffix}") if self.bias else None
        outputs, ended = [], []
        for t, now in enumerate(norms["input"].steps_of(x, passing["input"])):
            if len(now) < len(state[0]):
                ended.append(tuple(part[len(now) :] for part in state))
                state = tuple(part[: len(now)] for part in state)
            state = self._step(now, state, partial(_at, norms, passing, t), weight, bias)
            outputs.append(state[0])
        ended.append(state)
        for name, norm in norms.items():
            norm.track_(passing[name])
        final = tuple(torch.cat(parts[::-1]) for parts in zip(*ended, strict=True))
        return torch.cat(outputs), final

    def _norms(self, suffix: str) -> dict[str, StepNorm]:
        """The norms of one layer in one direction, by their kind."""
        return {norm: cast(StepNorm, self.get_submodule(_named(norm, suffix))) for norm in self.norms}

    def _input_bias(self, suffix: str) -> Tensor | None:
        """What is added to the normalised input; None without biases."""
        return self.get_parameter(f"bias_ih{suffix}") if self.bias else None

    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}{end}" for end in ("", "_reverse")[: self.directions]]

    def _packed(self, given: Input, lengths: Any) -> tuple[Packed, bool]:
        """The input packed, and whether it was one sequence without a dimension for samples."""
        data = given.data if isinstance(given, PackedSequence) else given
        fits = data.dim() == 2 if isinstance(given, PackedSequence) else data.dim() in (2, 3)
        if not fits or data.shape[-1] != self.input_size or not data.numel():
            order = "(N, T, C)" if self.batch_first else "(T, N, C)"
            raise BatchError(
                f"{type(self).__name__} reads sequences {order} of {self.input_size} values a step, one or more; it was given "
                f"the shape {tuple(data.shape)}."
            )
        if isinstance(given, PackedSequence):
            if lengths is not None:
                raise UsageError("a packed sequence knows its lengths; leave out lengths=, or pass the padded tensor.")
            return Packed(given.data, given.batch_sizes.tolist(), given.sorted_indices, given.unsorted_indices), False
        single = given.dim() == 2
        x = given[:, None] if single else given.transpose(0, 1) if self.batch_first else given
        if lengths is None:
            return Packed(x.reshape(-1, self.input_size), [x.shape[1]] * x.shape[0], None, None), single
        packed = pack_padded_sequence(x, _checked(lengths, x), enforce_sorted=False)
        return Packed(packed.data, packed.batch_sizes.tolist(), packed.sorted_indices, packed.unsorted_indices), single

    def _like(self, given: Input, data: Tensor, packed: Packed, lengths: Any) -> Input:
        if isinstance(given, PackedSequence):
            return PackedSequence(data, given.batch_sizes, given.sorted_indices, given.unsorted_indices)
        if lengths is None:
            out = data.view(len(packed.sizes), packed.sizes[0], -1)
            return out.transpose(0, 1) if self.batch_first else out
        sequence = PackedSequence(data, torch.tensor(packed.sizes), packed.sorted, packed.unsorted)
        total = given.shape[1 if self.batch_first else 0]
        return pad_packed_sequence(sequence, batch_first=self.batch_first, total_length=total)[0]

    def _initial(self, states: Sequence[Tensor] | None, packed: Packed, single: bool) -> tuple[Tensor, ...]:
        shape = (self.num_layers * self.directions, packed.sizes[0], self.hidden_size)
        if states is None:
            return tuple(packed.data.new_zeros(shape) for _ in range(self.states))
        whole = tuple(state[:, None] if single else state for state in states)
        for state in whole:
            if state.shape != shape:
                raise BatchError(
                    f"{type(self).__name__} needs initial states of shape (layers · directions, N, H) = {shape} for this "
                    f"input; it was given {tuple(state.shape)}."
                )
        return whole if packed.sorted is None else tuple(state[:, packed.sorted] for state in whole)

    def _take_(self, other: nn.RNNBase) -> None:
        """Hold the weights and biases of a network of torch's, and norms that, in evaluation, change nothing."""
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                mine = self.get_parameter(name)
                mine.copy_(parameter)
                mine.requires_grad_(parameter.requires_grad)
            for module in self.children():
                if isinstance(module, StepNorm):
                    module.weight.fill_(math.sqrt(1 + module.eps))
        self.train(other.training)


def like(other: nn.RNNBase) -> dict[str, Any]:
    """The arguments that a network of torch's was made with."""
    if other.proj_size:
        raise UsageError(
            f"a network with proj_size={other.proj_size} was given; hidden states that are projected have no counterpart here."
        )
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
    weight = other.get_parameter("weight_ih_l0")
    return {**{name: getattr(other, name) for name in names}, "device": weight.device, "dtype": weight.dtype}


def _at(norms: Mapping[str, nn.Module], passing: Mapping[str, Passing], step: int, name: str, x: Tensor) -> Tensor:
    """`x` as its norm has it at a step."""
    normalised: Tensor = norms[name](x, passing[name], step)
    return normalised


def _named(norm: str, suffix: str) -> str:
    return norm + suffix.removeprefix("_l0")


def _checked(lengths: Any, x: Tensor) -> Tensor:
    """`lengths` on the CPU, where packing wants them. Shapes: x (T, N, C), lengths (N,)."""
    found = torch.as_tensor(lengths).cpu()
    if found.shape != x.shape[1:2] or found.is_floating_point() or found.dtype == torch.bool:
        raise BatchError(
            f"lengths should be {x.shape[1]} whole numbers, one for each sequence; got shape {tuple(found.shape)} of "
            f"{found.dtype}."
        )
    wrong = (found < 1) | (found > x.shape[0])
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise BatchError(
            f"sequence {row} was said to have {int(found[row])} steps; it needs 1 to {x.shape[0]}, which is what the "
            "padded input has. Leave out sequences without a step."
        )
    return found.long()


def _flipped(packed: Packed) -> Tensor:
    """For each packed value the place of its mirror image: the same sequence, as far from its other end."""
    sizes = torch.tensor(packed.sizes)
    starts = sizes.cumsum(0) - sizes
    steps = torch.arange(len(sizes)).repeat_interleave(sizes)
    rows = torch.arange(int(sizes.sum())) - starts[steps]
    lengths = (sizes[:, None] > torch.arange(packed.sizes[0])).sum(0)
    return (starts[lengths[rows] - 1 - steps] + rows).to(packed.data.device)
