"""The interface of every label-free method, and the catalogue that finds them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from torch import nn

from renorm.calls import Caller
from renorm.errors import UsageError
from renorm.family import built, members
from renorm.moments import Moments
from renorm.observation import Observation
from renorm.profile import Profile
from renorm.sites import Site


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a method would have a model's norm layers hold.

    moments   {site: the moments to hold}, for the sites that the batches reached
    target    what was measured on the target, as far as the method measures it: {site: moments before any blending}
    unblended what to judge by where there are no labels, since a share of the source makes a model less sure; None: `moments`
    weights   {site: the share of the source in `moments`}, the mean over channels, in [0, 1]
    samples   how many samples were read, each counted once
    passes    how often the batches were read
    notes     what the user should know: a limit reached, something that did not converge
    """

    moments: Mapping[str, Moments]
    target: Mapping[str, Moments]
    weights: Mapping[str, float]
    samples: int
    batches: int
    unvisited: tuple[str, ...]
    unblended: Mapping[str, Moments] | None = None
    passes: int = 1
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to find better statistics for a model on unlabelled target batches.

    A subclass is one file in this folder: a frozen dataclass whose fields are its options, checked in `__post_init__`, with
    a `name` for the command line and `cites`, the BibTeX of its paper. It is then in the catalogue, and by that in
    `recalibrate_(method=name)`, `renorm recalibrate --method name`, the docs' table and the contract tests.
    """

    name: ClassVar[str]
    cites: ClassVar[str] = ""

    @abstractmethod
    def estimate(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        sites: list[Site],
        caller: Caller,
        source: Profile | None = None,
    ) -> Estimate:
        """Measure and decide; `model` comes out as it went in, bit for bit, also when this fails."""

    def estimate_from(self, seen: Observation, *, sites: list[Site], source: Profile | None = None) -> Estimate:
        """Decide from moments that were measured before, where the method needs no more than those.

        Raises UsageError where it needs the batches themselves.
        """
        raise UsageError(
            f"the method {self.name!r} needs the batches themselves and was given moments; "
            "use method='pooled', or give the batches."
        )


@cache
def catalogue() -> dict[str, type[Method]]:
    """Every method in this folder, by its name."""
    return members("renorm.methods", Method)


def build(name: str, options: Mapping[str, Any]) -> Method:
    """The method called `name` with `options` for its fields.

    Raises UnknownName for a name that is not in the catalogue or an option that the method does not have.
    """
    return built("method", name, options, catalogue())
