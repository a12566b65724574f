"""BN306: several domains in one set of batches, or in one calibration set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.mixture import Mixture
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import say


@dataclass(frozen=True, kw_only=True)
class Mixed(Rule):
    """The samples fall into two groups with moments of their own, or known domains have: one set of statistics fits neither.

    Groups are looked for among the means of single images, 96 to 256 of them, at layers of the first half (later ones part
    the classes); domains are known by `diagnose(domains=…)`. No fix: a model with statistics for each domain must be told which
    sample is of which, and only its caller can.
    """

    id: ClassVar[str] = "BN306"
    title: ClassVar[str] = say("mixed domains")
    needs: ClassVar[tuple[str, ...]] = ("mixtures",)

    # Widths of a group, with 96 to 256 images. ResNet-20, ResNet-8 and MobileNet on their own images, of all classes or of one
    # or two: at most 3.6 in the first half of the layers. Half of the images under noise: 5.1 to 7.7, contrast 4.6 to 5.2.
    limit: float = 3.8
    # Sd from the moments of all: the nearer group must lie so far off, and have a tenth of the samples.
    moved: float = 0.1
    share: float = 0.1
    # Sd from the moments of all, of a known domain: what counts as a data shift (BN302).
    known: float = 0.3

    def check(self, facts: Facts) -> Iterator[Finding]:
        found = {name: m for name, m in facts.mixtures.items() if self._counts(m)}
        worst = max(found, key=lambda name: found[name].apart or found[name].moved, default=None)
        if worst is None:
            return
        mixture = found[worst]
        named = mixture.apart is None
        yield Finding(
            rule=self.id,
            site=worst,
            severity="warning",
            value=mixture.moved if mixture.apart is None else mixture.apart,
            unit=say("sd from the moments of all domains") if named else say("widths between two groups of samples"),
            limit=self.known if named else self.limit,
            message=say(
                "The domain {domain} has moments of its own, far from those of all together: one mean and one spread fit no "
                "domain well.",
                domain=mixture.domain,
            )
            if named
            else say(
                "The samples fall into two groups ({share:.0%} in the smaller), each with moments of its own: two domains, "
                "cameras or ways of preprocessing are mixed, and one mean and one spread fit neither.",
                share=mixture.share,
            ),
            advice=say(
                "Recalibrate for each domain by itself, or give each its own statistics: "
                'renorm.convert_(model, to="per_domain", domains=…), and tell the model the domain of each sample.'
            ),
        )

    def _counts(self, mixture: Mixture) -> bool:
        if mixture.apart is None:
            return mixture.moved > self.known
        return mixture.apart > self.limit and mixture.moved > self.moved and mixture.share >= self.share
