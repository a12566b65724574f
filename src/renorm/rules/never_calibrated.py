"""BN105: statistics that still have the values they were created with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.initial import was_trained
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say
from renorm.sites import Site


@dataclass(frozen=True, kw_only=True)
class NeverCalibrated(Rule):
    """Mean 0 and variance 1 in every channel, beside trained weights, mean that a checkpoint came without its buffers.

    Where nothing in the model was ever trained, that is said once, for information.
    """

    id: ClassVar[str] = "BN105"
    title: ClassVar[str] = say("statistics never estimated")
    needs: ClassVar[tuple[str, ...]] = ("held", "new")

    def check(self, facts: Facts) -> Iterator[Finding]:
        sites = [site for site in facts.batch if site.name in facts.held]
        new = [site for site in sites if site.name in facts.new]
        if new and len(new) == len(sites) and not any(map(was_trained, sites)):
            yield self._untrained(new)
            return
        for site in new:
            yield self._lost(facts, site)

    def _untrained(self, new: list[Site]) -> Finding:
        return Finding(
            rule=self.id,
            site=new[0].name,
            severity="info",
            value=float(len(new)),
            unit=many(len(new), "layer at its initial values", "layers at their initial values"),
            limit=0.0,
            message=say(
                "Every batch norm still has the values it was created with: this model was never trained, or no "
                "checkpoint was loaded."
            ),
            advice=say("Load trained weights (--checkpoint FILE)."),
        )

    def _lost(self, facts: Facts, site: Site) -> Finding:
        trained = was_trained(site)
        return Finding(
            rule=self.id,
            site=site.name,
            severity="error" if trained else "warning",
            value=1.0,
            unit=many(1, "layer at its initial values", "layers at their initial values"),
            limit=0.0,
            message=say(
                "The statistics still have their initial values (mean 0, variance 1) {though}: the checkpoint was saved or "
                "loaded without buffers, or training never reached this layer.",
                though=say("though the layer's weights were trained")
                if trained
                else say("though other layers have theirs"),
            ),
            advice=say("Load a checkpoint with running_mean and running_var, or estimate them with recalibrate."),
            fix_=facts.reestimate,
        )
