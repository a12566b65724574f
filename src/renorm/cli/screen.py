"""What a command may do to the screen: progress on stderr, the report on stdout."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from renorm.errors import UsageError
from renorm.report.base import Report

if TYPE_CHECKING:
    from rich.progress import Progress


def is_first() -> bool:
    """Whether this process speaks and writes, of those that `accelerate launch` or `torchrun` started to work together."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Screen:
    """Progress is drawn only where a person watches: stderr is a terminal and nobody asked for quiet."""

    format: str = "table"
    quiet: bool = False
    page: str = ""
    lang: str = "en"
    force: bool = False

    def check(self, output: str = "") -> None:
        """Refuse, before any work, what could not be shown or written; `output` is what the command itself writes.

        Raises MissingExtra without matplotlib, FileExists and UsageError as `files.refuse_existing`.
        """
        if self.format == "html" or self.page:
            from renorm.report import pictures

            pictures.available()
        if self.page:
            from renorm.files import refuse_existing

            refuse_existing(self.page, force=self.force)
            if output and Path(output).resolve() == Path(self.page).resolve():
                raise UsageError(f"-o and --report both name {self.page}. Give the page another name.")

    @property
    def draws(self) -> bool:
        """Whether progress is drawn."""
        return not self.quiet and is_first() and sys.stderr.isatty()

    def watched(self, batches: Iterable[Any], doing: str) -> Iterable[Any]:
        """`batches`, with a line that says how far reading has come and how long the rest will take.

        As often readable as `batches` is, with its length.
        """
        return _Watched(batches, doing) if self.draws else batches

    def steps(self, steps: Iterable[Any], doing: str, *, total: int) -> Iterator[Any]:
        """`steps`, of which there will be `total`, each drawn as it is done."""
        return iter(_Watched(steps, doing, total)) if self.draws else iter(steps)

    @contextmanager
    def progress(self, doing: str, *, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        """A function that draws so many more steps as done, with what is to be said of them; `total` 0 is not known."""
        if not self.draws:
            yield lambda steps, said: None
            return
        with _drawing() as progress:
            task = progress.add_task(doing, total=total or None, completed=done)

            def draw(steps: int, said: str) -> None:
                progress.update(task, advance=steps, description=f"{doing}, {said}")

            yield draw

    def show(self, report: Report) -> None:
        """Print the report on stdout in the format that was asked for, and write the page if one was; one of several does."""
        if not is_first():
            return
        if self.page:
            from renorm.files import writing
            from renorm.report import html

            with writing(self.page, force=self.force) as path:
                path.write_text(html.render(report, lang=self.lang), encoding="utf-8")
        self._print(report)
        sys.stdout.flush()

    def _print(self, report: Report) -> None:
        if self.format == "json":
            from renorm.provenance import version
            from renorm.report import json

            _write(json.render(report, version=version("renorm")) + "\n")
        elif self.format == "html":
            from renorm.report import html

            _write(html.render(report, lang=self.lang))
        elif self.format == "sarif":
            from renorm.provenance import version
            from renorm.report import sarif

            _write(sarif.render(report, version=version("renorm")) + "\n")
        else:
            from renorm.report import terminal
            from renorm.report.language import translated

            terminal.show(translated(report, self.lang), sys.stdout)


def _write(text: str) -> None:
    """Write what other programs read, in UTF-8: the page says that it is, JSON has to be, whatever the terminal speaks."""
    raw = getattr(sys.stdout, "buffer", None)
    sys.stdout.write(text) if raw is None else raw.write(text.encode(errors="replace"))


class _Watched:
    """An iterable that draws a progress line while it is read."""

    def __init__(self, items: Iterable[Any], doing: str, total: int | None = None) -> None:
        self.items, self.doing, self.total = items, doing, total
        if isinstance(items, Sized):
            self.total = len(items)
        self.reads = 0

    def __len__(self) -> int:
        if self.total is None:
            raise TypeError(f"the length of {type(self.items).__name__} is not known")
        return self.total

    def __getattr__(self, name: str) -> Any:
        # whatever else the loader has (labels, a fingerprint) is still to be found on it
        return getattr(self.items, name)

    def __iter__(self) -> Iterator[Any]:
        self.reads += 1
        doing = self.doing if self.reads == 1 else f"{self.doing} (pass {self.reads})"
        with _drawing() as progress:
            task = progress.add_task(doing, total=self.total)
            for item in self.items:
                yield item
                progress.advance(task)


def _drawing() -> Progress:
    """A progress line on stderr, with the time that is left; it goes when it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
    return Progress(*columns, console=console, transient=True)
