"""What a rule is: a question with limits, which reads facts and yields findings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

from renorm.costs import PASSES, price
from renorm.facts import Facts
from renorm.family import members
from renorm.mend import Fix

__all__ = ["PASSES", "SEVERITIES", "Facts", "Finding", "Rule", "Severity", "catalogue", "worst_first"]

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong at one site, in words first: `message` says what is wrong, `advice` what to do.

    `value` was measured and lies beyond `limit`, both in `unit`. `fix_`, where there is one, mends a model in place (this
    one, or another with the same sites) and returns the undo; findings that are mended together share it.
    """

    rule: str
    site: str
    severity: Severity
    value: float
    unit: str
    limit: float
    message: str
    advice: str
    fix_: Fix | None = None

    def __str__(self) -> str:
        return (
            f"{self.rule} {self.severity} at {self.site or 'the model itself'}: {self.message} {self.advice} "
            f"({self.value:.3g} {self.unit}, limit {self.limit:.3g})"
        )

    @property
    def weight(self) -> tuple[int, float]:
        """Sorts findings worst first: by severity, then by how many times the limit was exceeded."""
        return SEVERITIES.index(self.severity), -self.value / self.limit if self.limit > 0 else -self.value


def worst_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """By severity, then by how many times the limit was exceeded; of one severity, a cause stands before what it explains."""
    found = list(findings)
    rules = catalogue()

    def place(finding: Finding) -> tuple[int, float, bool, float]:
        explained = rules[finding.rule].explains if finding.rule in rules else ()
        severity, own = finding.weight
        caused = [f.weight[1] for f in found if f.rule in explained and f.severity == finding.severity]
        return severity, min([own, *caused]), not caused, own

    return tuple(sorted(found, key=place))


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """A question with a limit. Limits are fields of the rule, in a unit, with the measurement that set them beside it."""

    id: ClassVar[str]
    title: ClassVar[str]  # a few plain words, for a list
    needs: ClassVar[tuple[str, ...]]
    wants: ClassVar[tuple[str, ...]] = ()  # facts that it asks for where they can be had
    explains: ClassVar[tuple[str, ...]] = ()  # rules that would find nothing, or less, without what this one found

    @abstractmethod
    def check(self, facts: Facts) -> Iterator[Finding]:
        """The findings of this rule; called only when every fact that it `needs` can be measured."""

    @classmethod
    def passes(cls) -> int:
        """What the rule may cost in passes over the batches when it is the only one, without what it only wants."""
        return price(cls.needs)


@cache
def catalogue() -> dict[str, type[Rule]]:
    """Every rule in this folder, by its id."""
    return members(__package__ or "renorm.rules", Rule, key="id")
