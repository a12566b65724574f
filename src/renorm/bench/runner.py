"""Runs a suite cell by cell, keeps every row at once, and writes the table; yields events, which an edge may draw."""

from __future__ import annotations

import hashlib
import os
import platform
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

from renorm.bench.base import Cell, Row, Size, Suite, catalogue
from renorm.bench.store import Store
from renorm.errors import UnknownName, UsageError

__all__ = ["CellDone", "Event", "Finished", "Started", "open_suite", "run_suite"]

RESULTS = Path("benchmarks/results")
PACKAGES = ("renorm", "torch", "numpy", "scipy", "timm", "torchvision", "fvcore", "imagecorruptions")


@dataclass(frozen=True)
class Started:
    """The suite was opened: `done` of `total` cells are known from an earlier run."""

    suite: str
    total: int
    done: int


@dataclass(frozen=True)
class CellDone:
    """One cell was run and its row is on disk; `done` of `total` cells are known now."""

    row: Row
    total: int
    done: int


@dataclass(frozen=True)
class Finished:
    """Every cell is known; `report` was written and `text` is what it says."""

    report: Path
    text: str


Event = Started | CellDone | Finished


def open_suite(name: str, *, data: str | Path, size: Size = "quick", seeds: int = 3) -> Suite:
    """The suite called `name` over the data in `data`.

    Raises:
        UnknownName: there is no such suite or size.
        UsageError: too few seeds.
        DataError: the data is not there.
    """
    known = catalogue()
    if name not in known:
        raise UnknownName("suite", name, known)
    return known[name](data=Path(data), size=size, seeds=seeds)


def run_suite(suite: Suite, *, out: str | Path = RESULTS, jobs: int | None = None) -> Iterator[Event]:
    """Run the cells of `suite` that no earlier run has finished, then write `<out>/<suite>.md`.

    Rows go to `<out>/<suite>-<size>.jsonl` as they come: stop at any moment and the next run goes on there. Cells run
    in `jobs` processes of one torch thread each, by default one per core; a suite that measures time runs here, alone.

    Raises:
        UsageError: `jobs` is below 1, or above 1 for a suite that measures time.
    """
    jobs = _jobs(suite, jobs)
    store = Store(Path(out) / f"{suite.name}-{suite.size}.jsonl", suite.revision)
    cells = list(suite.cells())
    missing = [cell for cell in cells if not store.has(cell)]
    done = len(cells) - len(missing)
    yield Started(suite.name, len(cells), done)
    for row in _run_all(suite, missing, jobs):
        store.add(row)
        done += 1
        yield CellDone(row, len(cells), done)
    rows = store.rows(cells)
    report = Path(out) / f"{suite.name}.md"
    text = _header(suite, rows, jobs) + "\n" + suite.table(rows).rstrip() + "\n"
    _write(report, text)
    yield Finished(report, text)


def _jobs(suite: Suite, asked: int | None) -> int:
    if asked is not None and asked < 1:
        raise UsageError(f"cells run in 1 process or more, and jobs={asked} was asked for")
    if suite.timed:
        if asked is not None and asked > 1:
            raise UsageError(
                f"the suite {suite.name!r} measures time, which {asked} processes would spoil; leave out jobs"
            )
        return 1
    return asked or os.cpu_count() or 1


def _run_all(suite: Suite, cells: list[Cell], jobs: int) -> Iterator[Row]:
    """The rows of `cells` as they come."""
    if jobs == 1 or len(cells) < 2:
        yield from (_run(suite, cell) for cell in cells)
        return
    workers = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_work_quietly)
    try:
        for done in as_completed([workers.submit(_run, suite, cell) for cell in cells]):
            yield done.result()
    finally:
        workers.shutdown(wait=True, cancel_futures=True)


def _work_quietly() -> None:
    """In a worker: one thread, and Ctrl-C left to the parent, which stops the workers after their cells."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(suite: Suite, cell: Cell) -> Row:
    start = perf_counter()
    values = suite.run_cell(cell)
    return Row(cell, {name: float(value) for name, value in values.items()}, perf_counter() - start, _code())


@cache
def _code() -> str:
    """Eight digits that change with any file of the package that can change a number: all but those of the edges."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        if file.relative_to(package).parts[0] not in ("bench", "cli", "report"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def _header(suite: Suite, rows: list[Row], jobs: int) -> str:
    """What a reader needs in order to make the table again; nothing in it names the machine."""
    import torch

    processes = f"{jobs} processes of 1 torch thread" if jobs > 1 else f"{torch.get_num_threads()} torch threads"
    minutes = sum(row.seconds for row in rows) / 60
    data = " --data DIR" if suite.needs else ""
    command = f"renorm bench {suite.name}{data} --size {suite.size} --seeds {suite.seeds}"
    codes = sorted({row.code for row in rows})
    code = (
        f"rows of {len(codes)} states of the code: {', '.join(codes)}" if len(codes) > 1 else f"code {''.join(codes)}"
    )
    versions = ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name)))
    return (
        f"# {suite.name}\n\n"
        f"    {command}\n\n"
        f"Python {platform.python_version()}, {versions}. "
        f"{platform.machine()}, {os.cpu_count()} cores, {processes}; "
        f"{len(rows)} cells, {minutes:.0f} minutes of computing, {code}. Revision {suite.revision} of the suite.\n"
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _write(path: Path, text: str) -> None:
    """Whole or not at all: the table is made anew on every run, so an older one is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
