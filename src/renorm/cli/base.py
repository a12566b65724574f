"""What a command is: a frozen dataclass whose fields are its options, and `run`, which returns a report."""

from __future__ import annotations

import json
import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from importlib import import_module
from inspect import get_annotations, getdoc
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_type_hints

from renorm.errors import UsageError
from renorm.family import members

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


def arguments(help: str) -> Any:
    """A field that takes every word that is left by its place, one at least; a list in a configuration file."""
    return field(default=(), metadata={"help": help, "argument": True, "required": True, "many": True})


@dataclass(frozen=True, kw_only=True)
class Command(ABC):
    """One word after `renorm`. The first line of its docstring is what `renorm --help` says of it."""

    name: ClassVar[str]
    example: ClassVar[str]
    family: ClassVar[str] = "methods"  # the folder in which the members that `chooses` names are found
    chooses: ClassVar[str] = (
        "method"  # the field that names a member; "regularisers" names several, with commas between
    )

    format: Literal["table", "json", "html"] = option("table", "how to print the answer")
    report: str = option("", "write the answer as one HTML page, with pictures, besides printing it", metavar="FILE")
    lang: Literal["en", "zh"] = option("en", "the language of the answer, printed or in a page; JSON stays English")
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

    def written(self) -> str:
        """The command line that makes this command, without what is as it would be anyway."""
        parts = ["renorm", self.name]
        for each in settings(type(self)):
            value = getattr(self, each.key)
            if each.many:
                parts += map(shlex.quote, value)
            elif each.positional:
                parts += [shlex.quote(value)] if value else []
            elif isinstance(value, Mapping):
                usual = {s.key: s.default for s in members_settings(type(self), str(getattr(self, self.chooses, "")))}
                parts += [
                    f"{flag_of(key)} {shlex.quote(json.dumps(item) if isinstance(item, tuple) else str(item))}"
                    for key, item in _flat(each.key, value)
                    if key not in usual or item != usual[key]
                ]
            elif value != each.default:
                parts.append(each.flag if value is True else f"{each.short or each.flag} {shlex.quote(str(value))}")
        return " ".join(parts)

    @property
    def keeps(self) -> bool:
        """Whether the answer is made to be kept, and so says where it came from."""
        return self.format == "html" or bool(self.report)

    def origin(self, **where: Any) -> Mapping[str, Any]:
        """Where the answer comes from: the command, versions and time, and what `where` adds."""
        from renorm.provenance import provenance

        return provenance(command=self.written(), **{"model": None, "data": None, **where}) if self.keeps else {}

    @abstractmethod
    def run(self, screen: Screen) -> Report:
        """Do the work; `screen` draws progress."""


def _flat(key: str, value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, by dotted key."""
    for inner, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(f"{key}.{inner}", item)
        else:
            yield f"{key}.{inner}", item


def _named(each: Field[Any]) -> str:
    if each.metadata.get("argument"):
        return each.name.upper()
    flag = each.metadata["short"] or "--" + each.name.replace("_", "-")
    return f"{flag} {each.metadata['metavar']}"


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
    many: bool = False  # takes all the words that are left

    @property
    def flag(self) -> str:
        """How it is written on the command line."""
        return flag_of(self.key)


def flag_of(key: str) -> str:
    """`--options.l2_sp.the-field`: members keep their names, fields are written with dashes."""
    before, dot, last = key.rpartition(".")
    return f"--{before}{dot}{last.replace('_', '-')}"


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
                help=each.metadata.get("help", "") or _from_docstring(kind, each.name),
                short=each.metadata.get("short", ""),
                metavar=each.metadata.get("metavar", ""),
                positional=each.metadata.get("argument", False),
                required=each.metadata.get("required", default is MISSING),
                many=each.metadata.get("many", False),
            )
        )
    own = set(get_annotations(kind))
    # arguments by place as declared, base classes first; of the options, the class's own first
    return sorted(found, key=lambda s: (not s.positional, not s.positional and s.key.removeprefix(prefix) not in own))


def _from_docstring(kind: type[Any], name: str) -> str:
    """What the docstring's own line for a field says: "name   words", continued on deeper lines."""
    found = re.search(rf"^{re.escape(name)}  +(.*(?:\n +.*)*)", getdoc(kind) or "", flags=re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def members_settings(command: type[Command], chosen: str) -> list[Setting]:
    """The options of the members that `chosen` names, as far as they are known: `options.NAME`, or `options.MEMBER.NAME`."""
    found, several = methods(command), command.chooses != "method"
    names = [name.strip() for name in chosen.split(",")] if several else [chosen]
    prefixes = {name: f"options.{name}." if several else "options." for name in names if name in found}
    return [setting for name, prefix in prefixes.items() for setting in settings(found[name], prefix=prefix)]


def methods(command: type[Command]) -> Mapping[str, type[Any]]:
    """What `--method` of a command may name, besides auto; of a command that chooses otherwise, what may be named there."""
    found: Mapping[str, type[Any]] = import_module(f"renorm.{command.family}.base").catalogue()
    return found


def summary(command: type[Command]) -> str:
    """What `renorm --help` says of a command."""
    return (getdoc(command) or "").partition("\n")[0]


@cache
def catalogue() -> dict[str, type[Command]]:
    """Every command in this folder, by the word that calls it."""
    return members(__package__ or "renorm.cli", Command)
