"""Every error that renorm raises on purpose; whatever is raised besides these is a bug or the user's own code.

    RenormError                        exit code 2
    ├── UsageError     (ValueError)    an argument that makes no sense
    │   └── UnknownName                a name that is not in a list; offers the nearest one that is
    ├── BatchError     (ValueError)    a batch or loader that cannot be used: empty, NaN, wrong channels
    │   └── OneShot                    an iterator where several passes are needed
    ├── DataError      (ValueError)    a data file or folder that cannot be used
    ├── ModelError                     a model that cannot be built
    ├── CheckpointError                weights that cannot be read, or do not fit the model
    ├── FileExists     (FileExistsError)  an output that stands there already
    ├── MissingExtra   (ImportError)   an optional package that is not installed
    ├── Diverged       (ArithmeticError)  training whose loss is no longer a number
    ├── NoBatchNorm                    a verb that needs batch norm met a model without
    └── OpenChange                     an undo out of order

A message says what was asked, what was found and what to do.
"""

# ruff: noqa: N818 (the names say what happened; half of them would be longer and no clearer with Error behind them)

from __future__ import annotations

import importlib
from collections.abc import Iterable
from difflib import get_close_matches
from types import ModuleType
from typing import Any, ClassVar

__all__ = [
    "BatchError",
    "CheckpointError",
    "DataError",
    "Diverged",
    "FileExists",
    "MissingExtra",
    "ModelError",
    "NoBatchNorm",
    "OneShot",
    "OpenChange",
    "RenormError",
    "UnknownName",
    "UsageError",
    "require",
]

SHOWN = 20  # a list of more names than fit on one screen beside the sentence is shown by those close to the asked one


class RenormError(Exception):
    """Something renorm refuses, in words for its user; `exit_code` is what the command line returns."""

    exit_code: ClassVar[int] = 2


class UsageError(RenormError, ValueError):
    """An argument that makes no sense."""


class UnknownName(UsageError):
    """`asked` is no `what` that is known; the message offers the nearest known name and lists them."""

    def __init__(self, what: str, asked: str, known: Iterable[str]) -> None:
        self.what: str = what
        self.asked: str = asked
        self.known: tuple[str, ...] = tuple(known)
        close = _close(asked, self.known)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        super().__init__(f"there is no {what} {asked!r}{hint} {_listed(what, self.known, close)}")

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call the class with the message alone; errors cross processes with workers.
        return type(self), (self.what, self.asked, self.known)


class BatchError(RenormError, ValueError):
    """A batch or loader that cannot be used: empty, not finite, wrong channels."""


class OneShot(BatchError):
    """An iterator, which can be read once, where several passes are needed."""


class DataError(RenormError, ValueError):
    """A data file or folder that cannot be used."""


class ModelError(RenormError):
    """A model that cannot be built."""


class CheckpointError(RenormError):
    """Weights that cannot be read, or that do not fit the model."""


class FileExists(RenormError, FileExistsError):
    """An output file that stands there already and was not to be overwritten."""


class MissingExtra(RenormError, ImportError):
    """`package`, which `purpose` needs, is not installed; the message names the `extra` that brings it."""

    def __init__(self, extra: str, package: str, purpose: str) -> None:
        self.extra: str = extra
        self.package: str = package
        self.purpose: str = purpose
        super().__init__(f'{purpose} needs {package}, which is not installed: pip install "renorm[{extra}]"')

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.extra, self.package, self.purpose)


class Diverged(RenormError, ArithmeticError):
    """Training whose loss or weights are no longer finite numbers."""


class NoBatchNorm(RenormError):
    """A verb that needs batch norm met a model without any."""


class OpenChange(RenormError):
    """An undo out of order: a later change at the same sites is still open."""


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import and return `module`, a dotted name that the install extra `extra` provides.

    `purpose` begins the sentence of the error, as in "timm: models".

    Raises:
        MissingExtra: the module, or a package it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        raise MissingExtra(extra, package, purpose) from error


def _close(asked: str, known: tuple[str, ...]) -> list[str]:
    lower = {name.lower(): name for name in known}
    return [lower[name] for name in get_close_matches(asked.lower(), list(lower), n=5)]


def _listed(what: str, known: tuple[str, ...], close: list[str]) -> str:
    if not known:
        return f"No {what} is known here."
    if len(known) <= SHOWN:
        return f"Known: {', '.join(known)}."
    return f"Known: {', '.join(close or known[:SHOWN])}, … ({len(known)} in all)."
