"""`renorm evaluate MODEL DATA`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from renorm.cli.base import argument, option
from renorm.cli.subject import DATA, OnModel, notes

if TYPE_CHECKING:
    from renorm.cli.screen import Screen
    from renorm.report.base import Report


@dataclass(frozen=True, kw_only=True)
class Evaluate(OnModel):
    """Measure how good a model is on labelled data, with the interval that says how far to believe it.

    With --group COLUMN every hospital, camera or patient of that column is measured too, worst first.
    """

    name: ClassVar[str] = "evaluate"
    example: ClassVar[str] = "renorm evaluate nets.py:resnet20 --checkpoint resnet20.safetensors photos/ --metric top5"

    tells: ClassVar[bool] = True

    data: str = argument(f"{DATA}; with labels")
    metric: str = option(
        "accuracy", "accuracy, balanced_accuracy, top5, f1, auroc, nll, ece, mse or mae", metavar="NAME"
    )

    def run(self, screen: Screen) -> Report:
        from renorm.errors import UnknownName
        from renorm.evaluate import METRICS, evaluate
        from renorm.report import score as page
        from renorm.report.base import Report

        if self.metric not in METRICS:  # said before anything large is opened
            raise UnknownName("metric", self.metric, METRICS)
        model = self.opened()
        dataset = self.dataset(self.data, model)
        batches = screen.watched(dataset.batches, "evaluating")
        score = evaluate(model.module, batches, self.metric, groups=dataset.groups, **self.calling())
        return Report(
            command=self.name,
            model=self.model,
            data=self.data,
            verdict=page.verdict(score),
            blocks=page.blocks(score),
            result=page.result(score),
            notes=notes(model, dataset),
            origin=self.origin_of(model, dataset),
        )
