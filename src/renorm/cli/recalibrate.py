"""`renorm recalibrate MODEL DATA -o OUT`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from renorm.cli.base import argument, option
from renorm.cli.subject import DATA, OnModel, notes, recorded
from renorm.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from renorm.cli.screen import Screen
    from renorm.evaluate import Score
    from renorm.report.base import Report


@dataclass(frozen=True, kw_only=True)
class Recalibrate(OnModel):
    """Fit the statistics of a model's batch norms to new data: no labels, no gradients.

    With --check the change is kept only if the model does not do worse there, by accuracy where the data have labels, by
    the model's own confidence where they have none. Exit code 0: written; 1: it did not hold up, nothing was written.
    """

    name: ClassVar[str] = "recalibrate"
    example: ClassVar[str] = (
        "renorm recalibrate nets.py:resnet20 --checkpoint resnet20.safetensors photos/ -o new.safetensors"
    )

    data: str = argument(f"{DATA}; no labels needed (none at all with --moments)", required=False)
    output: str = option(
        "", "the weights to write: .safetensors, .pt or .pth", short="-o", metavar="OUT", required=True
    )
    prior: int | Literal["auto"] = option("auto", "how many images the old statistics count as; 0 forgets them")
    tolerance: float | None = option(
        None, "stop reading once this certain (standard error in source sd; 0.05: ~200 images)"
    )
    moments: str = option("", "moments in place of data, made by renorm observe or merge", metavar="FILE")
    check: str = option("", "data on which it must not do worse, labelled or not", metavar="DATA")
    source: str = option("", "a profile of the source, made by renorm profile", metavar="FILE")
    method: str = option("auto", "pooled, equal_mix …; its own options: --options.NAME", metavar="NAME")
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.data) == bool(self.moments):
            found = "both were given" if self.data else "neither was given"
            raise UsageError(
                f"renorm recalibrate needs DATA or --moments FILE; {found}. For example:\n  {self.example}\n"
                "renorm recalibrate --help lists everything."
            )

    def run(self, screen: Screen) -> Report:
        from renorm.checkpoints import writable, write
        from renorm.observation import Observation
        from renorm.provenance import fingerprint, provenance
        from renorm.recalibrate import recalibrate_
        from renorm.report import adaptation as page
        from renorm.report.base import Report

        target = writable(self.output, force=self.force)
        model = self.opened()
        dataset = self.dataset(self.data, model) if self.data else None
        measured = Observation.load(self.moments) if self.moments else None
        check = self.dataset(self.check, model) if self.check else None
        labelled = check is not None and check.labels is not None
        before, origin = None, fingerprint(model.module)
        if check is not None and labelled:
            before = self._score(model.module, screen.watched(check.batches, "checking the source"))
        batches = screen.watched(dataset.batches, "recalibrating") if dataset else ()
        adaptation = recalibrate_(
            model.module,
            batches if measured is None else measured,
            check=screen.watched(check.batches, "checking") if check else None,
            **self._how(),
        )
        after = None
        if check is not None and labelled and adaptation.accepted:
            after = self._score(model.module, screen.watched(check.batches, "checking the result"))
        if adaptation.accepted:
            loaded = model.checkpoint.sha256 if model.checkpoint else None
            data = dataset.fingerprint if dataset else None
            more = {"moments": measured.parts} if measured else {}
            more |= recorded(model, dataset)
            made = provenance(command=self.written(), model=origin, data=data, checkpoint=loaded, **more)
            write(model.module, target, provenance=made, force=self.force)
        return Report(
            command=self.name,
            model=self.model,
            data=self.data or self.moments,
            verdict=page.verdict(adaptation, output=self.output),
            blocks=page.blocks(adaptation, before=before, after=after),
            result=page.result(adaptation, before=before, after=after)
            | {"output": self.output if adaptation.accepted else None},
            notes=(*adaptation.notes, *notes(model, dataset, check)),
            origin=self.origin_of(model, dataset, fingerprinted=origin),
            exit_code=0 if adaptation.accepted else 1,
        )

    def _how(self) -> dict[str, Any]:
        return {
            "prior": self.prior,
            "tolerance": self.tolerance,
            "source": self.source or None,
            "method": self.method,
            "options": self.options,
            **self.calling(),
        }

    def _score(self, model: nn.Module, batches: Any) -> Score:
        from renorm.evaluate import evaluate

        return evaluate(model, batches, **self.calling())
