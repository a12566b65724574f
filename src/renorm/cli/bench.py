"""`renorm bench SUITE --data DIR`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from renorm.cli.base import Command, argument, option
from renorm.said import say

if TYPE_CHECKING:
    from renorm.cli.screen import Screen
    from renorm.report.base import Report


@dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """Run a benchmark of renorm and write its table; an interrupted one goes on where it stopped."""

    name: ClassVar[str] = "bench"
    example: ClassVar[str] = "renorm bench recalibrate --data data/ --size quick"

    suite: str = argument("the name of a suite")
    data: str = option("", "the folder with the data sets and weights; breadth needs none", metavar="DIR")
    size: Literal["quick", "full"] = option("quick", "quick takes minutes, full takes hours")
    seeds: int = option(3, "how often every cell is repeated")
    device: str = option("cpu", "where torch computes, such as cuda; suites that measure the processor stay on it")
    processes: int | None = option(None, "cells run side by side in so many; by default one per core")
    minutes: float | None = option(None, "begin no cell after so many; 0 writes the table of what is known")
    output: str = option("benchmarks/results", "the folder for tables and rows", short="-o", metavar="DIR")

    def run(self, screen: Screen) -> Report:
        from renorm.bench.runner import CellDone, Finished, Started, open_suite, run_suite
        from renorm.report.base import Report, Words

        suite = open_suite(self.suite, data=self.data, size=self.size, seeds=self.seeds, device=self.device)
        rows, known, written, text = 0, 0, "", ""
        total = sum(1 for _ in suite.cells())
        events = run_suite(suite, out=self.output, processes=self.processes, minutes=self.minutes)
        for event in screen.steps(events, self.suite, total=total + 2):
            if isinstance(event, Started | CellDone):
                known = event.done
                rows += isinstance(event, CellDone)
            elif isinstance(event, Finished):
                written, text = str(event.report), event.text
        return Report(
            command=self.name,
            model="",
            data=self.data,
            verdict=Words(
                say("{rows} cells were run now, {total} are in the table.", rows=rows, total=known),
                "good",
                say("Written to {output}", output=written),
            ),
            blocks=(Words(text),),
            origin=self.origin(),
            result={
                "suite": self.suite,
                "size": self.size,
                "report": written,
                "cells": total,
                "known": known,
                "run_now": rows,
            },
        )
