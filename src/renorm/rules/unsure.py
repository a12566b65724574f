"""BN311: too few images for what was measured to be sure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.rules.base import Facts, Finding, Rule
from renorm.said import say


@dataclass(frozen=True, kw_only=True)
class Unsure(Rule):
    """The standard error of a site's mean, with images as the independent samples, exceeds a limit."""

    id: ClassVar[str] = "BN311"
    title: ClassVar[str] = say("too few images to be sure")
    needs: ClassVar[tuple[str, ...]] = ("observed",)

    # Source standard deviations, mean over channels, at the worst site. ResNet-20, ResNet-8 and MobileNet: 0.10 to 0.20 with
    # 12 images, 0.06 to 0.12 with 25, 0.04 to 0.08 with 50, 0.02 to 0.04 with 200.
    limit: float = 0.2

    def check(self, facts: Facts) -> Iterator[Finding]:
        errors = {}
        for site in facts.batch:
            if site.name in facts.observed and site.name in facts.held and site.name not in facts.broken | facts.new:
                seen = facts.observed[site.name]
                error = seen.standard_error(facts.held[site.name].var + site.eps).clamp_max(1).mean()
                errors[site.name] = float(error)
        worst = max(errors, key=lambda name: errors[name], default=None)
        if worst is not None and errors[worst] > self.limit:
            yield Finding(
                rule=self.id,
                site=worst,
                severity="info",
                value=errors[worst],
                unit=say("source sd, the standard error of the mean"),
                limit=self.limit,
                message=say("So few images were read that what was measured may be chance."),
                advice=say("Read more: the error halves with four times the images."),
            )
