"""`renorm advise MODEL DATA`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from renorm.cli.base import argument, option
from renorm.cli.subject import DATA, OnModel, notes

if TYPE_CHECKING:
    from renorm.cli.screen import Screen
    from renorm.report.base import Report


@dataclass(frozen=True, kw_only=True)
class Advise(OnModel):
    """Say which batch norm and which settings fit a model, data and machine: each from a measured number.

    Kind of batch norm, batch size, momentum, how many images, eps, precision, when to leave batch norm, and which way of
    running the model is fastest here, timed within --budget seconds.
    """

    name: ClassVar[str] = "advise"
    example: ClassVar[str] = "renorm advise nets.py:resnet20 --checkpoint resnet20.safetensors photos/ --batch-size 8"

    data: str = argument(f"{DATA}; no labels needed")
    devices: int = option(1, "how many devices train together")
    budget: float = option(10.0, "seconds for timing ways to run the model; from 60 on it is compiled too, 0: none")

    def run(self, screen: Screen) -> Report:
        from renorm.advise import advise
        from renorm.report import advice as page
        from renorm.report.base import Report

        model = self.opened()
        dataset = self.dataset(self.data, model)
        calling = {key: value for key, value in self.calling().items() if key != "channels_last"}
        advice = advise(
            model.module,
            screen.watched(dataset.batches, "measuring"),
            batch_size=self.batch_size,
            devices=self.devices,
            budget=self.budget,
            **calling,
        )
        return Report(
            command=self.name,
            model=self.model,
            data=self.data,
            verdict=page.verdict(advice),
            blocks=page.blocks(advice),
            result=page.result(advice),
            notes=notes(model, dataset),
            origin=self.origin_of(model, dataset),
        )
