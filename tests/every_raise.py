"""Every `raise` in src/renorm is reached by a test, or a run with --every-raise fails and lists those that were not.

A place counts as reached when `pytest.raises(..., match=...)` caught an error that passed through it, or when a
RenormError was made there: the command line turns those into a message and an exit code before a test could catch them.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "renorm"

Place = tuple[str, int]  # file, relative to SOURCE; line

# A child process sends its error as text: torch.multiprocessing puts the child's traceback into the message.
TRACED = re.compile(r'File "([^"]+)", line (\d+)')


def raises_in(source: Path) -> Iterator[tuple[str, int, int, str]]:
    """File, first line, last line and text of every `raise` under `source` that makes an error, not passes one on."""
    for file in sorted(source.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and node.exc is not None and _makes_an_error(node.exc):
                last = node.end_lineno or node.lineno
                yield file.relative_to(source).as_posix(), node.lineno, last, ast.unparse(node.exc)


def _makes_an_error(raised: ast.expr) -> bool:
    if isinstance(raised, ast.Name):  # `raise failure` passes on what was caught; `raise StopIteration` makes one
        return raised.id[:1].isupper()
    return "SystemExit" not in ast.unparse(raised)


def unreached(source: Path, reached: set[Place]) -> list[str]:
    """One line for each `raise` under `source` none of whose lines is in `reached`."""
    return [
        f"{file}:{first}: raise {text[:90]}"
        for file, first, last, text in sorted(raises_in(source))
        if not any((file, line) in reached for line in range(first, last + 1))
    ]


class EveryRaise:
    """Collects the places that raised, in this process and from the workers of pytest-xdist."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.reached: set[Place] = set()
        self.missing: list[str] = []

    def pytest_sessionstart(self) -> None:
        from renorm.errors import RenormError

        def watched(error: RenormError, *args: Any, **kwargs: Any) -> None:
            self._stack(sys._getframe(1))
            super(RenormError, error).__init__(*args, **kwargs)

        RenormError.__init__ = watched  # type: ignore[method-assign]
        left = pytest.RaisesExc.__exit__

        def caught(block: Any, kind: Any, error: BaseException | None, trace: Any) -> bool:
            if error is not None and block.match is not None:
                self._chain(error)
            return bool(left(block, kind, error, trace))

        pytest.RaisesExc.__exit__ = caught  # type: ignore[method-assign]

    def _stack(self, frame: FrameType | None) -> None:
        # A frame higher up is on a line of a `raise` only while that raise makes its error, so all frames count.
        while frame is not None:
            self._add(frame.f_code.co_filename, frame.f_lineno)
            frame = frame.f_back

    def _chain(self, error: BaseException | None) -> None:
        while error is not None:
            for file, line in TRACED.findall(str(error)):
                self._add(file, int(line))
            trace = error.__traceback__
            while trace is not None:
                self._add(trace.tb_frame.f_code.co_filename, trace.tb_lineno)
                trace = trace.tb_next
            error = error.__cause__ or error.__context__

    def _add(self, file: str, line: int) -> None:
        path = Path(file)
        if path.is_relative_to(SOURCE):
            self.reached.add((path.relative_to(SOURCE).as_posix(), line))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.reached.update((file, line) for file, line in getattr(node, "workeroutput", {}).get("reached", ()))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["reached"] = sorted(self.reached)
        elif self.config.getoption("--every-raise"):
            self.missing = unreached(SOURCE, self.reached)
            if self.missing and session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.missing:
            terminalreporter.section("raised by no test")
            for line in self.missing:
                terminalreporter.line(line)
