"""`.csv`, `.tsv` and `.parquet`: a table in memory, and one that is read in row groups and may be larger than that."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from renorm.datasets.base import Dataset, Indices, Options
from renorm.datasets.columns import Column, Kind, read_columns
from renorm.errors import DataError, UsageError, require
from renorm.files import sha256
from renorm.said import say

__all__ = ["SUFFIXES", "read"]

SUFFIXES = (".csv", ".csv.gz", ".tsv", ".parquet")
WINDOW = 256 << 20  # bytes of a parquet file, as its columns lie in memory, that are held and shuffled at a time


def read(path: Path, options: Options) -> Dataset:
    """The table at `path`; its columns become inputs, labels and groups as `read_columns` says.

    A parquet file is read in row groups, `WINDOW` bytes at a time, so that it may be larger than memory; a .csv is read whole.

    Raises:
        DataError: damaged, empty, not a table, or as `read_columns`.
        MissingExtra: pandas or pyarrow is not installed.
        UsageError: a split, which a table has none of.
    """
    if options.split:
        raise UsageError(f"{path.name} is one table, without splits, and split {options.split!r} was asked for.")
    rows: _Frame | _Parquet = _Parquet(path) if path.name.lower().endswith(".parquet") else _Frame(path)
    if not len(rows):
        raise DataError(f"{path} holds no rows. Give a table with at least one.")
    return read_columns(str(path), rows, options, fingerprint="sha256:" + sha256(path), folder=path.parent)


class _Frame:
    """A table of text, whole in memory."""

    def __init__(self, path: Path) -> None:
        pandas = require("pandas", extra="tables", purpose=f"reading {path.name}")
        separator = "\t" if path.name.lower().endswith(".tsv") else ","
        try:
            self._frame = pandas.read_csv(path, sep=separator, low_memory=False)
        except (ValueError, OSError, EOFError, MemoryError) as error:  # pandas' own errors are ValueErrors
            said = " ".join(str(error).split())[:160] or type(error).__name__
            raise DataError(f"{path} cannot be read as a table ({said}). Write it again, or as .parquet.") from error
        self._frame.columns = [str(name) for name in self._frame.columns]
        numbers = pandas.api.types.is_numeric_dtype
        self.columns = {
            name: Column("number" if numbers(kind) else "text") for name, kind in self._frame.dtypes.items()
        }

    def __len__(self) -> int:
        return len(self._frame)

    def whole(self, name: str) -> Any:
        return self._frame[name].to_numpy()

    def take(self, name: str, indices: Indices) -> Sequence[Any]:
        return list(self._frame[name].iloc[indices])

    def matrix(self, names: Sequence[str], indices: Indices) -> Any:
        return self._frame.iloc[indices][list(names)].to_numpy(dtype=np.float64)

    def gaps(self, names: Sequence[str]) -> Mapping[str, int]:
        counts = {name: int(self._frame[name].isna().sum()) for name in names}
        return {name: count for name, count in counts.items() if count}

    def order(self, options: Options, names: Sequence[str]) -> tuple[Indices | None, tuple[str, ...]]:
        return None, ()


class _Parquet:
    """A parquet file, of which one window of row groups is in memory at a time."""

    def __init__(self, path: Path) -> None:
        parquet = require("pyarrow.parquet", extra="tables", purpose=f"reading {path.name}")
        arrow = require("pyarrow", extra="tables", purpose=f"reading {path.name}")
        self._path, self._errors = path, (arrow.ArrowException, OSError)
        try:
            self._file = parquet.ParquetFile(path)
        except self._errors as error:
            raise DataError(self._damaged(error)) from error
        about = self._file.metadata
        groups = [about.row_group(k) for k in range(about.num_row_groups)]
        self._starts = np.cumsum([0, *(group.num_rows for group in groups)])
        schema = self._file.schema_arrow
        twice = [name for name in schema.names if schema.names.count(name) > 1]
        if twice:  # pandas numbers those of a .csv by itself
            raise DataError(f"{path} has several columns called {twice[0]!r}. Name them apart.")
        self.columns = {each.name: Column(_kind(each.type, arrow.types)) for each in schema}
        self._bytes = [_sizes(group, schema.names) for group in groups]
        self._nulls = [_nulls(group, schema.names) for group in groups]
        self._held: OrderedDict[tuple[int, str], Any] = OrderedDict()
        self._room = 1

    def __len__(self) -> int:
        return int(self._starts[-1])

    def whole(self, name: str) -> Any:
        return np.concatenate([_numpy(self._column(k, name)) for k in range(len(self._bytes))])

    def take(self, name: str, indices: Indices) -> Sequence[Any]:
        return [self._chunk(name, int(group))[int(row)].as_py() for group, row in self._places(indices)]

    def matrix(self, names: Sequence[str], indices: Indices) -> Any:
        places = self._places(indices)
        values = np.empty((len(indices), len(names)))
        for group in np.unique(places[:, 0]):
            here = places[:, 0] == group
            for column, name in enumerate(names):
                values[here, column] = _numpy(self._chunk(name, int(group)))[places[here, 1]]
        return values

    def gaps(self, names: Sequence[str]) -> Mapping[str, int]:
        counts = {name: sum(group.get(name, 0) for group in self._nulls) for name in names}
        return {name: count for name, count in counts.items() if count}

    def order(self, options: Options, names: Sequence[str]) -> tuple[Indices | None, tuple[str, ...]]:
        """Row groups in random order, and rows at random within as many of them as fit into a window."""
        sizes = [sum(group.get(name, 0) for name in names) for group in self._bytes]
        windows = _windows(sizes, options.seed)
        self._room = max(map(len, windows)) * len(names)
        if len(windows) == 1 or options.seed is None:
            self._room = max(self._room, len(names))
            return None, ()
        rng = np.random.default_rng(options.seed)
        parts = [
            rng.permutation(np.concatenate([np.arange(self._starts[k], self._starts[k + 1]) for k in window]))
            for window in windows
        ]
        most = max(map(len, windows))
        note = say(
            "larger than {size} MB: shuffled by row groups, and rows among {most} of {count} at a time",
            size=WINDOW >> 20,
            most=most,
            count=len(sizes),
        )
        return np.concatenate(parts), (note,)

    def _places(self, indices: Indices) -> Any:
        group = np.searchsorted(self._starts, indices, side="right") - 1
        return np.stack([group, indices - self._starts[group]], axis=1)

    def _chunk(self, name: str, group: int) -> Any:
        key = (group, name)
        if key not in self._held:
            self._held[key] = self._column(group, name)
            while len(self._held) > self._room:
                self._held.popitem(last=False)
        return self._held[key]

    def _column(self, group: int, name: str) -> Any:
        try:
            found = self._file.read_row_group(group, columns=[name]).column(name).combine_chunks()
            return found.dictionary_decode() if hasattr(found, "dictionary_decode") else found
        except self._errors as error:
            raise DataError(self._damaged(error)) from error

    def _damaged(self, error: Exception) -> str:
        said = " ".join(str(error).split())[:160]
        return f"{self._path} is damaged, or no parquet file ({said}). Write it again."


def _windows(sizes: Sequence[int], seed: int | None) -> list[list[int]]:
    """Row groups, in random order, in lists that hold `WINDOW` bytes each, or one group."""
    groups = range(len(sizes)) if seed is None else np.random.default_rng(seed).permutation(len(sizes)).tolist()
    windows: list[list[int]] = [[]]
    room = WINDOW
    for group in groups:
        if windows[-1] and sizes[group] > room:
            windows.append([])
            room = WINDOW
        windows[-1].append(group)
        room -= sizes[group]
    return windows


def _leaves(group: Any, names: Sequence[str]) -> Iterator[tuple[str, bool, Any]]:
    """Each stored column of a row group: the name of the column it belongs to, whether it is that one itself, and it."""
    for k in range(group.num_columns):
        path = group.column(k).path_in_schema  # nested ones are written a.list.element; names may hold dots themselves
        yield max((n for n in names if f"{path}.".startswith(f"{n}.")), key=len), path in names, group.column(k)


def _sizes(group: Any, names: Sequence[str]) -> dict[str, int]:
    """Bytes of each column of a row group in memory."""
    found: dict[str, int] = {}
    for name, _, leaf in _leaves(group, names):
        found[name] = found.get(name, 0) + int(leaf.total_uncompressed_size)
    return found


def _nulls(group: Any, names: Sequence[str]) -> dict[str, int]:
    """How many rows of a row group hold nothing, for columns that say so and hold no others."""
    said = {name: leaf.statistics for name, whole, leaf in _leaves(group, names) if whole}
    return {name: int(each.null_count) for name, each in said.items() if each is not None and each.has_null_count}


def _kind(kind: Any, types: Any) -> Kind:
    if types.is_dictionary(kind):
        return _kind(kind.value_type, types)
    if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind):
        return "number"
    if types.is_string(kind) or types.is_large_string(kind):
        return "text"
    if types.is_binary(kind) or types.is_large_binary(kind):
        return "image"
    if types.is_struct(kind):
        return "image" if {"bytes", "path"} <= {kind.field(k).name for k in range(kind.num_fields)} else "other"
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return "list" if is_list and _kind(kind.value_type, types) in ("number", "list") else "other"


def _numpy(column: Any) -> Any:
    return column.to_numpy(zero_copy_only=False)
