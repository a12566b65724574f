"""`renorm profile MODEL SOURCE_DATA -o FILE`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from renorm.cli.base import argument, option
from renorm.cli.subject import DATA, OnModel, notes
from renorm.said import say

if TYPE_CHECKING:
    from renorm.cli.screen import Screen
    from renorm.report.base import Report


@dataclass(frozen=True, kw_only=True)
class MakeProfile(OnModel):
    """Write down, once, what the source's owner can tell: the moments of each class, its own gap, its confidence.

    With that small file renorm compares target and source at the same mix of classes: renorm recalibrate --source FILE is
    then safe where the target has other classes, or the same ones in other shares.
    """

    name: ClassVar[str] = "profile"
    example: ClassVar[str] = (
        "renorm profile nets.py:resnet20 --checkpoint resnet20.safetensors train/ -o resnet20.profile"
    )

    data: str = argument(f"{DATA}; labelled data of the source that the model was not trained on, where there are any")
    output: str = option("", "the profile to write", short="-o", metavar="FILE", required=True)

    def run(self, screen: Screen) -> Report:
        from renorm.files import refuse_existing
        from renorm.profile import profile
        from renorm.report.base import Report, Words

        target = refuse_existing(self.output, force=self.force)
        model = self.opened()
        dataset = self.dataset(self.data, model)
        made = profile(model.module, screen.watched(dataset.batches, "profiling"), **self.calling())
        made.save(target, force=self.force)
        return Report(
            command=self.name,
            model=self.model,
            data=self.data,
            verdict=Words(
                say(
                    "Use it on data of any mix of classes: renorm recalibrate MODEL DATA --source {output} -o OUT",
                    output=self.output,
                ),
                "good",
                say("The source's profile is written to {output}", output=self.output),
            ),
            blocks=(),
            result={"output": str(target), "samples": dataset.count, "bytes": target.stat().st_size},
            notes=notes(model, dataset),
            origin=self.origin_of(model, dataset),
        )
