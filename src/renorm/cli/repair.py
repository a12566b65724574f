"""`renorm repair MODEL DATA --sources A,B -o OUT`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from renorm.cli.base import argument, option
from renorm.cli.subject import DATA, OnModel, notes
from renorm.errors import UsageError

if TYPE_CHECKING:
    from renorm.cli.screen import Screen
    from renorm.report.base import Report


@dataclass(frozen=True, kw_only=True)
class Repair(OnModel):
    """Give a rounded, pruned, averaged or merged model the moments that its sources have, layer by layer.

    The compressed weights come by --checkpoint, those it was made from by --sources; a few dozen unlabelled samples do.
    Where the data have labels, the error before and after is told. Exit code 0: written; 1: it did no better there, and
    nothing was written.
    """

    name: ClassVar[str] = "repair"
    example: ClassVar[str] = (
        "renorm repair nets.py:resnet20 photos/ --checkpoint merged.pt --sources a.pt,b.pt -o repaired.safetensors"
    )

    data: str = argument(f"{DATA}; no labels needed")
    sources: str = option(
        "", "weights that the model was made from, with commas between them", metavar="FILES", required=True
    )
    output: str = option(
        "", "the weights to write: .safetensors, .pt or .pth", short="-o", metavar="OUT", required=True
    )
    match: Literal["moments", "mean"] = option("moments", "mean and spread, or the mean alone")
    check: str = option("", "labelled data on which it must not do worse", metavar="DATA")

    def run(self, screen: Screen) -> Report:
        from renorm.checkpoints import writable, write
        from renorm.evaluate import evaluate
        from renorm.provenance import fingerprint, provenance
        from renorm.repair import repair_
        from renorm.report import repairing as page
        from renorm.report.base import Report

        target = writable(self.output, force=self.force)
        model = self.opened()
        files = [file.strip() for file in self.sources.split(",") if file.strip()]
        sources = [dataclasses.replace(self, checkpoint=file).opened() for file in files]
        dataset = self.dataset(self.data, model)
        check = self.dataset(self.check, model) if self.check else None
        if check is not None and check.labels is None:
            raise UsageError(
                f"--check compares errors, and {self.check} has no labels. Give labelled data, or leave it out."
            )
        origin, how = fingerprint(model.module), self.calling()
        before = evaluate(model.module, screen.watched(check.batches, "checking the model"), **how) if check else None
        repaired = repair_(
            model.module,
            [source.module for source in sources],
            screen.watched(dataset.batches, "repairing"),
            match=self.match,
            device=how["device"],
            channels_last=self.channels_last,
        )
        after = evaluate(model.module, screen.watched(check.batches, "checking the result"), **how) if check else None
        accepted = before is None or after is None or after.value >= before.value
        if accepted:
            loaded = model.checkpoint.sha256 if model.checkpoint else None
            made = provenance(
                command=self.written(),
                model=origin,
                data=dataset.fingerprint,
                checkpoint=loaded,
                sources=[source.checkpoint.sha256 for source in sources if source.checkpoint],
            )
            write(model.module, target, provenance=made, force=self.force)
        scores = None if before is None or after is None else (before, after)
        return Report(
            command=self.name,
            model=self.model,
            data=self.data,
            verdict=page.verdict(repaired, scores, accepted=accepted, output=self.output),
            blocks=page.blocks(repaired),
            result=page.result(repaired, scores) | {"output": self.output if accepted else None},
            notes=notes(model, *sources, dataset, check),
            origin=self.origin_of(model, dataset, fingerprinted=origin),
            exit_code=0 if accepted else 1,
        )
