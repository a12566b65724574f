"""BN110: statistics in 16 bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from renorm.mend import at_sites, widen_
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import say


@dataclass(frozen=True, kw_only=True)
class HalfPrecision(Rule):
    """Running statistics in 16 bits stop moving before they arrive: bfloat16 has steps of 1/256."""

    id: ClassVar[str] = "BN110"
    title: ClassVar[str] = say("statistics in half precision")
    needs: ClassVar[tuple[str, ...]] = ("batch",)

    stall: float = (
        0.05  # momentum below which bfloat16 stalls far off: at 0.01 a true mean of 5.0 is left at 3.34 (measured)
    )

    def check(self, facts: Facts) -> Iterator[Finding]:
        for site in facts.batch:
            if site.tensors is None or site.tensors[1].dtype not in (torch.float16, torch.bfloat16):
                continue
            moves = site.module.training and site.tracks
            yield Finding(
                rule=self.id,
                site=site.name,
                severity="error" if moves and (site.momentum or 0.0) < self.stall else "warning",
                value=16.0,
                unit=say("bits in the statistics"),
                limit=0.0,
                message=say(
                    "The statistics are kept in 16 bits: small variances become 0, and training stops moving them before "
                    "they arrive."
                ),
                advice=say("Keep batch norms in float32 and let autocast lower the rest."),
                fix_=at_sites([site.name], widen_, label="widening to float32"),
            )
