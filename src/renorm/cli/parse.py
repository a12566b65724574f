"""Words on the command line → a command with its options; what cannot be read is refused in one sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from renorm.cli.base import Command, Setting, members_settings, methods, settings
from renorm.errors import UnknownName, UsageError

PLACEHOLDER: dict[type, str] = {int: "N", float: "X", str: "TEXT"}


def parse(kind: type[Command], words: Sequence[str]) -> Command:
    """The command `kind` with the options in `words` and in the files that `--config` names.

    A command with a `method` has that method's own fields as `--options.NAME`, one with `regularisers` those of each that is
    named as `--options.REGULARISER.NAME`.
    Raises UsageError, or UnknownName with the nearest right name, for what cannot be read.
    """
    from argparse import ArgumentError

    known = every_setting(kind, words)
    words = _by_name(kind, known, words)
    parser = _parser(kind, known)
    try:
        namespace = parser.parse_args(words)
    except ArgumentError as error:
        raise _translated(kind, known, str(error)) from None
    except Exception as error:  # whatever a YAML file of any content makes the parser stumble over
        raise _unreadable(kind, str(error)) from None
    given = namespace.as_dict()
    given.pop("config", None)
    return kind(**given)


def every_setting(kind: type[Command], words: Sequence[str]) -> list[Setting]:
    """The settings of `kind` and those of its method: the one that `words` or a configuration file choose, else its default."""
    known = settings(kind)
    chosen = next((s for s in known if s.key == kind.chooses), None)
    name = None if chosen is None else _peek(words, kind.chooses) or chosen.default
    if chosen is None or name in (None, "", "auto"):
        return known
    if kind.chooses == "method" and str(name) not in methods(kind):
        raise UnknownName("method", str(name), [*(["auto"] if chosen.default == "auto" else []), *methods(kind)])
    return known + members_settings(kind, str(name))


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
    from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined, unused-ignore]

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
        if setting.type is bool:
            parser.add_argument(*_flags(setting), dest=setting.key, action="store_true", default=setting.default)
        else:
            parser.add_argument(*_flags(setting), dest=setting.key, type=setting.type, default=setting.default)
    parser.add_argument("--config", action=ActionConfigFile)
    return parser


def _flags(setting: Setting) -> list[str]:
    return [flag for flag in (setting.short, setting.flag) if flag]


def _by_name(kind: type[Command], known: list[Setting], words: Sequence[str]) -> list[str]:
    """The same words with every argument that was given by its place written as an option; unknown options are refused."""
    takes_value = {"--config": True, "--print-config": False}
    takes_value |= {flag: s.type is not bool for s in known if s.key != "options" for flag in _flags(s)}
    keyed = [s.flag for s in known if s.key != "options" and get_origin(s.type) is Mapping]
    places = [s for s in known if s.positional]
    named: list[str] = []
    several: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        if not word.startswith("-") or word == "-":
            if not places:
                takes = " ".join(s.key.upper() for s in known if s.positional) or "options only"
                raise UsageError(f"renorm {kind.name} takes {takes}; {word!r} is more than that.")
            if places[0].many:
                several.append(word)
            else:
                named.append(f"--{places.pop(0).key}={word}")
        elif any(name.startswith(f"{flag}.") for flag in keyed):
            named += [word] if equals else [word, *[value for value in [next(rest, None)] if value is not None]]
        elif name in takes_value:
            named.append(word)
            if takes_value[name] and not equals:
                named += [value for value in [next(rest, None)] if value is not None]
        elif word[:2] in takes_value:
            named += [word[:2], word[2:]]  # -oFILE
        else:
            _refuse_option(kind, name, list(takes_value))
    return [*named, f"--{places[0].key}={json.dumps(several)}"] if several else named


def _refuse_option(kind: type[Command], name: str, flags: list[str]) -> None:
    own = [flag for flag in flags if flag.startswith("--options.")]
    what = kind.chooses.rstrip("s")
    if name.startswith("--options.") and f"--{kind.chooses}" in flags:
        if own:
            raise UnknownName(f"option of the {what}", name, own)
        raise UsageError(
            f"{name} belongs to a {what}, and none was chosen that has options. Give --{kind.chooses} NAME."
        )
    raise UnknownName(f"option of renorm {kind.name}", name, [*flags, "--help"])


def _peek(words: Sequence[str], key: str) -> Any:
    """The value of `--key` in the words, or else in the last configuration file that has it; None where nothing says."""
    said = None
    for word, following in zip(words, [*words, ""][1:], strict=True):
        if word == "--config" or word.startswith("--config="):
            found = _loaded(word.partition("=")[2] or following).get(key)
            said = said if found is None else found
    for word, following in zip(words, [*words, ""][1:], strict=True):
        if word == f"--{key}" or word.startswith(f"--{key}="):
            said = word.partition("=")[2] or following
    return said


def _loaded(path: str) -> Mapping[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}  # the parser will say so
    return found if isinstance(found, Mapping) else {}


def _translated(kind: type[Command], known: list[Setting], message: str) -> UsageError:
    """The parser's message in the words of the command line."""
    if found := re.search(r"[Oo]ption '?([\w.]+)'? is not accepted", message):
        return UnknownName(f"setting of renorm {kind.name}", found[1], [s.key for s in known if s.key != "options"])
    if found := re.search(r'Parser key "([\w.]+)"', message):
        for setting in known:
            if setting.key == found[1]:
                value = re.search(r"(?:Given value|Got value): (.*)", message)
                got = f"; got {value[1]}" if value else ""
                return UsageError(f"renorm {kind.name}: {setting.flag} takes {placeholder(setting)}{got}.")
    return _unreadable(kind, message)


def _unreadable(kind: type[Command], message: str) -> UsageError:
    said = " ".join(message.split()).rstrip(".:")
    return UsageError(
        f"renorm {kind.name}: the options cannot be read: {said}. --help lists them, and --print-config shows what a "
        "--config file looks like."
    )
