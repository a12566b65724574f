"""Give a model back as it was: after a failure, after a look, or when the user changes their mind."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from renorm.errors import OpenChange, UsageError
from renorm.sites import find_sites, is_lazy, unwrap, walk

# attributes of norm layers that methods may set; read where present, put back to the very same object
_ATTRIBUTES = ("momentum", "eps", "track_running_stats", "on_slot")


class Snapshot:
    """The buffers, modes, norm attributes and `requires_grad` flags of some modules, to be put back bit for bit.

    Parameters are copied only where `parameters=True`; Keras' statistics, which torch counts as parameters, always.
    """

    def __init__(self, modules: Iterable[nn.Module], *, parameters: bool = False) -> None:
        self._modules = list(modules)
        self._modes = [module.training for module in self._modules]
        self._attributes = [
            (module, name, module.__dict__[name])
            for module in self._modules
            for name in _ATTRIBUTES
            if name in module.__dict__
        ]
        self._flags = [(p, p.requires_grad) for module in self._modules for p in _own(module._parameters)]
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._dicts: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for module in self._modules:
            self._dicts += [(module._buffers, dict(module._buffers)), (module._parameters, dict(module._parameters))]
            kept = list(module._buffers.values())
            kept += [p for name, p in module._parameters.items() if parameters or "moving_" in name]
            for tensor in kept:
                if isinstance(tensor, Tensor) and not isinstance(
                    tensor, nn.UninitializedBuffer | nn.UninitializedParameter
                ):
                    self._tensors.append((tensor, tensor.detach().clone()))

    def restore(self) -> None:
        """Put everything back: the same tensor objects with the bits they had, modes module by module."""
        for owner, entries in self._dicts:
            if [(n, id(t)) for n, t in owner.items()] != [(n, id(t)) for n, t in entries.items()]:
                owner.clear()
                owner.update(entries)
        for tensor, copy in self._tensors:
            # through .data: a graph that read these values earlier stays valid, for they are the same again
            tensor.data.copy_(copy)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        for module, name, value in self._attributes:
            module.__dict__[name] = value
        for module, mode in zip(self._modules, self._modes, strict=True):
            module.training = mode


@contextmanager
def preserving(model: nn.Module, *, parameters: bool = False) -> Iterator[None]:
    """Whatever happens inside, `model` and the random number generators come out as they went in, bit for bit.

    Kept: every buffer, the mode of each module, momentum, eps and `requires_grad`, and the states of torch's (CPU, CUDA),
    NumPy's and Python's global generators; parameters too where `parameters=True`.
    Raises UsageError for a model with lazy layers that have seen no input: running it would make other modules of them.
    """
    lazy = [site for site in find_sites(model) if is_lazy(site)]
    if lazy:
        raise UsageError(
            f"{len(lazy)} lazy layers, {lazy[0].name or 'the model itself'!r} first, have seen no input yet, and the first one "
            "changes them; run the model on one batch yourself, then try again."
        )
    snapshot = Snapshot((module for _, module in walk(unwrap(model))), parameters=parameters)
    generators = _generators()
    try:
        yield
    finally:
        snapshot.restore()
        _set_generators(generators)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module of `model` is in evaluation inside, without gradients; modes are given back module by module."""
    modules = [module for _, module in walk(unwrap(model))]
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False  # not eval(): a module may have redefined train(), and a frozen one stays as it is
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


@contextmanager
def own_randomness() -> Iterator[None]:
    """Inside, anyone may seed torch's, NumPy's and Python's global generators; after it they stand as before."""
    generators = _generators()
    try:
        yield
    finally:
        _set_generators(generators)


class Undo:
    """An open change at some modules. `restore_()` gives back the state they had when this was made, bit for bit.

    Changes nest: of two open changes at one module, the later must be undone first. A change whose undo nobody holds
    any more cannot be undone and stands for good; it blocks nothing.
    """

    def __init__(self, label: str, modules: dict[str, nn.Module], *, parameters: bool = False) -> None:
        self.label = label
        self._modules = modules
        # with what is below them: Keras keeps a layer's statistics in a module of their own
        below = {id(m): m for module in modules.values() for _, m in walk(module)}
        self._snapshot: Snapshot | None = Snapshot(below.values(), parameters=parameters)
        for module in modules.values():
            opened(module, self)

    @property
    def is_open(self) -> bool:
        """Whether the change still stands."""
        return self._snapshot is not None

    def restore_(self) -> None:
        """Undo the change; a second call does nothing.

        Raises OpenChange, naming the later change and a place, where one at the same modules still stands.
        """
        if self._snapshot is None:
            return
        for name, module in self._modules.items():
            refuse_if_later(module, [self], name=name)
        self._snapshot.restore()
        self.close()

    def close(self) -> None:
        """Let the change stand for good: it can no longer be undone and no longer blocks earlier ones."""
        if self._snapshot is not None:
            self._snapshot = None
            for module in self._modules.values():
                closed(module, self)


class Change(Protocol):
    """Something done to a module that can be undone; `label` names it in messages."""

    label: str


_open_changes: WeakKeyDictionary[nn.Module, list[ref[Change]]] = WeakKeyDictionary()


def opened(module: nn.Module, change: Change) -> None:
    """From now on `change` stands at `module`, after all that stand there already, until it is closed or forgotten."""
    _open_changes.setdefault(module, []).append(ref(change))


def closed(module: nn.Module, change: Change) -> None:
    """`change` stands at `module` no longer."""
    _open_changes[module] = [held for held in _open_changes.get(module, []) if held() not in (change, None)]


def refuse_if_later(module: nn.Module, undone: Sequence[Change], *, name: str) -> None:
    """Raise OpenChange where something that is not being `undone` was opened at `module` after the first of `undone`.

    A change that was never opened here came along with a copy of the module: it is older than all that was.
    """
    standing = [change for change in (held() for held in _open_changes.get(module, [])) if change is not None]
    first = min((standing.index(change) for change in undone if change in standing), default=0)
    if any(change not in standing for change in undone):
        first = 0
    later = [change for change in standing[first:] if change not in undone]
    if later:
        raise OpenChange(
            f"undoing {undone[0].label} was asked for, but {later[-1].label} came after it at "
            f"{name or 'the model itself'!r} and still stands; restore that one first."
        )


def _own(parameters: dict[str, Any]) -> Iterator[Tensor]:
    return (p for p in parameters.values() if isinstance(p, Tensor) and p.is_floating_point())


def _generators() -> list[Any]:
    numpy = sys.modules.get("numpy")
    return [
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None,
        numpy.random.get_state() if numpy else None,
        random.getstate(),
    ]


def _set_generators(states: list[Any]) -> None:
    cpu, cuda, numpy, python = states
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    if numpy is not None:
        sys.modules["numpy"].random.set_state(numpy)
    random.setstate(python)


def put_(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Let every tensor hold its value, in few calls; no graph notices."""
    if tensors:
        with torch.no_grad():
            torch._foreach_copy_([tensor.data for tensor in tensors], list(values))
