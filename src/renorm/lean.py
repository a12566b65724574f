"""Training in little memory: what stands between two blocks is kept, what is inside is computed again, statistics move once."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from renorm.calls import map_tensors, tensors_in
from renorm.errors import NoBatchNorm, UsageError
from renorm.sites import Site, find_sites, is_keras, parameters_of, select, unwrap, walk
from renorm.state import closed, opened, refuse_if_later

SHARE = 1 / 8  # of the norm layers; a stack of blocks that holds more of them is taken apart
MOST = 1 / 2  # whatever holds more of them is taken apart: computed again as one piece it would be kept as a whole

Forward = Callable[..., Any]


def lean_(model: nn.Module, include: str | Sequence[str] = "*", exclude: str | Sequence[str] = ()) -> Lean:
    """Until restored, training keeps only what goes into each block of `model`, and runs the block again in the backward pass.

    include, exclude   patterns for the names of blocks, those in `.blocks`

    Outputs, gradients and statistics are those of before, bit for bit where the same forward gives the same numbers twice; a
    forward more is the price. Random numbers are drawn again as before, and in the second forward norm layers work on copies of
    what they hold, so that each batch moves their statistics once: by themselves, `checkpoint` and the switches of timm and
    transformers move them twice. Without gradients nothing changes. In training a causal model of transformers keeps no cache.

    A block is the element of a stack of modules (`nn.Sequential`, `nn.ModuleList`) that holds a norm layer, or within a plain
    `nn.Sequential` of single layers as many of them as leave about the square root of their number of pieces.
    Raises NoBatchNorm for a model without norm layers, UsageError where it is not made of blocks, or none is left by the
    patterns; in the backward pass UsageError where a block's input was changed in place since it ran.
    """
    inner = unwrap(model)
    sites = find_sites(inner)
    if not sites:
        raise NoBatchNorm(f"lean_ needs norm layers; {type(inner).__name__} has none.")
    pieces, kept = _pieces(inner, sites)
    if not pieces:
        why = f": {next(iter(kept))!r} {next(iter(kept.values()))}" if kept else ""
        raise UsageError(
            f"lean_ runs blocks again, and {type(inner).__name__} is not made of blocks with norm layers{why}. Put them into "
            'an nn.Sequential, or train it as it is: memory="normal".'
        )
    chosen = {piece.name for piece in select(pieces, include=include, exclude=exclude)}
    if not chosen:
        raise UsageError(
            f"lean_ was asked for {include!r} without {exclude!r}, and of {len(pieces)} blocks, {pieces[0].name!r} first, none "
            "is left by that."
        )
    return Lean([piece for piece in pieces if piece.name in chosen], kept)


@dataclass(frozen=True)
class Piece:
    """What is run again at once: a module, or of an `nn.Sequential` the children from `first` up to `last`."""

    name: str
    module: nn.Module
    first: int = 0
    last: int = 0
    _looked: list[nn.Module] = field(default_factory=list, repr=False, compare=False)
    _norms: list[nn.Module] = field(default_factory=list, repr=False, compare=False)

    @property
    def parts(self) -> list[nn.Module]:
        """The modules in the order in which they run; one that stands twice is run twice."""
        return (
            [c for c in self.module._modules.values() if c is not None][self.first : self.last]
            if self.last
            else [self.module]
        )

    def norms(self) -> list[nn.Module]:
        """Its norm layers, with what is below them; looked for again where other modules have been put in."""
        now = [module for part in self.parts for module in part.modules()]
        if len(now) != len(self._looked) or any(a is not b for a, b in zip(now, self._looked, strict=True)):
            self._looked[:] = now
            self._norms[:] = {m: None for part in self.parts for s in find_sites(part) for _, m in walk(s.module)}
        return self._norms


class Lean:
    """What `lean_` did; `restore_()` lets training keep everything again.

    blocks   the names of what is computed again, in the model's order; `features[0:6]` are six children of a Sequential
    kept     {name: why a block is not among them}
    """

    label: str = "lean_"

    def __init__(self, pieces: Sequence[Piece], kept: Mapping[str, str]) -> None:
        self.blocks: tuple[str, ...] = tuple(piece.name for piece in pieces)
        self.kept: dict[str, str] = dict(kept)
        owners = {piece.module: [p for p in pieces if p.module is piece.module] for piece in pieces}
        self._held = {owner.name: owner.module for owner in pieces}
        self._before: list[tuple[nn.Module, Forward | None]] = []
        for module, parts in owners.items():
            self._before.append((module, module.__dict__.get("forward")))
            opened(module, self)
            if parts[0].last:
                module.__dict__["forward"] = functools.partial(_by_runs, module, tuple(parts))
            else:
                forward = module.__dict__.get("forward") or functools.partial(type(module).forward, module)
                module.__dict__["forward"] = functools.partial(_again, parts[0], forward)

    @property
    def is_open(self) -> bool:
        """Whether it still stands."""
        return bool(self._before)

    def restore_(self) -> None:
        """Give every block its own forward back; a second call does nothing.

        Raises OpenChange where a later change at the same blocks still stands.
        """
        for name, module in self._held.items() if self._before else ():
            refuse_if_later(module, [self], name=name)
        for module, forward in self._before:
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward
            closed(module, self)
        self._before = []


def _by_runs(owner: nn.Module, runs: Sequence[Piece], value: Any) -> Any:
    """The forward of an `nn.Sequential`, of which `runs` are computed again."""
    children = [child for child in owner._modules.values() if child is not None]
    starts = {run.first: run for run in runs}
    place = 0
    while place < len(children):
        run = starts.get(place)
        part = run.parts if run else children[place : place + 1]
        forward = functools.partial(_through, part)
        value = _again(run, forward, value) if run else forward(value)
        place += len(part)
    return value


def _through(modules: Sequence[Any], value: Any) -> Any:
    for module in modules:
        value = module(value)
    return value


def _again(piece: Piece, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """`forward`, of which only the arguments are kept; as it is where nothing would be kept, or arguments can change."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return forward(*args, **kwargs)
    if piece.module.training:
        args, kwargs = tuple(map(_without_cache, args)), {key: _without_cache(value) for key, value in kwargs.items()}
    given = tensors_in((args, kwargs))
    wanted = any(t.requires_grad for t in given) or any(p.requires_grad for m in piece.parts for p in m.parameters())
    if not (wanted and _plain((args, kwargs))):
        return forward(*args, **kwargs)
    # lists of its own: dense networks append to the one that they gave
    args, kwargs = map_tensors(lambda tensor: tensor, (args, kwargs))
    # not the tensors themselves: whoever keeps them elsewhere meanwhile, by hooks on what is saved, is to have the room
    versions = [(ref(t), t._version) for t in given]
    contexts = functools.partial(_contexts, piece, versions)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _without_cache(value: Any) -> Any:
    """None for a cache of transformers that is still empty: in training nobody reads what it would hold."""
    length = getattr(value, "get_seq_length", None)
    return None if callable(length) and length() == 0 else value


def _plain(value: Any) -> bool:
    """Whether these arguments are tensors and constants alone: a cache that a forward writes would be written twice."""
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(map(_plain, value.values()))
    return value is None or isinstance(value, Tensor | bool | int | float | str | torch.dtype | torch.Size)


Versions = Sequence[tuple[ref[Tensor], int]]


def _contexts(piece: Piece, versions: Versions) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _a_second_time(piece, versions)


@contextmanager
def _a_second_time(piece: Piece, versions: Versions) -> Iterator[None]:
    """Inside, norm layers in training write to copies of their buffers: each batch moves statistics once."""
    if any(tensor._version != version for held, version in versions if (tensor := held()) is not None):
        raise UsageError(
            f"the block {piece.name!r} was to be run again, and its input was changed in place since it ran; leave it out with "
            "lean_(model, exclude=…)."
        )
    held = [(module._buffers, dict(module._buffers)) for module in piece.norms() if module.training and module._buffers]
    for buffers, values in held:
        buffers.update({key: None if value is None else _lent(value) for key, value in values.items()})
    try:
        yield
    finally:
        for buffers, values in held:
            buffers.update(values)


def _lent(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    copy.__dict__[_LENT] = True
    return copy


def is_lent(tensor: Tensor) -> bool:
    """Whether a buffer is a copy that a block works on while it is run again."""
    return _LENT in tensor.__dict__


_LENT = "_renorm_lent"


def _pieces(model: nn.Module, sites: Sequence[Site]) -> tuple[list[Piece], dict[str, str]]:
    """What can be computed again, in the order of registration, and what cannot, with the reason."""
    norms = {site.module for site in sites}
    found: list[Piece] = []
    kept: dict[str, str] = {}
    seen: set[nn.Module] = set()

    def visit(name: str, module: nn.Module) -> None:
        if module in seen or module in norms or not norms.intersection(module.modules()):
            return
        seen.add(module)
        share = len(norms.intersection(module.modules())) / len(norms)
        if module is model or _is_stack(module) or share > MOST or (share > SHARE and _holds_stack(module, norms)):
            runs = _runs(name, module, norms) if type(module).forward is nn.Sequential.forward else []
            found.extend(runs)
            inside = {child for run in runs for child in list(module._modules.values())[run.first : run.last]}
            for key, child in module.named_children():
                if child not in inside:
                    visit(f"{name}.{key}" if name else key, child)
        elif why := _unfit(module):
            kept[name] = why
        else:
            found.append(Piece(name, module))

    visit("", model)
    return found, kept


def _is_stack(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)


def _holds_stack(module: nn.Module, norms: set[nn.Module]) -> bool:
    """Whether somewhere within are two blocks or more in a stack."""
    for inner in module.modules():
        blocks = [
            c for c in inner.children() if not _is_stack(c) and c not in norms and norms.intersection(c.modules())
        ]
        if _is_stack(inner) and len(blocks) > 1:
            return True
    return False


def _unfit(module: nn.Module) -> str:
    """Why a block cannot be run again; empty where it can."""
    if is_keras(module):
        return "is a Keras layer, whose forward is not the module's own"
    first = next((m for m in module.modules() if not list(m.children())), module)
    return "changes its input in place" if getattr(first, "inplace", False) else ""


def _runs(name: str, stack: nn.Module, norms: set[nn.Module]) -> list[Piece]:
    """Single layers in a row, from one with weights up to before another, so many that about √n pieces of n are left."""
    children = [child for child in stack._modules.values() if child is not None]
    single = [child in norms or not list(child.children()) for child in children]
    pieces: list[Piece] = []
    place = 0
    while place < len(children):
        end = place
        while end < len(children) and single[end]:
            end += 1
        starts = [i for i in range(place, end) if children[i] not in norms and _weighs(children[i])]
        step = max(1, math.isqrt(len(starts)))
        # what stands before the first weight belongs to the first piece, unless that would change the piece's input
        first_of_all = starts[:1] if getattr(children[place], "inplace", False) else [place]
        cuts = [*first_of_all, *starts[step::step], end]
        for first, last in itertools.pairwise(cuts):
            if norms.intersection(children[first:last]) and last - first > 1:
                pieces.append(Piece(f"{name}[{first}:{last}]", stack, first, last))
        place = end + 1
    return pieces


def _weighs(module: nn.Module) -> bool:
    return bool(parameters_of(module))
