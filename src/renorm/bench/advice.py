"""Suite `advice`: settings that are advised beside what they promise, and plans that are recommended beside the truth.

Two real networks on real data. Settings: a promised standard error is measured on groups of images. Plans: every candidate
that `recommend` tried is done, and its error taken on images that it never saw.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import nan
from typing import ClassVar

import torch
from torch import Tensor, nn

from renorm.advise import advise
from renorm.bench import advice_table
from renorm.bench.base import Cell, Row, Suite
from renorm.bench.beds import BEDS, Bed, Labelled, error
from renorm.calls import Caller
from renorm.observe import visiting
from renorm.profile import profile
from renorm.recommend import recommend
from renorm.sites import find_sites
from renorm.state import evaluating
from renorm.timing import timed

__all__ = ["AdviceSuite"]

READ, POOL, MEASURED = (
    256,
    2000,
    800,
)  # images that advice and plans see, that errors of means are taken on, and that judge
SIZES = (2, 8, 64)  # images a step
SETTINGS = ("as_it_is", "gaussian_noise")
PLANS = ("as_it_is", "gaussian_noise", "defocus_blur", "contrast")
ENOUGH = 1e9  # seconds: every candidate is tried; what each takes is in the table
SECONDS = 10.0  # for timing ways to run a model


class AdviceSuite(Suite):
    """Settings and plans on real networks, and which way of running them is fastest."""

    name: ClassVar[str] = "advice"
    revision: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = tuple(dict.fromkeys(file for bed in BEDS.values() for file in bed.needs))

    def cells(self) -> Iterator[Cell]:
        for name, bed in BEDS.items():
            for seed in range(self.seeds):
                for shift in SETTINGS:
                    for images in SIZES:
                        yield Cell.of(part="settings", bed=name, shift=shift, batch=images, seed=seed)
                cases = [(shift, bed.classes) for shift in PLANS] + [(PLANS[0], 1)]
                for shift, classes in cases:
                    for known in advice_table.KNOWN:
                        yield Cell.of(part="plan", bed=name, shift=shift, classes=classes, known=known, seed=seed)
            for images in (1, 64):
                yield Cell.of(part="time", bed=name, batch=images)

    def run_cell(self, cell: Cell) -> Mapping[str, float]:
        bed = BEDS[cell["bed"]](self.data, POOL, MEASURED)
        match cell["part"]:
            case "settings":
                return _settings(bed, cell["shift"], cell["batch"], cell["seed"])
            case "plan":
                return _plan(bed, cell["shift"], cell["classes"], cell["known"], cell["seed"])
        return _time(bed, cell["batch"])

    def table(self, rows: Sequence[Row]) -> str:
        return advice_table.table(rows)


def _settings(bed: Bed, shift: str, size: int, seed: int) -> dict[str, float]:
    """What is advised from READ images in batches of 64 for steps of `size`, and the errors that groups of images show."""
    model, pool = bed.model(), bed.pool(shift, seed=seed)
    advice = advise(model, pool.first(READ).unlabelled(), batch_size=size, budget=0)
    items = {str(item.topic): item for item in advice.items}
    drawn = advice.curve
    assert drawn is not None
    means, spread = _means(model, drawn.site, pool)
    momentum, wanted = items["momentum"].choice, items["batch size"].choice
    return {
        "told": drawn.error(size),
        "true": _error(means, spread, size),
        "enough": float("wanted" not in wanted.values),
        "wanted": float(str(wanted.values.get("wanted", size))),
        "momentum": float(str(momentum.values["momentum"])),
        "images": float(drawn.needed(0.05)),
        "left": _error(means, spread, drawn.needed(0.05)),
        "stay": float(advice_table.STAY.index(str(items["stay with batch norm?"].choice))),
        "changed": items["stay with batch norm?"].value,
        "narrow": items["precision"].value if "precision" in items else nan,
        "near eps": items["eps"].value,
    }


def _means(model: nn.Module, name: str, images: Labelled) -> tuple[Tensor, Tensor]:
    """The mean of each image at a site, (N, C), and the sd that it divides by, (C,)."""
    (site,) = (site for site in find_sites(model) if site.name == name)
    held = site.statistics()
    assert held is not None
    found: list[Tensor] = []
    with evaluating(model), visiting(model, [site], lambda _, x: found.append(x.double().flatten(2).mean(2))):
        for batch in images.unlabelled():
            model(batch)
    return torch.cat(found), (held.var + site.eps).sqrt()


def _error(means: Tensor, spread: Tensor, count: int) -> float:
    """The standard error of a mean of `count` images, from groups without a shared image; NaN where there are not four."""
    groups = len(means) // count
    if groups < 4:
        return nan
    of_groups = means[: groups * count].reshape(groups, count, -1).mean(1) / spread
    return float(of_groups.var(0).mean().sqrt())


def _plan(bed: Bed, shift: str, classes: int, known: str, seed: int) -> dict[str, float]:
    """The error of every candidate on images that no plan saw, which of them was put first, and what each took to try."""
    model, pool = bed.model(), bed.pool(shift, seed=seed, classes=classes).first(READ)
    held_out = bed.held_out(shift, seed=seed, classes=classes)
    source = profile(model, bed.source(seed=seed).batches()) if known == "a profile" else None
    batches = pool.batches() if known == "labels" else pool.unlabelled()
    plan = recommend(model, batches, None, ENOUGH, source=source)
    values = {"chosen": float(advice_table.CANDIDATES.index(str(plan.best.name)))}
    for each in plan.ranking:
        undo = replace(plan, ranking=(each,)).apply_(model)
        values |= {f"error, {each.name}": error(model, held_out), f"seconds, {each.name}": each.seconds}
        undo.restore_()
    return values


def _time(bed: Bed, images: int) -> dict[str, float]:
    model, batch = bed.model(), bed.pool("as_it_is", seed=0).first(images).inputs
    found = timed(model, batch, Caller(), samples=images, budget=SECONDS)
    return {way: found.seconds["native"] / seconds for way, seconds in found.seconds.items()}
