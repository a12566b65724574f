"""BN313: columns of a table do not hold what they held when the model was trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.rules.base import Facts, Finding, Rule
from renorm.said import say


@dataclass(frozen=True, kw_only=True)
class WrongColumns(Rule):
    """Columns are in another unit, in each other's place, or hold one value; see `units` for how that is judged.

    Statistics estimated on them would hide the mistake: where one is named, recalibration is not offered.
    """

    id: ClassVar[str] = "BN313"
    title: ClassVar[str] = say("wrong columns")
    needs: ClassVar[tuple[str, ...]] = ("mistakes",)
    explains: ClassVar[tuple[str, ...]] = ("BN301", "BN302")

    def check(self, facts: Facts) -> Iterator[Finding]:
        for mistake in facts.mistakes:
            constant = mistake.kind == "constant"
            yield Finding(
                rule=self.id,
                site=next(iter(facts.distances), ""),
                severity="error" if mistake.sure else "warning",
                value=mistake.before,
                unit=say("columns") if constant else say("widths that the column lies off"),
                limit=mistake.limit,
                message=say("Columns do not hold what they held in training: {what}.", what=mistake.said),
                advice=ADVICE[mistake.kind],
            )


ADVICE = {
    "unit": say("Correct the unit and ask the doctor again; do not recalibrate, it would hide the mistake."),
    "swapped": say("Name the columns right and ask the doctor again; do not recalibrate, it would hide the mistake."),
    "elsewhere": say("Look at what was written into it, before anything is adapted to it."),
    "constant": say("Look whether a sensor is dead or a default was filled in, before anything is adapted to it."),
}
