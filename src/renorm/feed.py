"""Training batches epoch by epoch: lists reshuffled, loaders as they are, every epoch the same again for the same seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from renorm.calls import nonempty, read, several_passes
from renorm.errors import BatchError

PEEKED = 8  # batches kept to look at: enough images to measure a shift on


@runtime_checkable
class Shuffles(Protocol):
    """Batches that know how to put themselves into another order: `shuffled(seed)` gives one pass over all samples."""

    def shuffled(self, seed: int) -> Iterable[Any]: ...


class Labels(NamedTuple):
    """What was read of the training data before training: how much there is, and how often each label stands in it.

    counts   {label: samples}; None where labels are no class indices, or the data can be read only once
    first    up to `PEEKED` batches, to measure on
    complete whether all batches were read
    """

    samples: int
    batch: int
    batches: int
    counts: Counter[int] | None
    first: tuple[Any, ...]
    complete: bool


@dataclass
class Feed:
    """`train` for `epochs` epochs. A list of batches is mixed anew in each, sample by sample where batches are tensors.

    Anything with `shuffled(seed)` is asked for that; a DataLoader, or another iterable, is read as it is.
    Of several processes each gets every `world`-th batch, and all get equally many.
    Raises OneShot for an iterator where it would have to be read more than once.
    """

    train: Iterable[Any]
    epochs: int
    seed: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.epochs > 1:
            several_passes(self.train, asked=f"training for {self.epochs} epochs")
        self._held: Iterator[Any] | None = None

    @property
    def once(self) -> bool:
        """Whether the batches can be read only once."""
        return isinstance(self.train, Iterator)

    def look(self) -> Labels:
        """Read all batches, or of an iterator the first, which is then given again; the generator of a loader stays."""
        first: list[Any] = []
        counts: Counter[int] | None = Counter()
        samples = largest = batches = 0
        kept = self.position()
        self.begin(0)
        for index, batch in nonempty(self.train, asked="training"):
            call = read(batch)
            if call.labels is None:
                raise BatchError(f"training needs labels, but batch {index} has none; pass (inputs, labels).")
            samples, largest, batches = samples + call.samples, max(largest, call.samples), batches + 1
            counts = _counted(counts, call.labels)
            if len(first) < PEEKED:
                first.append(batch)
            if self.once:
                self._held = iter([batch])
                return Labels(samples, largest, 0, None, tuple(first), complete=False)
        self.go_to(kept)
        batches = mixed_count(self.train) if isinstance(self.train, list | tuple) else batches
        return Labels(samples, largest, batches // self.world, counts or None, tuple(first), complete=True)

    def epoch(self, number: int, *, skip: int = 0) -> Iterator[Any]:
        """The batches of epoch `number` from the `skip`-th on.

        Before each is fetched the global generators are seeded by its place, alike in all processes; after it by place and
        process. So whatever augments, drops out or samples draws the same numbers at the same place.
        """
        self.begin(number, 0)
        batches = iter(self._order(number))
        for place in count():
            group: list[Any] = []
            for index in range(self.world):
                self.begin(number, place, index)
                group += [batch for batch in [next(batches, _END)] if batch is not _END]
            if len(group) < self.world:  # what is left over at the end is left out: all must take equally many steps
                return
            if place >= skip:
                self.begin(number, place, self.world + self.rank)
                yield group[self.rank]

    def position(self) -> str:
        """Where the loader's own generator stands, as text; empty for what has none."""
        generator = getattr(self.train, "generator", None)
        return generator.get_state().numpy().tobytes().hex() if isinstance(generator, torch.Generator) else ""

    def go_to(self, position: str) -> None:
        """Put the loader's own generator where `position` says."""
        generator = getattr(self.train, "generator", None)
        if position and isinstance(generator, torch.Generator):
            generator.set_state(torch.frombuffer(bytearray.fromhex(position), dtype=torch.uint8).clone())

    def begin(self, *at: int) -> None:
        """Seed the global generators by the seed and a place in training: the same place draws the same numbers."""
        words = np.random.SeedSequence([self.seed, *at]).generate_state(3)
        _seed_torch(int(words[0]))
        np.random.seed(int(words[1]))
        random.seed(int(words[2]))

    def _order(self, number: int) -> Iterable[Any]:
        if self._held is not None:
            held, self._held = self._held, None
            return (batch for part in (held, self.train) for batch in part)
        # every process draws the same order, of which each takes its share
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        if isinstance(self.train, Shuffles):
            return self.train.shuffled(seed)
        return mixed(self.train, seed) if isinstance(self.train, list | tuple) else self.train


_END = object()


@cache
def _devices() -> bool:
    return torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available()


def _seed_torch(seed: int) -> None:
    # where there is no device but the processor torch.manual_seed spends its time on remembering who seeded them
    if _devices():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def mixed(batches: Sequence[Any], seed: int) -> Iterator[Any]:
    """The samples of all batches in a new order, in batches of the first one's size; a last sample alone joins those before.

    Batches that are not tuples, lists or dicts of tensors of one form, with one row each per sample, come whole, in a new
    order of batches.
    """
    generator = np.random.default_rng(seed)
    rows = _rows(batches)
    if rows is None:
        yield from (batches[i] for i in generator.permutation(len(batches)))
        return
    places = [(leaves, row) for leaves in rows for row in range(_length(leaves))]
    order = generator.permutation(len(places))
    for part in _cuts(len(places), _length(rows[0])):
        chosen = [places[i] for i in order[part]]
        yield _like(batches[0], {key: torch.stack([leaves[key][row] for leaves, row in chosen]) for key in rows[0]})


def mixed_count(batches: Sequence[Any]) -> int:
    """How many batches `mixed` gives."""
    rows = _rows(batches)
    return len(batches) if rows is None else len(_cuts(sum(map(_length, rows)), _length(rows[0])))


def _rows(batches: Sequence[Any]) -> list[dict[Any, Tensor]] | None:
    """The tensors of each batch, where all batches have them in one form."""
    found = [_leaves(batch) for batch in batches]
    rows = [leaves for leaves in found if leaves]
    return rows if len(rows) == len(found) and len({_form(leaves) for leaves in rows}) == 1 else None


def _length(leaves: dict[Any, Tensor]) -> int:
    return len(next(iter(leaves.values())))


def _cuts(total: int, size: int) -> list[slice]:
    starts = list(range(0, total, max(1, size)))
    if len(starts) > 1 and size > 1 and total - starts[-1] == 1:
        starts.pop()  # one sample alone has no variance to be normalised by
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], total], strict=True)]


def _leaves(batch: Any) -> dict[Any, Tensor] | None:
    """The tensors of a batch by key or place; None where it holds anything else, or rows that do not go together."""
    parts: dict[Any, Any]
    if isinstance(batch, dict):
        parts = dict(batch)
    elif type(batch) in (tuple, list):
        parts = dict(enumerate(batch))
    else:
        parts = {None: batch}
    tensors = all(isinstance(part, Tensor) and part.dim() for part in parts.values())
    return parts if parts and tensors and len({len(part) for part in parts.values()}) == 1 else None


def _form(rows: dict[Any, Tensor]) -> tuple[Any, ...]:
    return tuple((key, part.shape[1:], part.dtype, part.device) for key, part in rows.items())


def _like(batch: Any, rows: dict[Any, Tensor]) -> Any:
    if isinstance(batch, dict):
        return rows
    return rows[None] if None in rows else type(batch)(rows.values())


def _counted(counts: Counter[int] | None, labels: Any) -> Counter[int] | None:
    if counts is None or not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() > 1:
        return None
    counts.update(labels.reshape(-1).tolist())
    return counts
