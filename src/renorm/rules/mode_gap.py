"""BN301: good in train(), bad in eval()."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.rules.base import Facts, Finding, Rule
from renorm.said import say


@dataclass(frozen=True, kw_only=True)
class ModeGap(Rule):
    """Of the same samples, more than a share get another answer when batch norms normalise by the batch, as in training.

    What the noise of a batch changes is taken off: the answers that change when half a batch normalises in place of all.
    Dropout stays off in both. With labels only a model that answers better in training mode is at fault, by that share.
    """

    id: ClassVar[str] = "BN301"
    title: ClassVar[str] = say("training and evaluation disagree")
    needs: ClassVar[tuple[str, ...]] = ("gap", "broken", "new")
    wants: ClassVar[tuple[str, ...]] = ("suspect",)

    # Shares of samples, beyond the noise, in batches of 16 to 64. On data of their own kind ResNet-20, ResNet-8 and MobileNet
    # lie at -0.06 to 0.13, networks with random weights and the statistics of noise at -0.13 to 0.15; under noise, blur,
    # contrast and fog at 0.13 to 0.77. With labels they are right more often by 0.04 at the most.
    changed: float = 0.2
    changed_error: float = 0.4
    better: float = 0.1

    def check(self, facts: Facts) -> Iterator[Finding]:
        gap = facts.gap
        # statistics that were never estimated, or are none, say so themselves (BN104, BN105, BN108)
        if gap is None or facts.broken or facts.new:
            return
        labelled = gap.better is not None
        if facts.source is not None and not labelled:
            return  # the profile knows how far the source's own data lie from these statistics; BN302 asks it
        value, limit = (gap.better, self.better) if gap.better is not None else (gap.changed - gap.noise, self.changed)
        if value <= limit:
            return
        yield Finding(
            rule=self.id,
            site=max(facts.distances, key=lambda name: facts.distances[name], default=""),
            severity="error" if labelled or value > self.changed_error else "warning",
            value=value,
            unit=say("of the samples, more are right in training mode")
            if labelled
            else say("of the answers change, beyond the noise of a batch"),
            limit=limit,
            message=say(
                "Normalised by the batch, as in training, the model answers differently than by the statistics it holds: "
                "good in train(), bad in eval() has its cause here."
            ),
            advice=say("Correct the inputs first (see BN303 and BN313), and ask the doctor again.")
            if facts.spoilt
            else say(
                "Recalibrate: renorm recalibrate MODEL DATA --check DATA -o OUT. Do not ship a model in training mode."
            ),
            fix_=None if facts.spoilt else facts.recalibrate,
        )
