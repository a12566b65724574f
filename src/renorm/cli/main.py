"""From words to an exit code: find the command, run it, print what it found; every failure ends in one short message."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from renorm.errors import RenormError, UnknownName
from renorm.log import LOGGER

INTERRUPTED = 130  # what shells give for Ctrl-C: 128 + SIGINT
PACKAGE = Path(__file__).parents[1]


def main(words: Sequence[str] | None = None) -> int:
    """Run `renorm WORDS` and return its exit code: 0 all well, 1 something found, 2 not carried out, 130 interrupted."""
    words = list(sys.argv[1:] if words is None else words)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that knows no bars still gets its numbers
    try:
        with _heard():
            code = _run(words)
        sys.stdout.flush()  # here, where a reader that has gone is expected, and not while Python shuts down
        return code
    except KeyboardInterrupt:
        _say("interrupted; nothing was written.")
        return INTERRUPTED
    except BrokenPipeError:  # `renorm … | head`: the reader has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED
    except SystemExit as done:  # --print-config
        return int(done.code or 0)
    except Exception as error:
        if "--debug" in words:
            traceback.print_exc()
        else:
            _say(str(error) if isinstance(error, RenormError) else unexpected(error))
        return error.exit_code if isinstance(error, RenormError) else 2


def _run(words: list[str]) -> int:
    from renorm.cli import help
    from renorm.cli.base import catalogue
    from renorm.cli.parse import parse
    from renorm.cli.screen import Screen

    commands = catalogue()
    word = words[0] if words else "--help"
    if word in ("-h", "--help", "help"):
        sys.stdout.write(help.of_renorm(commands, _version()))
        return 0
    if word == "--version":
        sys.stdout.write(f"renorm {_version()}\n")
        return 0
    if word not in commands:
        raise UnknownName("command", word, commands)
    kind, rest = commands[word], words[1:]
    if "-h" in rest or "--help" in rest:
        sys.stdout.write(help.of_command(kind, rest))
        return 0
    command = parse(kind, rest)
    screen = Screen(
        format=command.format, quiet=command.quiet, page=command.report, lang=command.lang, force=command.force
    )
    screen.check(getattr(command, "output", ""))
    report = command.run(screen)
    screen.show(report)
    return report.exit_code


@contextmanager
def _heard() -> Iterator[None]:
    """Inside, what goes to the logger `renorm`, and what libraries warn of, are lines on stderr: `renorm: warning: …`."""
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(logging.Formatter("renorm: warning: %(message)s"))
    lines.setLevel(logging.WARNING)
    LOGGER.addHandler(lines)
    try:
        with warnings.catch_warnings():  # which gives showwarning back
            warnings.showwarning = _log
            yield
    finally:
        LOGGER.removeHandler(lines)


def _log(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    said = " ".join(str(message).split())
    LOGGER.warning("%s (%s, line %d: %s)", said, Path(filename).name, lineno, category.__name__)


def unexpected(error: Exception) -> str:
    """One sentence on an error that renorm did not raise itself: what it was, whose code it came from, what to do."""
    place = next((f for f in reversed(traceback.extract_tb(error.__traceback__)) if _is_users(f.filename)), None)
    said = f"{type(error).__name__}: {_shortened(str(error))}" if str(error) else type(error).__name__
    notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
    if place is None:
        where = "It came from inside renorm or a library, not from your code; "
    else:
        where = f"It came from {place.filename}, line {place.lineno}, in {place.name}; "
    return f"{said}{notes}\n{where}--debug shows the whole way there."


def _shortened(message: str, *, most: int = 400) -> str:
    """Its first paragraph, up to a few lines' length: torch lists every backend and every key that it knows of."""
    first = message.strip().partition("\n\n")[0]
    short = first if len(first) <= most else first[:most].rpartition(" ")[0]
    return short if short == message.strip() else f"{short} …"


def _is_users(filename: str) -> bool:
    """Whether a file is neither renorm's, nor installed, nor Python's own."""
    path = Path(filename)
    installed = {"site-packages", "dist-packages", Path(os.__file__).parent.name} & set(path.parts)
    return path.suffix == ".py" and not path.is_relative_to(PACKAGE) and not installed


def _say(message: str) -> None:
    sys.stderr.write(f"renorm: {message}\n")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("renorm")
    except PackageNotFoundError:
        return "source"
