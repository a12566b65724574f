"""What every source of data gives: one value, with batches that can be read again and again in one fixed order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from renorm.columns import Columns
from renorm.errors import UsageError
from renorm.preprocessing import Preprocessing
from renorm.said import listed, say

__all__ = ["Batches", "Dataset", "Options", "assemble"]

Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to read: what `load_data` was asked, checked."""

    preprocessing: Preprocessing | None = None
    batch_size: int = 64
    labels: str | None = "labels"
    limit: int | None = None
    split: str = ""
    seed: int | None = 0
    classes: tuple[str, ...] | None = None
    inputs: str = ""
    group: str = ""
    tokenize: Callable[[list[str]], dict[str, Tensor]] | None = None
    columns: Columns | None = None

    def __post_init__(self) -> None:
        for name, value in (("batch_size", self.batch_size), ("limit", self.limit)):
            if value is not None and value < 1:
                raise UsageError(f"{name}={value} makes no sense. Give a number above 0.")

    def order(self, count: int) -> Indices:
        """Which samples are read, in which order."""
        # not torch's generator: reading data leaves the global state of random numbers alone
        order = np.arange(count) if self.seed is None else np.random.default_rng(self.seed).permutation(count)
        return order[: self.limit]


@dataclass(frozen=True)
class Batches:
    """Tuples `(inputs, labels)`, or `(inputs,)` without labels; every pass gives the same ones in the same order.

    `fetch` turns indices of samples into inputs, (n, *) or a mapping of such; `labels` (N, *) stand in the order of `order`.
    """

    fetch: Callable[[Indices], Any]
    order: Indices
    labels: Tensor | None
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for start in range(0, len(self.order), self.batch_size):
            part = slice(start, start + self.batch_size)
            inputs = self.fetch(self.order[part])
            yield (inputs,) if self.labels is None else (inputs, self.labels[part])


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Data that was opened: `labels`, `order` and `batches` go together; `order` counts samples as they stand in the file.

    `classes` are the names of the labels 0, 1, …; None where the data does not say. `groups` name the group of each sample
    (a hospital, a camera) in the order of `order`; None where none was asked for. `names` are what the samples are called
    as they stand in the file: paths below a folder, keys of a shard; None where they have no names. `columns` are the names of
    the columns of numbers that are the input, in the order in which the model reads them, none where they have no names; None
    for other data.
    """

    spec: str
    batches: Batches
    count: int
    labels: Tensor | None
    classes: tuple[str, ...] | None
    order: Indices
    fingerprint: str
    notes: tuple[str, ...]
    groups: tuple[str, ...] | None = None
    names: Sequence[str] | None = None
    columns: tuple[str, ...] | None = None


def assemble(
    spec: str,
    options: Options,
    *,
    fetch: Callable[[Indices], Any],
    total: int,
    labels: Tensor | None,
    classes: tuple[str, ...] | None,
    fingerprint: str,
    notes: tuple[str, ...],
    groups: Sequence[object] | None = None,
    order: Indices | None = None,
    names: Sequence[str] | None = None,
    columns: tuple[str, ...] | None = None,
) -> Dataset:
    """A data set of `total` samples with `labels` and `groups` as they stand in the file, read in the order asked for.

    `order` is one that suits the file better than a random one of all its samples.
    """
    if labels is not None and classes is not None and options.classes is not None:
        labels, classes, said = _follow(labels, classes, options.classes)
        notes += said
    order = options.order(total) if order is None else order[: options.limit]
    if options.seed is not None:
        notes += (
            say("read in a random order (seed {seed}): batches that hold one class each do harm", seed=options.seed),
        )
    if len(order) < total:
        notes += (say("{count} of {total} samples, the first in that order", count=len(order), total=total),)
    if len(order) == 1:
        notes += (say("only 1 sample: too few to measure statistics on"),)
    chosen = None if labels is None else labels[torch.from_numpy(order)]
    return Dataset(
        spec=spec,
        batches=Batches(fetch, order, chosen, options.batch_size),
        count=len(order),
        labels=chosen,
        classes=classes,
        order=order,
        fingerprint=fingerprint,
        notes=notes,
        groups=None if groups is None else tuple(str(groups[k]) for k in order),
        names=names,
        columns=columns,
    )


def _follow(
    labels: Tensor, names: tuple[str, ...], model: tuple[str, ...]
) -> tuple[Tensor, tuple[str, ...], tuple[str, ...]]:
    """Labels numbered as the model's classes are, where it knows the names of all of the data's."""
    if names == model:
        return labels, names, ()
    strange = [name for name in names if name not in model]
    if strange:
        some = listed(strange[:5])
        said = say(
            "{count} of {total} classes are none of the model's: {some}",
            count=len(strange),
            total=len(names),
            some=some,
        )
        return labels, names, (said,)
    places = torch.tensor([model.index(name) for name in names])
    return places[labels], model, (say("labels are numbered as the model's classes, by name"),)
