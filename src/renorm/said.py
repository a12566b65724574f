"""Sentences that can be said in another language: strings that remember the template and the values they were made of.

The centre says what it found in English, once. Whoever shows it in another language looks the template up and fills in
the same values; nothing is parsed back out of a finished sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Number

__all__ = ["Said", "follow", "listed", "many", "say", "some"]


class Said(str):
    """An English text, and how it was made: `template`, the key in every catalogue of translations, and its `values`.

    It is a plain string to everything else. What string methods and f-strings make of it is plain, and stays English.
    """

    template: str
    values: Mapping[str, object]

    def __new__(cls, text: str, template: str = "", values: Mapping[str, object] | None = None) -> Said:
        made = super().__new__(cls, text)
        made.template, made.values = template or text, values or {}
        return made

    def capitalised(self) -> Said:
        """The same with a capital letter in front, where its language has any."""
        return Said(self[:1].upper() + self[1:], self.template, self.values)

    def translated(self, lookup: Callable[[str], str | None]) -> str:
        """The text in the language of `lookup`, values that were said in it too; English where it knows no template."""
        template = lookup(self.template)
        if template is None:
            return str(self)
        values = {
            name: value.translated(lookup) if isinstance(value, Said) else value for name, value in self.values.items()
        }
        return template.format(**values)


def say(template: str, /, **values: object) -> Said:
    """`template` with `values` in the places of its `{name:spec}`, as `str.format` does it; objects are kept as their text."""
    held = {name: value if isinstance(value, str | Number) else str(value) for name, value in values.items()}
    return Said(template.format(**held), template, held)


def many(count: int, one: str, more: str, /, **values: object) -> Said:
    """`one` where `count` is 1, else `more`; both may hold `{count}`. Languages without a plural translate `more`."""
    values = {"count": count, **values}
    return Said((one if count == 1 else more).format(**values), more, values)


def listed(parts: Iterable[str]) -> Said:
    """`a, b, c`, with each language's own comma."""
    first, *rest = list(parts) or [""]
    joined = first if isinstance(first, Said) else say("{name}", name=first)
    for part in rest:
        joined = say("{before}, {last}", before=joined, last=part)
    return joined


def some(parts: Sequence[str], most: int = 5) -> Said:
    """`a, b, c …`: the first `most` of them, and whether there are more."""
    names = listed(parts[:most])
    return say("{names} …", names=names) if len(parts) > most else names


def follow(*sentences: str) -> Said:
    """Sentences one after another, with the space that each language puts between them; empty ones are left out."""
    first, *rest = [sentence for sentence in sentences if sentence] or [""]
    joined = first if isinstance(first, Said) else say("{name}", name=first)
    for sentence in rest:
        joined = say("{before} {sentence}", before=joined, sentence=sentence)
    return joined
