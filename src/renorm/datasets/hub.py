"""`hf:NAME`: data sets of the hub, or folders of theirs on disk, through the package `datasets`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from renorm.datasets.base import Dataset, Indices, Options
from renorm.datasets.columns import Column, read_columns
from renorm.errors import DataError, UnknownName, UsageError, require

__all__ = ["read"]


def read(name: str, options: Options) -> Dataset:
    """The data set `name`: a folder, or ORG/NAME, with #CONFIGURATION behind it where it has several.

    A folder is one that `save_to_disk` wrote, or of files that `datasets` knows. Another name is taken from the cache or
    fetched. Rows lie on disk, memory-mapped, and are read as they are asked for.

    Raises:
        UsageError: no name.
        DataError: no such data set, splits to choose from, or as `read_columns`.
        UnknownName: no such split or column.
        MissingExtra: datasets is not installed.
    """
    hub = require("datasets", extra="hub", purpose=f"hf:{name}")
    if not name:
        raise UsageError("hf: names no data set. Use hf:ORG/NAME, or hf:FOLDER.")
    place, _, configuration = name.partition("#")
    folder = Path(place)
    saved = any(os.path.isfile(folder / file) for file in ("dataset_dict.json", "state.json"))
    try:
        with _silent(hub):
            found = hub.load_from_disk(place) if saved else hub.load_dataset(place, configuration or None)
    except Exception as error:  # the package raises OSError, ValueError and many kinds of its own
        said = " ".join(str(error).split())[:200].rstrip(".")
        raise DataError(
            f"hf:{name} could not be opened: {type(error).__name__}: {said}. Give hf:ORG/NAME (with #CONFIGURATION where it "
            "has several), or hf:FOLDER; without a connection only what is in the cache can be read."
        ) from error
    chosen = _split(name, found, options.split) if isinstance(found, Mapping) else found
    if not len(chosen):
        raise DataError(f"hf:{name} holds no rows.")
    fingerprint = f"of datasets: {chosen._fingerprint}"
    return read_columns(f"hf:{name}", _Hub(hub, chosen), options, fingerprint=fingerprint)


def _split(name: str, found: Mapping[str, Any], split: str) -> Any:
    if split:
        if split not in found:
            raise UnknownName(f"split of hf:{name}:", split, found)
        return found[split]
    if len(found) > 1:
        raise DataError(f"hf:{name} holds the splits {', '.join(found)}. Say which with --split NAME (split=).")
    return next(iter(found.values()))


class _Hub:
    """Rows of a `datasets.Dataset`, images as the bytes or paths that it keeps."""

    def __init__(self, hub: Any, held: Any) -> None:
        self.columns = {name: _column(hub, feature) for name, feature in held.features.items()}
        for name, feature in held.features.items():
            if isinstance(feature, hub.Image):
                held = held.cast_column(name, hub.Image(decode=False))
        self._held = held

    def __len__(self) -> int:
        return len(self._held)

    def whole(self, name: str) -> Any:
        return np.asarray(list(self._held[name]))

    def take(self, name: str, indices: Indices) -> Sequence[Any]:
        return list(self._held.select_columns([name])[indices.tolist()][name])

    def matrix(self, names: Sequence[str], indices: Indices) -> Any:
        found = self._held.select_columns(list(names))[indices.tolist()]
        return np.stack([np.asarray(found[name], dtype=np.float64) for name in names], axis=1)

    def gaps(self, names: Sequence[str]) -> Mapping[str, int]:
        counts = {name: int(self._held.data.column(name).null_count) for name in names}
        return {name: count for name, count in counts.items() if count}

    def order(self, options: Options, names: Sequence[str]) -> tuple[Indices | None, tuple[str, ...]]:
        return None, ()  # memory-mapped: any order does


def _column(hub: Any, feature: Any) -> Column:
    if isinstance(feature, hub.ClassLabel):
        return Column("number", tuple(feature.names))
    if isinstance(feature, hub.Image):
        return Column("image")
    if isinstance(feature, hub.Value):
        if feature.dtype in ("string", "large_string"):
            return Column("text")
        return Column("number" if feature.dtype.startswith(("int", "uint", "float", "bool", "double")) else "other")
    inner = getattr(feature, "feature", None)
    arrays = isinstance(feature, hub.Array2D | hub.Array3D | hub.Array4D | hub.Array5D)
    numbers = inner is not None and _column(hub, inner).kind in ("number", "list")
    return Column("list" if arrays or numbers else "other")


@contextmanager
def _silent(hub: Any) -> Iterator[None]:
    drawn = hub.are_progress_bars_disabled()
    hub.disable_progress_bars()
    try:
        yield
    finally:
        if not drawn:
            hub.enable_progress_bars()
