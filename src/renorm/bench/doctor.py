"""Suite `doctor`: sick models found, healthy ones left in peace, planted strengths, real shifts, rebuilt threads, the cost.

torch-audit, a general linter for training, looks at the same models where it is installed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from time import process_time
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from renorm.bench import doctor_table, planted
from renorm.bench.base import Cell, Row, Suite
from renorm.bench.beds import BEDS, Bed, ResNet20, error
from renorm.bench.patients import DISEASES, HEALTHY, SICK, calibrated, images
from renorm.bench.threads import THREADS
from renorm.doctor import Diagnosis, diagnose
from renorm.errors import MissingExtra, require
from renorm.recalibrate import recalibrate_
from renorm.watch import watch

__all__ = ["DoctorSuite"]

LOOKED_AT, MEASURED = 256, 800  # images of each real case
TURNS, STEPS = 9, 5


class ResNet8(ResNet20):
    """MLPerf-Tiny's ResNet-8 on the same images."""

    name = "resnet8"
    needs: ClassVar[tuple[str, ...]] = (*ResNet20.needs, "weights/resnet8_cifar10.pt")

    def _network(self) -> tuple[str, str]:
        return "resnet8", "weights/resnet8_cifar10.pt"

    def _pixels(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        config: Any = self.model().pretrained_cfg
        return tuple(config["mean"]), tuple(config["std"])


REAL: dict[str, type[Bed]] = {**BEDS, "resnet8": ResNet8}


class DoctorSuite(Suite):
    """What the doctor says of models whose state is known, in five parts and its cost beside a loop."""

    name: ClassVar[str] = "doctor"
    revision: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = tuple(dict.fromkeys(file for bed in REAL.values() for file in bed.needs))

    def cells(self) -> Iterator[Cell]:
        for model in SICK:
            for disease in DISEASES:
                yield Cell.of(part="sick", model=model, disease=disease)
        for model in HEALTHY:
            yield Cell.of(part="healthy", model=model)
        for name, plant in planted.PLANTS.items():
            for strength in plant.strengths:
                for seed in range(self.seeds):
                    yield Cell.of(part="planted", plant=name, strength=strength, seed=seed)
        seeds = range(self.seeds if self.size == "full" else 1)  # of the real cases
        for name, bed in REAL.items():
            for shift in bed.shifts:
                for seed in seeds:
                    yield Cell.of(part="real", bed=name, shift=shift, classes=bed.classes, seed=seed)
            for seed in seeds:
                yield Cell.of(part="real", bed=name, shift=bed.shifts[0], classes=1, seed=seed)
        for thread in THREADS:
            for seed in range(self.seeds):
                yield Cell.of(part="thread", thread=thread, seed=seed)
        for model in ("timm:resnet18", "timm:mobilenetv3_small_050", "torchvision:googlenet"):
            yield Cell.of(part="cost", model=model)

    def run_cell(self, cell: Cell) -> Mapping[str, float]:
        match cell["part"]:
            case "sick":
                return _sick(cell["model"], cell["disease"])
            case "healthy":
                return _healthy(cell["model"])
            case "planted":
                return planted.run(self.data, cell["plant"], cell["strength"], cell["seed"])
            case "real":
                return _real(self.data, cell["bed"], cell["shift"], cell["classes"], cell["seed"])
            case "thread":
                return _thread(cell["thread"], cell["seed"])
        return _cost(cell["model"])

    def table(self, rows: Sequence[Row]) -> str:
        return doctor_table.table(rows)


@lru_cache(maxsize=3)
def _patient(name: str) -> nn.Module:
    return calibrated(name)


def _sick(name: str, disease: str) -> dict[str, float]:
    """Whether the rule found it, which others spoke, and whether torch-audit says more than of the healthy model."""
    sickness, healthy = DISEASES[disease], _patient(name)
    model = copy.deepcopy(healthy)
    sickness.make(model)
    given = sickness.given(model)
    found = diagnose(model, [images(32, seed=1)] if sickness.data else None, **given).findings
    values = {
        "found": float(any(f.rule == sickness.rule for f in found)),
        "first": float(bool(found) and found[0].rule == sickness.rule),
        "others": float(sum(f.rule != sickness.rule for f in found)),
    }
    before, after = _audit(healthy), _audit(model, **{k: v for k, v in given.items() if k == "optimizer"})
    if before is not None and after is not None:
        values["audit"] = float(bool(after - before))
    return values


def _healthy(name: str) -> dict[str, float]:
    model = calibrated(name)
    values: dict[str, float] = {}
    for key, batches in (("alone", None), ("data", [images(32, seed=seed) for seed in range(1, 5)])):
        said = [finding.severity for finding in diagnose(model, batches).findings]
        values |= {f"{key} {level}": float(said.count(level)) for level in ("error", "warning", "info")}
    audit = _audit(model)
    if audit is not None:
        values |= {f"audit {level}": float(sum(a[1] == level for a in audit)) for level in ("ERROR", "WARN")}
    return values


def _audit(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> set[tuple[str, str, str]] | None:
    """What torch-audit says of a model, by rule, severity and place; None where it is not installed."""
    try:
        audit = require("torch_audit", extra="bench", purpose="the peer").audit
    except MissingExtra:
        return None
    found: set[tuple[str, str, str]] = set()
    try:
        for phase in ("static", "init"):
            result = audit(model, phase=phase, optimizer=optimizer)
            found |= {(f.rule_id, str(f.severity.value), f"{f.module_path}:{f.entity}") for f in result.findings}
    except Exception:  # a lazy layer stops it
        return found
    return found


def _real(data: Path, name: str, shift: str, classes: int, seed: int) -> dict[str, float]:
    """What was said of the shifted images, and what was true: the error there, at home, and after recalibration."""
    bed = REAL[name](data, LOOKED_AT, MEASURED)
    pool = bed.pool(shift, seed=seed, classes=classes)
    model = bed.model()
    found = diagnose(model, pool.unlabelled())
    held_out = bed.held_out(shift, seed=seed, classes=classes)
    values = {
        "error": error(model, held_out),
        "home": error(model, bed.held_out(bed.shifts[0], seed=seed, classes=classes)),
        "distance": max(found.distances.values()),
        "first": float(found.findings[0].rule[2:]) if found.findings else 0.0,
        **{level: float(sum(f.severity == level for f in found.findings)) for level in ("error said", "warning said")},
    }
    values |= _said(found)
    recalibrate_(model, pool.unlabelled())
    return values | {"recalibrated": error(model, held_out)}


def _said(found: Diagnosis) -> dict[str, float]:
    said = [finding.severity for finding in found.findings]
    return {"error said": float(said.count("error")), "warning said": float(said.count("warning"))}


def _thread(name: str, seed: int) -> dict[str, float]:
    thread = THREADS[name]
    told = thread.rebuild(seed + 1)
    named = told.first is not None and told.first.rule in thread.rules
    rule = float(told.first.rule[2:]) if told.first is not None else 0.0
    return {"named": float(named), "rule": rule, "before": told.before, "after": told.after}


def _cost(name: str) -> dict[str, float]:
    """Processor time of a step of training, watched and not in turns, and of entering and leaving the watch."""
    model = calibrated(name).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x, y = images(8), torch.arange(8) % 10

    def steps() -> float:
        start = process_time()
        for _ in range(STEPS):
            optimizer.zero_grad()
            output = model(x)
            torch.autograd.backward(F.cross_entropy(getattr(output, "logits", output), y))
            optimizer.step()
        return (process_time() - start) / STEPS

    steps()
    ratios, opening = [], []
    for _ in range(TURNS):
        plain = steps()
        start = process_time()
        with watch(model, optimizer):
            opened = process_time() - start
            ratios.append(steps() / plain)
            start = process_time()
        opening.append((opened + process_time() - start) / plain)
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return {"ratio": float(middle), "low": float(low), "high": float(high), "opening": float(np.median(opening))}
