"""Folders whose files share one interface: dropping a file in adds the member, and nothing else is edited."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import import_module
from inspect import isabstract
from pkgutil import iter_modules
from typing import Any, TypeVar

from renorm.errors import UnknownName, UsageError

Member = TypeVar("Member")


def members(package: str, interface: type[Member], *, key: str = "name") -> dict[str, type[Member]]:
    """Every concrete subclass of `interface` that a module of `package` defines, by its attribute `key`, sorted by that."""
    path = import_module(package).__path__
    modules = [import_module(f"{package}.{found.name}") for found in iter_modules(path)]
    found = {
        getattr(thing, key): thing
        for module in modules
        for thing in vars(module).values()
        if isinstance(thing, type) and issubclass(thing, interface) and not isabstract(thing)
        if thing.__module__ == module.__name__
    }
    return dict(sorted(found.items()))


def built(kind: str, name: str, options: Mapping[str, Any], known: Mapping[str, type[Member]]) -> Member:
    """The member called `name`, a frozen dataclass, with `options` for its fields; `kind` is what messages call a member.

    Raises UnknownName for a name that is not known or an option that the member does not have, UsageError where one is missing.
    """
    if name not in known:
        raise UnknownName(kind, name, known)
    member: Any = known[name]
    fields = [field.name for field in dataclasses.fields(member)]
    for option in options:
        if option not in fields:
            raise UnknownName(f"option of the {kind} {name!r}", option, fields)
    try:
        made: Member = member(**options)
    except TypeError as error:
        raise UsageError(f"the {kind} {name!r} was given options it cannot take: {error}.") from error
    return made


def stub(package: str, interface: type[Member], *besides: str) -> str:
    """The text of the package's `__init__.pyi`: what a type checker, which cannot scan folders, is told of the members.

    `besides` are dotted names of further things that the package offers.
    """
    offered = [f"{member.__module__}.{member.__name__}" for member in members(package, interface).values()]
    parts = sorted((name.rpartition(".") for name in (*offered, *besides)), key=lambda part: (part[0], part[2].lower()))
    lines = [f"from {module} import {name} as {name}" for module, _, name in parts]
    return "\n".join(["# written by `make stubs`; a test compares it with the folder", *lines, ""])
