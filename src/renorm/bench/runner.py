"""Runs a suite cell by cell, keeps every row at once, and writes the table; yields events, which an edge may draw."""

from __future__ import annotations

import hashlib
import os
import platform
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter, time

from renorm.bench.base import Cell, Row, Size, Suite, catalogue
from renorm.bench.store import Store
from renorm.errors import MissingExtra, UnknownName, UsageError
from renorm.log import LOGGER

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


def open_suite(name: str, *, data: str | Path, size: Size = "quick", seeds: int = 3, device: str = "cpu") -> Suite:
    """The suite called `name` over the data in `data`, computed on `device`.

    Raises:
        UnknownName: there is no such suite or size.
        UsageError: too few seeds, or a device that the suite or this machine does not know.
        DataError: the data is not there.
    """
    known = catalogue()
    if name not in known:
        raise UnknownName("suite", name, known)
    return known[name](data=Path(data), size=size, seeds=seeds, device=device)


def run_suite(
    suite: Suite, *, out: str | Path = RESULTS, processes: int | None = None, minutes: float | None = None
) -> Iterator[Event]:
    """Run the cells of `suite` that no earlier run has finished, then write `<out>/<suite>.md` (or `<suite>-quick.md`).

    Rows go to `<out>/<suite>-<size>.jsonl` as they come: stop at any moment and the next run goes on there. Cells run in
    so many `processes` of one torch thread each, by default one per core; a suite that measures time runs here, alone. No
    cell is begun after so many `minutes`: 0 writes the table of what is known. Rows of several machines may be put into one
    file; of two for one cell the later counts.

    A cell whose peer is not installed is left out.

    Raises:
        UsageError: `processes` is below 1, or above 1 for a suite that measures time; `minutes` is below 0.
        Exception: what the first cell that failed had raised, after all others have run and the table is written.
    """
    processes = _processes(suite, processes)
    if minutes is not None and not minutes >= 0:
        raise UsageError(f"cells are begun for so many minutes, 0 or more; got minutes={minutes}")
    end = float("inf") if minutes is None else perf_counter() + 60 * minutes
    store = Store(Path(out) / f"{suite.name}-{suite.size}.jsonl", suite.revision)
    cells = list(suite.cells())
    missing = [cell for cell in cells if not store.has(cell)]
    done = len(cells) - len(missing)
    yield Started(suite.name, len(cells), done)
    failures: list[Exception] = []
    for row in _run_all(suite, missing, processes, end, failures):
        store.add(row)
        done += 1
        yield CellDone(row, len(cells), done)
    rows = store.rows(cells)
    report = _report(suite, Path(out))
    text = _header(suite, rows, processes) + "\n" + _so_far(len(rows), len(cells)) + suite.table(rows).rstrip() + "\n"
    _write(report, text)
    lacking = {error.package for error in failures if isinstance(error, MissingExtra)}
    if lacking:
        LOGGER.warning("cells that need %s, which is not installed, were left out", ", ".join(sorted(lacking)))
    failures = [error for error in failures if not isinstance(error, MissingExtra)]
    if failures:
        failures[0].add_note(f"renorm: {len(failures)} of {len(cells)} cells failed; the rows of the others are kept.")
        raise failures[0]
    yield Finished(report, text)


def _report(suite: Suite, out: Path) -> Path:
    """Where the table goes: one of `full` stays where it is when `quick` is run again."""
    report = out / f"{suite.name}.md"
    fuller = suite.size == "quick" and report.exists() and " --size full " in report.read_text(encoding="utf-8")[:1000]
    return out / f"{suite.name}-quick.md" if fuller else report


def _so_far(known: int, total: int) -> str:
    return "" if known == total else f"Rows so far: {known} of {total} cells; the same command goes on from here.\n\n"


def _processes(suite: Suite, asked: int | None) -> int:
    if asked is not None and asked < 1:
        raise UsageError(f"cells run in 1 process or more, and processes={asked} was asked for")
    if suite.timed:
        if asked is not None and asked > 1:
            raise UsageError(
                f"the suite {suite.name!r} measures time, which {asked} processes would spoil; leave out processes"
            )
        return 1
    return asked or os.cpu_count() or 1


def _run_all(suite: Suite, cells: list[Cell], processes: int, end: float, failures: list[Exception]) -> Iterator[Row]:
    """The rows of `cells` as they come, of those begun before `end`; what a cell raised goes to `failures`."""
    if processes == 1 or len(cells) < 2 or perf_counter() >= end:
        for cell in cells:
            if perf_counter() >= end:
                return
            found = _run(suite, cell)
            if isinstance(found, Row):
                yield found
            elif found is not None:
                failures.append(found)
        return
    workers = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_work_quietly)
    try:
        # the workers look at the clock themselves: of a queue some cells are handed out ahead of time
        left = end - perf_counter()
        for done in as_completed([workers.submit(_run, suite, cell, time() + left) for cell in cells]):
            found = done.result()
            if isinstance(found, Row):
                yield found
            elif found is not None:
                failures.append(found)
    finally:
        workers.shutdown(wait=True, cancel_futures=True)


def _work_quietly() -> None:
    """In a worker: one thread, and Ctrl-C left to the parent, which stops the workers after their cells."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(suite: Suite, cell: Cell, end: float = float("inf")) -> Row | Exception | None:
    """The cell's row, or what running it raised; None after `end` of the wall clock."""
    if time() >= end:
        return None
    device, start = suite.device_of(cell), perf_counter()
    try:
        with _exactly(device):
            values = suite.run_cell(cell)
    except Exception as error:
        error.add_note(f"renorm: in the cell {cell} of suite {suite.name}.")
        return error
    found = {name: float(value) for name, value in values.items()}
    return Row(cell, found, perf_counter() - start, _code(), _where(device))


@contextmanager
def _exactly(device: str) -> Iterator[None]:
    """Inside, a GPU computes in float32 as the processor does, and as alike from run to run as it can."""
    if device == "cpu":
        yield
        return
    import torch

    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def _where(device: str) -> str:
    """What computed: a GPU's own name, or the kind of processor."""
    import torch

    kind = torch.device(device).type
    return torch.cuda.get_device_name(device) if kind == "cuda" else f"{kind} {platform.machine()}"


@cache
def _code() -> str:
    """Eight digits that change with any file of the package that can change a number: all but those of the edges."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        if file.relative_to(package).parts[0] not in ("bench", "cli", "report"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def _header(suite: Suite, rows: list[Row], processes: int) -> str:
    """What a reader needs in order to make the table again; nothing in it names the machine."""
    import torch

    each = f"{processes} processes of 1 torch thread" if processes > 1 else f"{torch.get_num_threads()} torch threads"
    minutes = sum(row.seconds for row in rows) / 60
    data = " --data DIR" if suite.needs else ""
    command = f"renorm bench {suite.name}{data} --size {suite.size} --seeds {suite.seeds}"
    codes = sorted({row.code for row in rows})
    code = (
        f"rows of {len(codes)} states of the code: {', '.join(codes)}" if len(codes) > 1 else f"code {''.join(codes)}"
    )
    counts = Counter(row.where for row in rows)
    places = ", ".join(where if len(counts) == 1 else f"{where} ({count})" for where, count in sorted(counts.items()))
    versions = ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name)))
    return (
        f"# {suite.name}\n\n"
        f"    {command}\n\n"
        f"Python {platform.python_version()}, {versions}. "
        f"{platform.machine()}, {os.cpu_count()} cores, {each}; "
        f"{len(rows)} cells, {minutes:.0f} minutes of computing, {code}. Revision {suite.revision} of the suite. "
        f"Rows of: {places or 'none'}.\n"
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
