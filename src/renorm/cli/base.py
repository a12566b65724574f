"""What a command is: a frozen dataclass whose fields are its options, and `run`, which returns a report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from importlib import import_module
from inspect import getdoc, isabstract
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_type_hints

from renorm.errors import UsageError

if TYPE_CHECKING:
    from renorm.cli.screen import Screen
    from renorm.report.base import Report


def option(default: Any, help: str, *, short: str = "", metavar: str = "", required: bool = False) -> Any:
    """A field that becomes `--its-name`, with `help` for the reader of `--help`; `metavar` stands for its value."""
    about = {"help": help, "short": short, "metavar": metavar, "required": required}
    return field(default=default, metadata=about)


def argument(help: str, *, required: bool = True) -> Any:
    """A field that is given by its place, or by name in a configuration file; `required` ones have no default."""
    return field(default="", metadata={"help": help, "argument": True, "required": required})


@dataclass(frozen=True, kw_only=True)
class Command(ABC):
    """One word after `renorm`. The first line of its docstring is what `renorm --help` says of it."""

    name: ClassVar[str]
    example: ClassVar[str]

    format: Literal["table", "json"] = option("table", "how to print the answer")
    quiet: bool = option(False, "draw no progress")
    force: bool = option(False, "write over an output file that exists")
    debug: bool = option(False, "on an error, show where in the code it came from")

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.metadata.get("required") and not getattr(self, each.name):
                raise UsageError(
                    f"renorm {self.name} needs {_named(each)}, and none was given. For example:\n"
                    f"  {self.example}\nrenorm {self.name} --help lists everything."
                )

    @abstractmethod
    def run(self, screen: Screen) -> Report:
        """Do the work; `screen` draws progress."""


def _named(each: Field[Any]) -> str:
    if each.metadata.get("argument"):
        return each.name.upper()
    return f"{each.metadata['short']} {each.metadata['metavar']}"


@dataclass(frozen=True)
class Setting:
    """One field of a dataclass as the command line sees it."""

    key: str
    type: Any
    default: Any
    help: str
    short: str = ""
    metavar: str = ""
    positional: bool = False
    required: bool = False

    @property
    def flag(self) -> str:
        """How it is written on the command line."""
        return self.key if self.positional else "--" + self.key.replace("_", "-")


def settings(kind: type[Any], *, prefix: str = "") -> list[Setting]:
    """The fields of `kind` that can be given, in the order they are declared, the class's own before inherited ones."""
    hints = get_type_hints(kind)
    found = []
    for each in fields(kind):
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        found.append(
            Setting(
                key=prefix + each.name,
                type=hints[each.name],
                default=default,
                help=each.metadata.get("help", ""),
                short=each.metadata.get("short", ""),
                metavar=each.metadata.get("metavar", ""),
                positional=each.metadata.get("argument", False),
                required=each.metadata.get("required", default is MISSING),
            )
        )
    own = set(kind.__dict__.get("__annotations__", {}))
    return sorted(found, key=lambda s: (not s.positional, s.key.removeprefix(prefix) not in own))


def summary(command: type[Command]) -> str:
    """What `renorm --help` says of a command."""
    return (getdoc(command) or "").partition("\n")[0]


@cache
def catalogue() -> dict[str, type[Command]]:
    """Every command in this folder, by the word that calls it."""
    package = import_module(__package__ or "renorm.cli")
    modules = [import_module(f"{package.__name__}.{found.name}") for found in iter_modules(package.__path__)]
    commands = [
        thing
        for module in modules
        for thing in vars(module).values()
        if isinstance(thing, type) and issubclass(thing, Command) and not isabstract(thing)
        if thing.__module__ == module.__name__
    ]
    return {command.name: command for command in sorted(commands, key=lambda command: command.name)}
