"""The interface of everything that keeps fine-tuning near its source, and the catalogue that finds it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from torch import Tensor, nn

from renorm.calls import Caller, Result
from renorm.errors import UnknownName, UsageError
from renorm.family import members
from renorm.sites import unwrap, walk
from renorm.split import Split


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a regulariser may look at before the first step; it leaves the model as it is.

    model     as it will be trained, its new head in place
    parts     its features and head
    state     {name: value} of every parameter of the source, its old head included
    old_head  the layers that a new head replaced; empty where the head was kept
    batches   makes one pass over the labelled training data; None where they can be read only once
    """

    model: nn.Module
    parts: Split
    state: Mapping[str, Tensor]
    old_head: tuple[nn.Module, ...]
    batches: Callable[[], Iterator[Any]] | None
    caller: Caller

    def passing(self, *, asked: str) -> Iterator[Any]:
        """One pass over the training data. Raises UsageError, saying what was `asked` for, where there is none to spare."""
        if self.batches is None:
            raise UsageError(
                f"{asked} reads the training data once beforehand; pass a list or a DataLoader, not an iterator."
            )
        return self.batches()


@dataclass(frozen=True)
class Step:
    """What a regulariser sees of a step, after the forward."""

    batch: Any
    result: Result


Penalty = Callable[[Step], Tensor]


@dataclass(frozen=True, kw_only=True)
class Regulariser(ABC):
    """A penalty on being far from the source, added to the loss of every step.

    A subclass is one file in this folder: a frozen dataclass whose fields are its options, checked in `__post_init__`, with
    a `name` and `cites`. It is then in the catalogue, in `finetune_(regularisers=[name])` and on the command line.

    replaces_decay   whether it takes the place of weight decay, which would pull to zero against it
    layer            the layer of the catalogue that trains in the place of each batch norm whose statistics move, with the
                     options of `layer_options`; at the end batch norms stand there again. One such at a time
    """

    name: ClassVar[str]
    cites: ClassVar[str] = ""
    replaces_decay: ClassVar[bool] = False
    layer: ClassVar[str] = ""

    def layer_options(self) -> dict[str, Any]:
        """The options of `layer`."""
        return {}

    @abstractmethod
    def over(self, start: Start) -> AbstractContextManager[Penalty]:
        """A context in which the penalty of a step, a scalar, can be asked for; at its end every hook is gone."""


@cache
def catalogue() -> dict[str, type[Regulariser]]:
    """Every regulariser in this folder, by its name."""
    return members("renorm.regularisers", Regulariser)


def build(regularisers: str | Regulariser | Sequence[str | Regulariser]) -> tuple[Regulariser, ...]:
    """Regularisers from names, or as they are.

    Raises UnknownName for a name that is not in the catalogue, UsageError for the same one twice.
    """
    given = [regularisers] if isinstance(regularisers, str | Regulariser) else list(regularisers)
    known = catalogue()
    found = []
    for each in given:
        if isinstance(each, str) and each not in known:
            raise UnknownName("regulariser", each, known)
        found.append(known[each]() if isinstance(each, str) else each)
    names = [each.name for each in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"the regulariser {twice[0]!r} was given twice; give it once, with its weight as an option.")
    return tuple(found)


def check_weight(regulariser: Regulariser, *names: str) -> None:
    """Raise UsageError where one of these options is not a finite number of at least 0."""
    for name in names:
        value = getattr(regulariser, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise UsageError(f"{name} of {regulariser.name} is a number of at least 0; got {value!r}.")


def settings(regulariser: Regulariser) -> dict[str, Any]:
    """Its name and options, as plain values."""
    return {"name": regulariser.name, **dataclasses.asdict(regulariser)}


@contextmanager
def watched(model: nn.Module, names: Sequence[str], *, inputs: bool = False) -> Iterator[dict[str, Tensor]]:
    """A dict that holds, after each forward, what the modules of these names gave (or with `inputs`, were given first)."""
    modules = dict(walk(unwrap(model)))
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            value = args[0] if inputs and args else output
            if isinstance(value, Tensor):
                seen[name] = value

        return after

    handles = [modules[name].register_forward_hook(note(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def head_input(parts: Split, regulariser: Regulariser) -> str:
    """The module whose first input are the features. Raises UsageError where the model has no head."""
    if not parts.head:
        raise UsageError(
            f"{regulariser.name} looks at the features before the head, and no head is found in the model."
        )
    return parts.head[0]


def features_of(seen: Mapping[str, Tensor], name: str, regulariser: Regulariser) -> Tensor:
    """The features (N, D) that went into the head, averaged over positions. Raises UsageError where none were seen."""
    if name not in seen:
        raise UsageError(f"{regulariser.name} saw no tensor go into {name!r} in this forward; is that module called?")
    features = seen[name]
    return (
        features if features.dim() == 2 else features.flatten(2).mean(2) if features.dim() > 3 else features.flatten(1)
    )
