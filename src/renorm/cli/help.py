"""What `renorm --help` and `renorm COMMAND --help` print: plain text that fits 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from inspect import getdoc
from textwrap import fill, wrap

from renorm.cli.base import Command, Setting, settings, summary
from renorm.cli.parse import every_setting, placeholder

WIDTH = 80
GAP = 26  # columns before the words about an option: "  --batch-size N" and its like fit

MODEL = (
    "MODEL is timm:NAME, torchvision:NAME, hf:ORG/NAME, file.py:factory or package.module:factory; weights come with "
    "--checkpoint FILE."
)
DATA = (
    "DATA is an image folder, .npz, .npy, .csv, .parquet, .tar shards, hf:NAME, or digits (small images that are always "
    "there)."
)


def of_renorm(commands: Mapping[str, type[Command]], version: str) -> str:
    """What `renorm --help` prints."""
    listed = "\n".join(_row(f"  {name}", summary(command)) for name, command in commands.items())
    return (
        f"renorm {version}: make pretrained networks work on new data, by their norm layers.\n\n"
        "  renorm demo                          the whole story on real data, in a minute\n"
        "  renorm doctor MODEL DATA             what is wrong, and where\n"
        "  renorm recalibrate MODEL DATA -o OUT mend it, without labels\n\n"
        f"commands\n{listed}\n\n"
        f"{fill(MODEL, WIDTH)}\n{fill(DATA, WIDTH)}\n\n"
        "renorm COMMAND --help says more. Exit codes: 0 all well, 1 something was found,\n"
        "2 the command could not be carried out, 130 interrupted.\n"
    )


def of_command(kind: type[Command], words: Sequence[str]) -> str:
    """What `renorm COMMAND --help` prints; with `--method NAME` among the words, that method's options too."""
    everywhere = {each.name for each in fields(Command)}
    known = every_setting(kind, words)
    own = [s for s in known if s.key not in everywhere and s.key != "options"]
    general = [s for s in known if s.key in everywhere]
    rows = [_row(*_described(s)) for s in own]
    rest = [_row(*_described(s)) for s in general]
    rest.append(_row("  --config FILE", "read options from a YAML file; words on the command line win over it"))
    rest.append(_row("  --print-config", "print the options as such a file, and do nothing else"))
    about = "\n\n".join(fill(" ".join(p.split()), WIDTH) for p in (getdoc(kind) or "").split("\n\n"))
    body = "\n".join(rows) + "\n\n" if rows else ""
    return f"{usage(kind)}\n\n{about}\n\n{body}every command\n" + "\n".join(rest) + f"\n\nexample\n  {kind.example}\n"


def usage(kind: type[Command]) -> str:
    """`renorm recalibrate MODEL DATA -o OUT`."""
    known = settings(kind)
    places = [_place(s) for s in known if s.positional]
    needed = [f"{s.short or s.flag} {placeholder(s)}" for s in known if s.required and not s.positional]
    return " ".join(["renorm", kind.name, *places, *needed])


def _place(setting: Setting) -> str:
    name = setting.key.upper() + (" …" if setting.many else "")
    return name if setting.required else f"[{name}]"


def _described(setting: Setting) -> tuple[str, str]:
    if setting.positional:
        return f"  {setting.key.upper()}", setting.help
    value = "" if setting.type is bool else f" {placeholder(setting)}"
    shown = "" if setting.type is bool or setting.required or setting.default in (None, "", ()) else setting.default
    name = f"  {setting.short}, {setting.flag}{value}" if setting.short else f"  {setting.flag}{value}"
    return name, setting.help + (f" (default {shown})" if shown != "" else "")


def _row(name: str, words: str) -> str:
    lines = wrap(words, WIDTH - GAP) or [""]
    first = [f"{name:<{GAP - 1}} {lines[0]}"] if len(name) < GAP else [name, " " * GAP + lines[0]]
    return "\n".join([*first, *(" " * GAP + line for line in lines[1:])]).rstrip()
