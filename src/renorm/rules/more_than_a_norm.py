"""BN112: batch norms that do more than normalise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say


@dataclass(frozen=True, kw_only=True)
class MoreThanANorm(Rule):
    """A batch norm with modules inside (a NormAct) loses them in converters that know torch's class alone.

    The layer itself is sound: this is information, a warning where a process group stands and conversion is near.
    """

    id: ClassVar[str] = "BN112"
    title: ClassVar[str] = say("batch norm with an activation inside")
    needs: ClassVar[tuple[str, ...]] = ("batch",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        several = [
            site
            for site in facts.batch
            if any(not isinstance(child, nn.Identity) for child in site.module.children())
            and "running_mean" in site.module._buffers
        ]
        if several:
            grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
            yield Finding(
                rule=self.id,
                site=several[0].name,
                severity="warning" if grouped and torch.distributed.get_world_size() > 1 else "info",
                value=float(len(several)),
                unit=many(len(several), "layer with modules of its own", "layers with modules of their own"),
                limit=0.0,
                message=say(
                    "These batch norms hold an activation or more: converters that know torch's class alone, "
                    "convert_sync_batchnorm among them, drop it without a word."
                ),
                advice=say(
                    "Convert with the library that made them (timm.layers.convert_sync_batchnorm), and compare outputs "
                    "with renorm.verify."
                ),
            )
