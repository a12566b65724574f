"""Data in named columns → a data set: which column is the input, which the label, which the group, and how each is read.

Tables and the hub's data sets differ in where rows come from (`Rows`); what is made of them is the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from renorm.columns import Columns
from renorm.datasets.arrays import LABELS, numbered
from renorm.datasets.base import Dataset, Indices, Options, assemble
from renorm.datasets.images import LOOKED, Decoder, Source
from renorm.errors import DataError, UnknownName, UsageError
from renorm.said import listed, say, some
from renorm.units import renamed

__all__ = ["Column", "Kind", "Rows", "read_columns"]

Kind = Literal["number", "text", "image", "list", "other"]
SHOWN = 6  # columns named in a note or message
LOOKED_AT = 1000  # rows by which a column under another name is known again


@dataclass(frozen=True)
class Column:
    """What a column holds: numbers, texts, encoded images, lists of numbers, or something else; `classes` names numbers."""

    kind: Kind
    classes: tuple[str, ...] | None = None


class Rows(Protocol):
    """Where rows come from: a table in memory, one on disk that is read in pieces, a data set of the hub."""

    @property
    def columns(self) -> Mapping[str, Column]: ...

    def __len__(self) -> int: ...

    def whole(self, name: str) -> Any:
        """One column of all rows, as NumPy has it."""

    def take(self, name: str, indices: Indices) -> Sequence[Any]:
        """One column of some rows; images as bytes or paths."""

    def matrix(self, names: Sequence[str], indices: Indices) -> Any:
        """Some columns of numbers of some rows, (n, columns)."""

    def gaps(self, names: Sequence[str]) -> Mapping[str, int]:
        """How many rows hold nothing, for the columns where any does, as far as that is known without reading all."""

    def order(self, options: Options, names: Sequence[str]) -> tuple[Indices | None, tuple[str, ...]]:
        """An order that reads the file well, with a note on it; None where any order does."""


def read_columns(spec: str, rows: Rows, options: Options, *, fingerprint: str, folder: Path | None = None) -> Dataset:
    """The data set in `rows`: `options` name its columns; images may be paths, relative to `folder`.

    Raises:
        UnknownName: no such column.
        DataError: no column can be the input, or values are missing, not finite, or not what the model takes.
    """
    label, said = _label(spec, rows, options)
    if options.group and options.group not in rows.columns:
        raise UnknownName(f"column of {spec}:", options.group, rows.columns)
    known = options.columns
    if known is not None and known.named and not options.inputs:
        chosen, more = _as_trained(spec, rows, known, taken={label, options.group})
    else:
        chosen, more = _inputs(spec, rows, options, taken={label, options.group})
    said += more
    _refuse_gaps(spec, rows, [*chosen, *(name for name in (label, options.group) if name)])
    kind = rows.columns[chosen[0]].kind
    order, in_pieces = rows.order(options, chosen)
    if kind == "number":
        reader: Any = _Numbers(spec, rows, tuple(chosen))
        said += (
            say("the input is {count} columns of numbers, as they are: {some}", count=len(chosen), some=some(chosen)),
        )
    elif kind == "list":
        reader = _Lists(spec, rows, chosen[0])
    elif kind == "text" and options.tokenize is not None:
        reader = _Texts(rows, chosen[0], options.tokenize)
    else:
        reader = _Images(spec, rows, chosen[0], folder, Decoder(options.preprocessing))
        said += reader.describe((options.order(len(rows)) if order is None else order)[:LOOKED])
    labels, classes = None, None
    if label:
        labels, classes, numbers = numbered(f"{spec}: {label}", _plain(rows.whole(label)), rows.columns[label].classes)
        said += numbers
    return assemble(
        spec,
        options,
        fetch=reader,
        total=len(rows),
        labels=labels,
        classes=classes,
        groups=_plain(rows.whole(options.group)).tolist() if options.group else None,
        fingerprint=fingerprint,
        notes=said + in_pieces,
        order=order,
        columns=tuple(chosen) if kind == "number" else None,
    )


def _label(spec: str, rows: Rows, options: Options) -> tuple[str, tuple[str, ...]]:
    if options.labels is None:
        return "", ()
    if options.labels != "labels":
        if options.labels not in rows.columns:
            raise UnknownName(f"column of {spec}:", options.labels, rows.columns)
        return options.labels, ()
    lower = {name.lower(): name for name in reversed(list(rows.columns))}
    found = next((lower[name] for name in LABELS if name in lower), "")
    if found:
        return found, ()
    return "", (say("no labels: no column is called {names} (--labels NAME says which)", names=listed(LABELS)),)


def _inputs(spec: str, rows: Rows, options: Options, *, taken: set[str]) -> tuple[list[str], tuple[str, ...]]:
    """The columns that are the model's input, and which were left out."""
    columns = {name: column.kind for name, column in rows.columns.items() if name not in taken}
    if options.inputs:
        if options.inputs not in rows.columns:
            raise UnknownName(f"column of {spec}:", options.inputs, rows.columns)
        kind = rows.columns[options.inputs].kind
        if options.inputs in taken or kind == "other":
            found = "the labels or the groups" if options.inputs in taken else "neither numbers, texts nor images"
            raise UsageError(f"{spec}: the column {options.inputs!r} was to be the input, but it holds {found}.")
        return [options.inputs], ()
    wanted: Kind = "text" if options.tokenize is not None else "image" if "image" in columns.values() else "number"
    if wanted == "number" and "number" not in columns.values() and "list" in columns.values():
        wanted = "list"
    chosen = [name for name, kind in columns.items() if kind == wanted]
    others = [name for name in columns if name not in chosen]
    if not chosen or (len(chosen) > 1 and wanted != "number"):
        held = f"several columns of {wanted}s" if chosen else f"no column of {wanted}s"
        raise DataError(
            f"{spec} holds {held} for the model's input: {_some([f'{n} ({k})' for n, k in columns.items()]) or 'nothing'}. "
            "Say which column with --inputs NAME (inputs=): texts for a text model, or paths of images."
        )
    return chosen, (say("columns left out: {some}", some=some(others)),) if others else ()


def _as_trained(spec: str, rows: Rows, known: Columns, *, taken: set[str]) -> tuple[list[str], tuple[str, ...]]:
    """The columns that the model was trained on, by name and in its order, and what was noticed."""
    missing = [name for name in known.names if name not in rows.columns or name in taken]
    numbers = [name for name, column in rows.columns.items() if column.kind == "number" and name not in taken]
    extra = [name for name in numbers if name not in known.names]
    if missing:
        raise DataError(_missing(spec, rows, known, missing, extra))
    other = [name for name in known.names if rows.columns[name].kind != "number"]
    if other:
        held = ", ".join(f"{name!r} ({rows.columns[name].kind})" for name in other[:SHOWN])
        raise DataError(
            f"{spec}: columns that held numbers when the model was trained hold something else: {held}. Write them as numbers, "
            "with a decimal point, no units and no thousands separators."
        )
    said: tuple[str, ...] = ()
    if [name for name in numbers if name not in extra] != list(known.names):
        said += (say("columns stand in another order than in training, and are read by their names"),)
    left_out = [name for name in rows.columns if name not in known.names and name not in taken]
    if left_out:
        said += (say("columns left out, on which the model was not trained: {some}", some=some(left_out)),)
    return list(known.names), said


def _missing(spec: str, rows: Rows, known: Columns, missing: list[str], extra: list[str]) -> str:
    """What is missing, and under which name it may stand there."""
    lines = [
        f"{spec} lacks {len(missing)} of the {len(known.names)} columns that the model was trained on: {_some(missing)}."
    ]
    if extra:
        first = np.arange(min(len(rows), LOOKED_AT))
        values = torch.from_numpy(np.array(rows.matrix(extra, first), dtype=np.float64))  # a single column is a view
        finite = values[values.isfinite().all(1)]
        found = renamed(known, missing, Columns.measure([finite], extra)) if len(finite) else {}
        lines += [f"{old!r} is probably called {new!r} here." for old, new in list(found.items())[:SHOWN]]
    lines.append("Give the columns their names of then. A model cannot do without one that it was trained on.")
    return " ".join(lines)


def _refuse_gaps(spec: str, rows: Rows, names: Sequence[str]) -> None:
    gaps = rows.gaps(names)
    if gaps:
        shown = ", ".join(f"{name!r} in {count}" for name, count in list(gaps.items())[:SHOWN])
        raise DataError(
            f"{spec}: of {len(rows)} rows some hold nothing in columns that are needed: {shown}. Fill these gaps, or leave "
            "the rows or the columns away."
        )


@dataclass(frozen=True)
class _Numbers:
    """Indices → (n, features) float32."""

    spec: str
    rows: Rows
    names: tuple[str, ...]

    def __call__(self, indices: Indices) -> Tensor:
        with np.errstate(over="ignore"):  # too large for float32 is infinite too
            values = np.asarray(self.rows.matrix(self.names, indices)).astype(np.float32)
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            row, column = bad[0]
            raise DataError(
                f"{self.spec}: row {indices[row]} holds NaN or infinity (in float32) in {self.names[column]!r}, and "
                f"{len(np.unique(bad[:, 0]))} of the {len(values)} rows read with it in some column. Leave these rows away, "
                "or fill their gaps."
            )
        return torch.from_numpy(values)


@dataclass(frozen=True)
class _Lists:
    """Indices → (n, *) float32 from a column of equally long lists."""

    spec: str
    rows: Rows
    name: str

    def __call__(self, indices: Indices) -> Tensor:
        parts = [np.asarray(part) for part in self.rows.take(self.name, indices)]
        shapes = {part.shape for part in parts}
        if len(shapes) > 1 or parts[0].dtype.kind not in "biuf":
            raise DataError(
                f"{self.spec}: {self.name!r} holds lists of {len(shapes)} shapes, {_some(list(map(str, shapes)))}. Give "
                "lists of numbers, all of one shape."
            )
        return torch.from_numpy(np.stack(parts).astype(np.float32))


@dataclass(frozen=True)
class _Texts:
    """Indices → what the model's tokenizer makes of the texts."""

    rows: Rows
    name: str
    tokenize: Any

    def __call__(self, indices: Indices) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.tokenize([str(text) for text in self.rows.take(self.name, indices)])
        return found


@dataclass(frozen=True)
class _Images:
    """Indices → (n, C, H, W) from bytes in the column, or from the files whose paths it holds."""

    spec: str
    rows: Rows
    name: str
    folder: Path | None
    decode: Decoder

    def __call__(self, indices: Indices) -> Tensor:
        return self.decode(self._sources(indices))

    def describe(self, some: Indices) -> tuple[str, ...]:
        """How images become input, from some of them."""
        return self.decode.describe(self._sources(some))

    def _sources(self, indices: Indices) -> list[Source]:
        found = self.rows.take(self.name, indices)
        return [self._source(k, value) for k, value in zip(indices, found, strict=True)]

    def _source(self, row: int, value: Any) -> Source:
        if isinstance(value, Mapping):  # as the hub's libraries keep images: their bytes, or where they lie
            value = value.get("bytes") or value.get("path")
        where = f"{self.spec}: row {row} of {self.name!r}"
        if isinstance(value, bytes):
            return Source(where, value)
        path = Path(str(value)) if self.folder is None else self.folder / str(value)
        if not os.path.isfile(path):
            place = f" in {self.folder}" if self.folder else ""
            raise DataError(
                f"{where} is {str(value)[:80]!r}, and there is no such image file{place}. "
                "Correct the paths; texts need a model with a tokenizer (hf:)."
            )
        return Source(str(path), path)


def _plain(values: Any) -> Any:
    """A column as NumPy's own numbers or strings."""
    values = np.asarray(values)
    return values.astype(str) if values.dtype.kind not in "biuf" else values


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" … ({len(names)} in all)" if len(names) > SHOWN else "")
