"""What a rule is: it reads facts, each measured at most once and only when asked for, and yields findings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import islice
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from renorm.calls import Caller
from renorm.family import members
from renorm.moments import Moments
from renorm.observation import Observation
from renorm.observe import observe
from renorm.shift import Shift
from renorm.sites import Site, find_sites

if TYPE_CHECKING:
    from renorm.profile import Profile

__all__ = ["PASSES", "SEVERITIES", "Facts", "Finding", "Rule", "Severity", "catalogue"]

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")

# What a fact costs in passes over the batches; the doctor runs the rules that need the cheapest facts first.
PASSES: Mapping[str, int] = {"batch": 0, "held": 0, "new": 0, "observed": 1, "shifts": 1, "distances": 1}


@dataclass(frozen=True)
class Facts:
    """What can be known about a model, and about batches if there are any; asking for a fact measures it, once.

    The model is the same, bit for bit, after any of them.
    """

    model: nn.Module
    batches: Iterable[Any] | None = None
    source: Profile | None = None
    caller: Caller = field(default_factory=Caller)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every norm layer, of any kind."""
        return tuple(find_sites(self.model))

    @cached_property
    def batch(self) -> tuple[Site, ...]:
        """The batch norm sites."""
        return tuple(site for site in self.sites if site.kind == "batch")

    @cached_property
    def held(self) -> dict[str, Moments]:
        """The statistics that each batch norm site holds, by name; sites without any are left out."""
        found = {site.name: site.statistics() for site in self.batch}
        return {name: moments for name, moments in found.items() if moments is not None}

    @cached_property
    def new(self) -> frozenset[str]:
        """The sites whose statistics are those that every layer is created with: mean 0 and variance 1 throughout."""
        return frozenset(
            name
            for name, held in self.held.items()
            if held.mean.numel() and bool((held.mean == 0).all() and (held.var == 1).all())
        )

    @cached_property
    def observed(self) -> Observation:
        """What one pass over the batches sends into each site while the model runs as it would in use.

        Without a batch norm layer, the first batch only: it shows whether batch norm is called as a function.
        """
        batches = self.batches if self.batches is not None else ()
        asked = batches if self.batch else islice(batches, 1)
        return observe(self.model, asked, under="running", **vars(self.caller))

    @cached_property
    def shifts(self) -> dict[str, Shift]:
        """How far the batches lie from the held statistics, for every site that they reached."""
        eps = {site.name: site.eps for site in self.batch}
        return {
            name: Shift.between(self.held[name], seen.values, eps=eps[name])
            for name, seen in self.observed.items()
            if name in self.held
        }

    @cached_property
    def distances(self) -> dict[str, float]:
        """Each site's shift in one number: 2-Wasserstein in source sd, less what sampling alone adds, mean over channels.

        A channel's squared distance is too large by the squared standard errors of its mean and of its sd, which for
        images is about twice that of the mean alone. A site whose statistics are no numbers, or were never estimated, has
        no distance: there is nothing to be far from.
        """
        eps = {site.name: site.eps for site in self.batch}
        found = {}
        for name, shift in self.shifts.items():
            if name in self.new:
                continue
            error = self.observed[name].standard_error(self.held[name].var + eps[name])
            squared = shift.wasserstein2.square() - 2 * error.square().to(shift.wasserstein2.device)
            found[name] = float(squared.clamp_min(0).sqrt().mean())
        return {name: distance for name, distance in found.items() if isfinite(distance)}

    def has(self, fact: str) -> bool:
        """Whether `fact` can be measured with what was given."""
        return PASSES[fact] == 0 or self.batches is not None


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong at one site, in words first: `message` says what is wrong, `advice` what to do.

    `value` was measured and lies beyond `limit`, both in `unit`. `fix_`, where there is one, mends a model in place and
    returns the undo.
    """

    rule: str
    site: str
    severity: Severity
    value: float
    unit: str
    limit: float
    message: str
    advice: str
    fix_: Callable[[nn.Module], Any] | None = None

    @property
    def weight(self) -> tuple[int, float]:
        """Sorts findings worst first: by severity, then by how many times the limit was exceeded."""
        return SEVERITIES.index(self.severity), -self.value / self.limit if self.limit > 0 else -self.value


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """A question with a limit. Limits are fields of the rule, in a unit, with the measurement that set them beside it."""

    id: ClassVar[str]
    title: ClassVar[str]  # a few plain words, for a list
    needs: ClassVar[tuple[str, ...]]

    @abstractmethod
    def check(self, facts: Facts) -> Iterator[Finding]:
        """The findings of this rule; called only when every fact that it `needs` can be measured."""

    @classmethod
    def passes(cls) -> int:
        """What the rule costs in passes over the batches when it is the only one."""
        return max((PASSES[fact] for fact in cls.needs), default=0)


@cache
def catalogue() -> dict[str, type[Rule]]:
    """Every rule in this folder, by its id."""
    return members(__package__ or "renorm.rules", Rule, key="id")
