"""BN407: SyncBatchNorm where it cannot work, or does nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from renorm.mend import calling_children, converting
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say
from renorm.sites import has_idle_children


@dataclass(frozen=True, kw_only=True)
class SyncMisuse(Rule):
    """SyncBatchNorm on a CPU fails in training once a process group stands; with a single process it synchronises nothing.

    Converters that know torch's class alone drop the activation of a NormAct layer: they leave it as a child that the new
    layer never calls, and that is an error.
    """

    id: ClassVar[str] = "BN407"
    title: ClassVar[str] = say("SyncBatchNorm that cannot sync")
    needs: ClassVar[tuple[str, ...]] = ("batch",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        sync = [site for site in facts.batch if site.synchronises and site.tensors is not None]
        if not sync:
            return
        names = [site.name for site in sync]
        lost = [site.name for site in sync if has_idle_children(site)]
        if lost:
            yield self._activations(lost)
        grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
        ranks = torch.distributed.get_world_size() if grouped else 1
        on_cpu = any(tensor.device.type == "cpu" for site in sync for tensor in site.tensors or ())
        if grouped and on_cpu and any(site.module.training for site in sync):
            yield Finding(
                rule=self.id,
                site=names[0],
                severity="error",
                value=float(len(names)),
                unit=many(len(names), "SyncBatchNorm layer on a CPU", "SyncBatchNorm layers on a CPU"),
                limit=0.0,
                message=say(
                    "SyncBatchNorm cannot train on a CPU once a process group stands: the first forward raises."
                ),
                advice=say("Convert back (renorm.convert_(model, 'batch')), or move the model to a GPU first."),
                fix_=converting(names, "batch"),
            )
        elif ranks == 1 and any(site.module.training for site in sync):
            yield Finding(
                rule=self.id,
                site=names[0],
                severity="info",
                value=float(len(names)),
                unit=many(len(names), "SyncBatchNorm layer with one rank", "SyncBatchNorm layers with one rank"),
                limit=0.0,
                message=say(
                    "There is one process, so these layers synchronise nothing: they are plain batch norms here."
                ),
                advice=say("Start the training with several processes, or leave the layers as they were built."),
            )

    def _activations(self, lost: list[str]) -> Finding:
        return Finding(
            rule=self.id,
            site=lost[0],
            severity="error",
            value=float(len(lost)),
            unit=many(
                len(lost),
                "SyncBatchNorm layer whose activation is never called",
                "SyncBatchNorm layers whose activation is never called",
            ),
            limit=0.0,
            message=say(
                "The conversion to SyncBatchNorm lost the activations that the norm layers held: they hang below the new "
                "layers, which never call them."
            ),
            advice=say(
                "Convert the original model with the library that made it (timm.layers.convert_sync_batchnorm), or let the "
                "layers call them again (the doctor's fix)."
            ),
            fix_=calling_children(lost),
        )
