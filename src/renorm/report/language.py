"""A report in another language: every text that was `said` is looked up; names, numbers and plain text stay as they are.

A language is one YAML file in this folder, `English template: translation`, with the same `{fields}` on both sides. YAML
because renorm reads it already; gettext's own files would want a compiler that Python does not bring, or one more package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

from renorm.said import Said

LANGUAGES: Mapping[str, str] = {"en": "en", "zh": "zh-CN"}  # and the name that a page's `lang` attribute wants
T = TypeVar("T")


def translated(value: T, lang: str) -> T:
    """`value` (a report, a block, a text, or a tuple of them) in `lang`; for "en" it is the same object."""
    if lang == "en":
        return value
    result: T = _walked(value, catalogue(lang))
    return result


@cache
def catalogue(lang: str) -> Mapping[str, str]:
    """{English template: translation}."""
    import yaml

    found: Mapping[str, str] = yaml.safe_load(files(__package__).joinpath(f"{lang}.yaml").read_text(encoding="utf-8"))
    return found


def _walked(value: Any, known: Mapping[str, str]) -> Any:
    if isinstance(value, Said):
        return value.translated(known.get)
    if isinstance(value, tuple):
        return tuple(_walked(item, known) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        # the numbers for machines are the same in every language
        names = [field.name for field in fields(value) if field.name not in ("result", "origin")]
        return replace(value, **{name: _walked(getattr(value, name), known) for name in names})
    return value
