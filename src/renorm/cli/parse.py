"""Words on the command line → a command with its options; what cannot be read is refused in one sentence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from renorm.cli.base import Command, Setting, settings
from renorm.errors import UnknownName, UsageError

PLACEHOLDER = {int: "N", float: "X", str: "TEXT"}


def parse(kind: type[Command], words: Sequence[str]) -> Command:
    """The command `kind` with the options in `words` and in the files that `--config` names.

    A command with a `method` has that method's own fields as `--options.NAME`.
    Raises UsageError, or UnknownName with the nearest right name, for what cannot be read.
    """
    from argparse import ArgumentError

    known = every_setting(kind, words)
    _refuse_unknown(kind, known, words)
    parser = _parser(kind, known)
    try:
        namespace = parser.parse_args(list(words))
    except ArgumentError as error:
        raise _translated(kind, known, str(error)) from None
    except Exception as error:  # whatever a YAML file of any content makes the parser stumble over
        raise UsageError(f"renorm {kind.name}: {' '.join(str(error).split())}") from None
    given = namespace.as_dict()
    given.pop("config", None)
    return kind(**given)


def every_setting(kind: type[Command], words: Sequence[str]) -> list[Setting]:
    """The settings of `kind` and, where `words` or a configuration file choose a method, that method's."""
    known = settings(kind)
    method = _peek(words, "method") if any(s.key == "method" for s in known) else None
    if method is None or method == "auto":
        return known
    from renorm.methods.base import catalogue

    methods = catalogue()
    if method not in methods:
        raise UnknownName("method", str(method), ["auto", *methods])
    return known + settings(methods[method], prefix="options.")


def placeholder(setting: Setting) -> str:
    """What stands for a value in help and messages: `table|json`, `N`, `FILE`."""
    return setting.metavar or _described(setting.type)


def _described(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        return "|".join(_described(part) for part in get_args(kind) if part is not NoneType)
    return PLACEHOLDER.get(kind, "VALUE")


def _parser(kind: type[Command], known: list[Setting]) -> Any:
    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(
        prog=f"renorm {kind.name}",
        exit_on_error=False,
        add_help=False,
        allow_abbrev=False,
        default_env=False,
        print_config="--print-config",
    )
    for setting in known:
        if setting.key == "options":  # stands for the method's own fields, which follow
            continue
        if setting.positional:
            parser.add_argument(setting.key, nargs="?", type=setting.type, default=setting.default)
        elif setting.type is bool:
            parser.add_argument(*_flags(setting), dest=setting.key, action="store_true", default=setting.default)
        else:
            parser.add_argument(*_flags(setting), dest=setting.key, type=setting.type, default=setting.default)
    parser.add_argument("--config", action=ActionConfigFile)
    return parser


def _flags(setting: Setting) -> list[str]:
    return [flag for flag in (setting.short, setting.flag) if flag]


def _refuse_unknown(kind: type[Command], known: list[Setting], words: Sequence[str]) -> None:
    flags = [flag for s in known if not s.positional and s.key != "options" for flag in _flags(s)]
    flags += ["--config", "--print-config", "--help"]
    for word in words:
        if word == "--":
            break
        name = word.partition("=")[0]
        if not name.startswith("-") or name in flags or re.fullmatch(r"-[\d.].*", name):
            continue
        if any(len(flag) == 2 and name.startswith(flag) for flag in flags) and not name.startswith("--"):
            continue  # -oFILE
        if name.startswith("--options.") and "method" in {s.key for s in known}:
            own = [flag for flag in flags if flag.startswith("--options.")]
            if not own:
                raise UsageError(f"{name} belongs to a method, and none was chosen that has options. Give --method NAME.")
            raise UnknownName("option of the method", name, own)
        raise UnknownName(f"option of renorm {kind.name}", name, flags)


def _peek(words: Sequence[str], key: str) -> Any:
    """The value of `--key` in the words, or else in the last configuration file that has it; None where nothing says."""
    said = None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--config" or word.startswith("--config="):
            found = _loaded(word.partition("=")[2] or following).get(key)
            said = said if found is None else found
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == f"--{key}" or word.startswith(f"--{key}="):
            said = word.partition("=")[2] or following
    return said


def _loaded(path: str) -> Mapping[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}  # the parser will say so
    return found if isinstance(found, Mapping) else {}


def _translated(kind: type[Command], known: list[Setting], message: str) -> UsageError:
    """The parser's message in the words of the command line."""
    if found := re.search(r"unrecognized arguments: (.*)", message):
        places = [s.key.upper() for s in known if s.positional]
        takes = " ".join(places) or "no arguments, only options"
        return UsageError(f"renorm {kind.name} takes {takes}; {found[1]} is more than that.")
    if found := re.search(r"[Oo]ption '?([\w.]+)'? is not accepted", message):
        return UnknownName(f"setting of renorm {kind.name}", found[1], [s.key for s in known if s.key != "options"])
    if found := re.search(r'Parser key "([\w.]+)"', message):
        for setting in known:
            if setting.key == found[1]:
                value = re.search(r"(?:Given value|Got value): (.*)", message)
                got = f"; got {value[1]}" if value else ""
                return UsageError(f"renorm {kind.name}: {setting.flag} takes {placeholder(setting)}{got}.")
    return UsageError(f"renorm {kind.name}: {' '.join(message.split())}.")

