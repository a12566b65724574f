"""`renorm observe MODEL DATA -o FILE`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from renorm.cli.base import argument, option
from renorm.cli.subject import DATA, OnModel, notes

if TYPE_CHECKING:
    from renorm.cli.screen import Screen
    from renorm.report.base import Report


@dataclass(frozen=True, kw_only=True)
class Observe(OnModel):
    """Measure what data send into a model's batch norms, and write the moments to a file that holds no data.

    Sites that may not share their images each make such a file; renorm merge pools them, and renorm recalibrate MODEL
    --moments FILE uses the result. The model is not changed.
    """

    name: ClassVar[str] = "observe"
    example: ClassVar[str] = (
        "renorm observe nets.py:resnet20 --checkpoint resnet20.safetensors photos/ -o site-a.moments"
    )

    data: str = argument(f"{DATA}; no labels needed")
    output: str = option("", "the moments to write", short="-o", metavar="FILE", required=True)
    under: Literal["batch", "running"] = option(
        "batch", "batch: what recalibration needs; running: what the model as it is sees"
    )

    def run(self, screen: Screen) -> Report:
        from renorm.files import refuse_existing
        from renorm.observe import observe
        from renorm.report import moments as page
        from renorm.report.base import Report
        from renorm.sites import batch_sites

        target = refuse_existing(self.output, force=self.force)
        model = self.opened()
        batch_sites(model.module, asked="observe")
        dataset = self.dataset(self.data, model)
        batches = screen.watched(dataset.batches, "observing")
        seen = observe(model.module, batches, under=self.under, **self.calling())
        seen.save(
            target,
            model.module,
            command=self.written(),
            data=dataset.fingerprint,
            checkpoint=model.checkpoint.sha256 if model.checkpoint else None,
            force=self.force,
        )
        return Report(
            command=self.name,
            model=self.model,
            data=self.data,
            verdict=page.verdict(seen, output=self.output),
            blocks=(),
            result=page.result(seen) | {"output": self.output},
            notes=notes(model, dataset),
        )
