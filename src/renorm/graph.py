"""One watched forward: who wrote what a batch norm reads, and who else reads it.

Every operation of the forward is seen under torch's dispatch mode, with the memory it reads and writes, so that no code of
the model has to be understood: branches, loops, functional calls and modules called twice are what they do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from renorm.calls import Caller, tensors_in, uncompiled
from renorm.said import say
from renorm.sites import Site, unwrap, walk
from renorm.state import evaluating, preserving

__all__ = ["Graph", "Layout", "Operation", "Place", "Value", "Visit", "giving", "watch"]


class Layout(NamedTuple):
    """How a tensor lies in its memory."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))


class Place(NamedTuple):
    """A tensor as something read or wrote it: the number of its value, and its layout there."""

    value: int
    layout: Layout
    dtype: torch.dtype


@dataclass
class Value:
    """What one piece of memory held between two writes; `writer` is None where it came from outside the forward.

    `readers` are the numbers of the operations that read it, making views left out; `elements` is the size of the memory.
    """

    number: int
    writer: int | None
    elements: int
    written: Place | None = None
    readers: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Operation:
    """One call of torch: its name as in "convolution", the innermost module and the site visit (if any) it happened in.

    `args` are its arguments by name, with a Place for every tensor; `writes` the places of its results.
    """

    number: int
    name: str
    where: str
    visit: int | None
    args: dict[str, Any]
    writes: tuple[Place, ...]

    def __str__(self) -> str:
        return say("{name} in {where}", name=self.name, where=self.where) if self.where else self.name


@dataclass
class Visit:
    """One call of a site's module: what went in and came out; `plain` is whether it took one tensor and gave one."""

    site: str
    entry: Place | None
    exit: Place | None = None
    plain: bool = True


@dataclass(frozen=True)
class Graph:
    """The operations and values of one forward, in order.

    `owners` maps the value of each parameter and buffer to the (module name, attribute) pairs that hold it, and `returned`
    are the values in the model's output.
    """

    operations: list[Operation]
    values: list[Value]
    visits: list[Visit]
    owners: dict[int, list[tuple[str, str]]]
    returned: frozenset[int]
    output: Any

    def visits_of(self, site: str) -> list[Visit]:
        """The calls of one site, in order."""
        return [visit for visit in self.visits if visit.site == site]

    def writer(self, place: Place) -> Operation | None:
        """The operation that wrote what stands at `place`; None for inputs, parameters and buffers."""
        number = self.values[place.value].writer
        return None if number is None else self.operations[number]

    def readers(self, place: Place) -> list[Operation]:
        """The operations that read the value at `place`, through whatever view."""
        return [self.operations[number] for number in self.values[place.value].readers]


def watch(model: nn.Module, example: Any, *, sites: list[Site], caller: Caller) -> Graph:
    """Run `model` on one batch, in evaluation, and say what every operation read and wrote; the model stays as it was.

    Compiled parts run eagerly. What leaves torch and comes back (NumPy, files) is not seen: it has no writer.
    """
    model = unwrap(model)
    names = {id(module): name for name, module in walk(model)}
    watching = _Watching(names)
    # a surrounding inference_mode would hide the difference between a view and a copy
    with torch.inference_mode(False), preserving(model), evaluating(model), uncompiled(model):
        watching.own(model)
        with _hooks(model, {id(site.module): site.name for site in sites}, watching), watching:
            output = caller.run(model, example).output
        returned = frozenset(watching.place(tensor).value for tensor in tensors_in(output))
    return Graph(
        operations=watching.operations,
        values=watching.values,
        visits=watching.visits,
        owners=watching.owners,
        returned=returned,
        output=output,
    )


@contextmanager
def giving(
    model: nn.Module, layers: Mapping[str, nn.Module], gave: Callable[[str, Tensor], Tensor | None]
) -> Iterator[None]:
    """Inside, `gave(name, y)` is called with what each call of `layers` gives, and may give another tensor in its place."""

    def noting(name: str) -> Callable[..., Tensor | None]:
        def after(module: nn.Module, args: Any, output: Any) -> Tensor | None:
            return gave(name, output) if isinstance(output, Tensor) else None

        return after

    with ExitStack() as stack:
        stack.enter_context(uncompiled(model))
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(noting(name)).remove)
        yield


class _Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows memory by its storage, whose address a weak reference keeps from being given out again."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names
        self.operations: list[Operation] = []
        self.values: list[Value] = []
        self.visits: list[Visit] = []
        self.owners: dict[int, list[tuple[str, str]]] = {}
        self.modules: list[str] = []
        self.open_visits: list[int] = []
        self._held: dict[int, tuple[StorageWeakRef, Value]] = {}

    def own(self, model: nn.Module) -> None:
        """Note which module holds which tensor, before anything runs."""
        for name, module in walk(model):
            for held in (module._parameters, module._buffers):
                for attribute, tensor in held.items():
                    if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                        self.owners.setdefault(self.place(tensor).value, []).append((name, attribute))

    def place(self, tensor: Tensor) -> Place:
        """Where `tensor` stands now."""
        return Place(self._value(tensor).number, Layout.of(tensor), tensor.dtype)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = _by_name(func, args, kwargs or {})
        read = [t for t in tree_leaves(named) if _is_followed(t)]
        places = {id(t): self.place(t) for t in read}
        out = func(*args, **(kwargs or {}))
        changed = {_key(t) for t in _written(func, named)}
        made = [t for t in tree_leaves(out) if _is_followed(t)]
        number = len(self.operations)
        if not changed and made and all(_key(t) in {_key(r) for r in read} for t in made):
            return out  # a view: nothing was read
        operation = Operation(
            number=number,
            name=str(getattr(func, "__name__", func)).partition(".")[0],
            where=self.modules[-1] if self.modules else "",
            visit=self.open_visits[-1] if self.open_visits else None,
            args=tree_map_only(Tensor, lambda t: places.get(id(t)), named),
            writes=tuple(self._write(t, number, fresh=_key(t) not in changed) for t in (*made, *_written(func, named))),
        )
        for value in {place.value for place in places.values()}:
            self.values[value].readers.append(number)
        self.operations.append(operation)
        return out

    def _write(self, tensor: Tensor, number: int, *, fresh: bool) -> Place:
        now = self._held.get(_key(tensor))
        if now is not None and now[1].writer == number:
            return Place(now[1].number, Layout.of(tensor), tensor.dtype)  # two results in one memory, or named twice
        if fresh and now is not None:
            return self.place(tensor)  # a view among several results
        value = self._new(tensor, number)
        value.written = Place(value.number, Layout.of(tensor), tensor.dtype)
        return value.written

    def _value(self, tensor: Tensor) -> Value:
        held = self._held.get(_key(tensor))
        return held[1] if held is not None else self._new(tensor, None)

    def _new(self, tensor: Tensor, writer: int | None) -> Value:
        storage = tensor.untyped_storage()
        value = Value(len(self.values), writer, storage.nbytes() // max(tensor.element_size(), 1))
        self.values.append(value)
        self._held[storage._cdata] = (StorageWeakRef(storage), value)  # type: ignore[no-untyped-call]
        return value


def _by_name(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by the names in the operation's schema; by number where it has none."""
    schema = getattr(func, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema else []
    return {(names[i] if i < len(names) else str(i)): value for i, value in enumerate(args)} | kwargs


def _written(func: Any, named: dict[str, Any]) -> list[Tensor]:
    """The arguments that the operation changes in place."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    changed = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [t for name in changed for t in tree_leaves(named.get(name)) if _is_followed(t)]


def _is_followed(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def _hooks(model: nn.Module, sites: dict[int, str], watching: _Watching) -> Iterator[None]:
    """Inside, `watching` knows which module runs, and what goes into and comes out of the sites."""
    with ExitStack() as stack:
        for name, module in list(walk(model)):
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks that Python could see
            site = sites.get(id(module))
            stack.callback(module.register_forward_pre_hook(_enter(name, site, watching), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(_leave(site, watching)).remove)
        yield


def _enter(name: str, site: str | None, watching: _Watching) -> Callable[..., None]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watching.modules.append(name)
        if site is not None:
            given = [*args, *kwargs.values()]
            entry = watching.place(given[0]) if given and _is_followed(given[0]) else None
            watching.open_visits.append(len(watching.visits))
            watching.visits.append(Visit(site, entry, plain=len(given) == 1 and entry is not None))

    return before


def _leave(site: str | None, watching: _Watching) -> Callable[..., None]:
    def after(module: nn.Module, args: Any, output: Any) -> None:
        watching.modules.pop()
        if site is not None:
            visit = watching.visits[watching.open_visits.pop()]
            if _is_followed(output):
                visit.exit = watching.place(output)
            else:
                visit.plain = False

    return after
