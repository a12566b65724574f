"""`renorm recommend MODEL DATA`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from renorm.cli.base import argument, option
from renorm.cli.subject import DATA, OnModel, notes

if TYPE_CHECKING:
    from renorm.cli.screen import Screen
    from renorm.datasets.base import Dataset
    from renorm.models import Model
    from renorm.recommend import Plan
    from renorm.report.base import Report


@dataclass(frozen=True, kw_only=True)
class OnTarget(OnModel):
    """A command that tries ways to make a model fit data."""

    data: str = argument(f"{DATA}; its labels decide where there are any")
    source: str = option("", "a profile of the source, made by renorm profile", metavar="FILE")
    budget: float = option(60.0, "seconds for trying; leaving the model and recalibrating are always tried")

    def plan(self, screen: Screen, model: Model, dataset: Dataset) -> Plan:
        """The plan for `model` on `dataset`."""
        from renorm.profile import Profile
        from renorm.recommend import recommend

        calling = {key: value for key, value in self.calling().items() if key != "channels_last"}
        return recommend(
            model.module,
            screen.watched(dataset.batches, "reading"),
            budget=self.budget,
            source=Profile.load(self.source) if self.source else None,
            **calling,
        )


@dataclass(frozen=True, kw_only=True)
class Recommend(OnTarget):
    """Try ways to make a model fit data, on one half and judged on the other, and rank them; nothing is changed.

    Labels of the data decide where it has any. To do what is recommended: renorm auto.
    """

    name: ClassVar[str] = "recommend"
    example: ClassVar[str] = "renorm recommend nets.py:resnet20 --checkpoint resnet20.safetensors photos/"

    def run(self, screen: Screen) -> Report:
        from renorm.cite import cite
        from renorm.report import plan as page
        from renorm.report.base import Report

        model = self.opened()
        dataset = self.dataset(self.data, model)
        plan = self.plan(screen, model, dataset)
        return Report(
            command=self.name,
            model=self.model,
            data=self.data,
            verdict=page.verdict(plan),
            blocks=page.blocks(plan),
            result=page.result(plan) | {"cite": cite(plan)},
            notes=notes(model, dataset),
            origin=self.origin_of(model, dataset),
        )
