"""`renorm doctor MODEL [DATA]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from renorm.cli.base import argument, option
from renorm.cli.subject import DATA, OnModel, notes

if TYPE_CHECKING:
    from renorm.cli.screen import Screen
    from renorm.report.base import Report


@dataclass(frozen=True, kw_only=True)
class Doctor(OnModel):
    """Say what is wrong with a model's norm layers, and on this data: worst first.

    Without DATA the model alone is looked at. Exit code 0: healthy; 1: errors or warnings were found. Nothing is changed.
    """

    name: ClassVar[str] = "doctor"
    example: ClassVar[str] = "renorm doctor nets.py:resnet20 --checkpoint resnet20.safetensors photos/"

    data: str = argument(f"{DATA}; no labels needed", required=False)
    source: str = option("", "a profile of the source, made by renorm profile", metavar="FILE")
    top: int = option(10, "how many batch norms to list")

    def run(self, screen: Screen) -> Report:
        from renorm.doctor import diagnose
        from renorm.profile import Profile
        from renorm.report import diagnosis as page
        from renorm.report.base import Report

        model = self.opened()
        dataset = self.dataset(self.data, model) if self.data else None
        diagnosis = diagnose(
            model.module,
            screen.watched(dataset.batches, "looking") if dataset else None,
            Profile.load(self.source) if self.source else None,
            **self.calling(),
        )
        return Report(
            command=self.name,
            model=self.model,
            data=self.data,
            verdict=page.verdict(diagnosis),
            blocks=page.blocks(diagnosis, rows=self.top),
            result=page.result(diagnosis),
            notes=notes(model, dataset),
            origin=self.origin_of(model, dataset),
            exit_code=0 if diagnosis.healthy else 1,
        )
