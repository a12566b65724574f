"""One row per sample to a `.parquet`, `.csv` or `.jsonl`, written as they come; the file is complete or absent."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

from renorm.errors import UsageError, require
from renorm.files import refuse_existing, writing

GROUP = (
    8192  # rows of a parquet file that are written together: a group for each batch of one would be ten times as large
)


class Row(NamedTuple):
    """What a stream said of one sample; without a number in it, it has no class and no confidence."""

    place: int
    path: str | None
    chosen: int | None
    name: str | None
    confidence: float | None
    believed: bool
    step: int


COLUMNS = ("index", "path", "class", "class_name", "confidence", "believed", "step")  # a row's fields in the file
Put = Callable[[list[Row]], None]


def writable(path: str, *, force: bool) -> Path:
    """The path, if predictions can be written there. Raises UsageError, FileExists, or MissingExtra for a .parquet."""
    if Path(path).suffix.lower() not in _WRITERS:
        raise UsageError(f"predictions are written as {', '.join(_WRITERS)}; got {path}. Give one of these suffixes.")
    if path.lower().endswith(".parquet"):
        require("pyarrow.parquet", extra="tables", purpose=f"writing {path}")
    return refuse_existing(path, force=force)


@contextmanager
def written(path: Path, *, force: bool) -> Iterator[Put]:
    """A function that takes rows; `path` stands there, whole, when the block has succeeded, else nothing does."""
    with writing(path, force=force) as temporary, _WRITERS[path.suffix.lower()](temporary) as put:
        yield put


@contextmanager
def _csv(path: Path) -> Iterator[Put]:
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        yield lambda rows: writer.writerows([str(v).lower() if isinstance(v, bool) else v for v in row] for row in rows)


@contextmanager
def _jsonl(path: Path) -> Iterator[Put]:
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:

        def put(rows: list[Row]) -> None:
            for row in rows:
                file.write(json.dumps(dict(zip(COLUMNS, row, strict=True)), ensure_ascii=False, allow_nan=False) + "\n")

        yield put


@contextmanager
def _parquet(path: Path) -> Iterator[Put]:
    arrow = require("pyarrow", extra="tables", purpose=f"writing {path.name}")
    parquet = require("pyarrow.parquet", extra="tables", purpose=f"writing {path.name}")
    kinds = (
        *(arrow.int64(), arrow.string(), arrow.int64(), arrow.string()),
        *(arrow.float32(), arrow.bool_(), arrow.int64()),
    )
    schema = arrow.schema(list(zip(COLUMNS, kinds, strict=True)))
    waiting: list[Row] = []
    with parquet.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            columns = [_readable(column) for column in zip(*waiting, strict=True)] or [[] for _ in COLUMNS]
            arrays = [arrow.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
            writer.write_table(arrow.table(arrays, schema=schema))
            waiting.clear()

        def put(rows: list[Row]) -> None:
            waiting.extend(rows)
            if len(waiting) >= GROUP:
                flush()

        yield put
        if waiting:
            flush()


def _readable(column: tuple[object, ...]) -> list[object]:
    """A parquet file holds text in UTF-8: bytes of a path that are none are replaced."""
    return [os.fsencode(v).decode("utf-8", "replace") if isinstance(v, str) else v for v in column]


_WRITERS: dict[str, Callable[[Path], AbstractContextManager[Put]]] = {
    ".parquet": _parquet,
    ".csv": _csv,
    ".jsonl": _jsonl,
}


def rounded(confidence: float) -> float | None:
    """A confidence as it is written: seven digits hold all that float32 knew; None for none."""
    return float(f"{confidence:.7g}") if math.isfinite(confidence) else None
