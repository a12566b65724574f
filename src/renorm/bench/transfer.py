"""Suite `transfer`: pretrained networks on new tasks with few labels, ours beside the scripts that people write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter, process_time
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from renorm.adapters import divided
from renorm.bench import transfer_peers, transfer_table
from renorm.bench.base import Cell, Row, Suite
from renorm.bench.beds import Labelled, error
from renorm.bench.transfer_tasks import TASKS, digit_domains
from renorm.events import Stepped
from renorm.finetune import finetune_, training
from renorm.policy import POLICIES
from renorm.recalibrate import recalibrate_
from renorm.recipe import Recipe
from renorm.sites import find_sites
from renorm.split import split

__all__ = ["Transfer"]

FEW = 0.15  # of the labels: the share at which every task stands in both sizes
SHARES = (FEW, 0.05, 0.3, 1.0)
STEPS = 100  # of training at least: a small share is seen more often
LEAST_EPOCHS = 5
MEASURED = 500  # test samples
BATCH = 32
DIGITS = {"mnist to usps, unlabelled": False, "mnist to usps in one frame, unlabelled": True}  # name: framed
JOINT = ("as it came", "source again", "recalibrated", "per_domain", "transferable")
JOINT_EPOCHS = 4
FEWER = ("tinyimagenet20", "pneumoniamnist")  # large networks of the quick size with 5 % of the labels
COST_STEPS = 24  # of each way within a turn
COST_TURNS = 3


@dataclass(frozen=True)
class Job:
    """What a way of fine-tuning is given."""

    model: nn.Module
    train: Labelled
    classes: int
    epochs: int
    seed: int

    @property
    def told(self) -> dict[str, Any]:
        """The same for the scripts of others."""
        return {"classes": self.classes, "epochs": self.epochs, "batch": BATCH, "seed": self.seed}


def ours(job: Job, **options: Any) -> None:
    """`finetune_` with these options, and nothing tuned by hand."""
    names = [str(label) for label in range(job.classes)]
    train = job.train.batches(BATCH)
    finetune_(job.model, train, epochs=job.epochs, seed=job.seed, head="new", classes=names, **options)


Way = Callable[[Job], None]
PEERS: dict[str, Way] = {
    "plain": lambda job: transfer_peers.plain(job.model, job.train, **job.told, still=False),
    "plain, BN in eval": lambda job: transfer_peers.plain(job.model, job.train, **job.told, still=True),
    "Lightning": lambda job: transfer_peers.backbone_finetuning(job.model, job.train, **job.told),
    "fastai": lambda job: transfer_peers.fine_tune(job.model, job.train, **job.told),
}
QUICK = ("plain", "plain, BN in eval", "Lightning")  # peers on large networks in the quick size
NAMES = ("all", "frozen-statistics", "recalibrate-then-freeze", "affine-and-head", "head-only", "few-labels")
WAYS: dict[str, Way] = {
    **PEERS,
    "auto": ours,
    **{name: partial(ours, policy=name) for name in NAMES},
}
BEST = "all"  # the policy at which regularisers are compared
REGULARISED: dict[str, Way] = {
    f"+ {name}": partial(ours, policy=BEST, regularisers=name)
    for name in ("shrink", "stochnorm", "l2_sp", "bss", "delta", "co_tuning")
}
AVERAGED: dict[str, Literal["ema", "swa"] | None] = {
    "average, none": None,
    "average, ema": "ema",
    "average, swa": "swa",
}  # at the policy BEST


class Transfer(Suite):
    """New tasks by share of labels: policies beside the scripts of others, one factor at a time."""

    name: ClassVar[str] = "transfer"
    revision: ClassVar[int] = 2
    moves: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = (
        "nets.py",
        "weights/resnet20-12fca82f.th",
        "weights/mobilenet025_vww.pt",
        *(f"{name}.npz" for name in ("tinyimagenet20", "pneumoniamnist", "pacs3", "mnist15k", "usps", "gas_drift")),
    )

    def cells(self) -> Iterator[Cell]:
        """Cells of both sizes measure the same: quick ones come first, and their rows may be copied to the full size's."""
        cells = [*self._quick(), *(self._full() if self.size == "full" else ()), *self._costs()]
        yield from {cell.key: cell for cell in cells}.values()

    def _quick(self) -> Iterator[Cell]:
        """Small networks with every way; large ones beside the scripts of others, and where labels are fewest on two tasks."""
        for task, told in TASKS.items():
            ways = {FEW: (*PEERS, "auto", *NAMES), 0.05: ("plain", "auto", *NAMES)}
            if not told.near:
                ways = {FEW: (*QUICK, "auto")} | ({0.05: ("plain", "auto")} if task in FEWER else {})
            if task == "usps in one frame":
                del ways[0.05]
            for share, some in ways.items():
                yield from self._grid(task, share, some)

    def _full(self) -> Iterator[Cell]:
        """What says most first: MobileNet, more labels, regularisers where they have most to do; then all the rest."""
        large = [task for task, told in TASKS.items() if not told.near]
        yield from self._grid("pacs3, MobileNet", FEW, WAYS)
        for share in (0.3, 1.0):
            for task in TASKS:
                yield from self._grid(task, share, ("plain", "auto", BEST))
        for task in large:
            yield from self._grid(task, FEW, (*WAYS, *REGULARISED))
        for share in SHARES:
            for task in TASKS:
                yield from self._grid(task, share, WAYS)
        for ways in (AVERAGED, REGULARISED):
            for task in TASKS:
                yield from self._grid(task, FEW, ways)
        for seed in range(self.seeds):
            for task in DIGITS:
                for way in JOINT:
                    yield Cell.of(task=task, seed=seed, way=way)

    def _grid(self, task: str, share: float, ways: Iterable[str]) -> Iterator[Cell]:
        for seed in range(self.seeds):
            for way in ways:
                yield Cell.of(task=task, share=share, seed=seed, way=way)

    def _costs(self) -> Iterator[Cell]:
        for seed in range(self.seeds):
            yield Cell.of(task="tinyimagenet20", seed=seed, way="cost")

    def device_of(self, cell: Cell) -> str:
        return "cpu" if cell["way"] == "cost" else self.device

    def run_cell(self, cell: Cell) -> Mapping[str, float]:
        if cell["task"] in DIGITS:
            model, *parts = digit_domains(self.data, seed=cell["seed"], framed=DIGITS[cell["task"]])
            return _joint(cell["seed"], cell["way"], model.to(self.device), *(part.to(self.device) for part in parts))
        task = TASKS[cell["task"]]
        train, test = task.target(self.data)
        if cell["way"] == "cost":
            return _cost(partial(task.source, self.data), train, cell["seed"])
        train = _share(train, cell["share"], cell["seed"])
        classes = int(test.labels.max()) + 1
        batches = -(-len(train.labels) // BATCH)
        epochs = max(LEAST_EPOCHS, -(-STEPS // batches))
        model = task.source(self.data).to(self.device)
        job = Job(model, train.to(self.device), classes, epochs, cell["seed"])
        measured = test.first(MEASURED).to(self.device)
        if cell["way"] in AVERAGED:
            return _averaged(job, measured, AVERAGED[cell["way"]])
        start = perf_counter()
        (WAYS | REGULARISED)[cell["way"]](job)
        seconds = perf_counter() - start
        found = {"error": error(job.model, measured), "labels": len(train.labels), "training_seconds": seconds}
        return found | (_sizes(job.model) if cell["way"] == "affine-and-head" else {})

    def table(self, rows: Sequence[Row]) -> str:
        return transfer_table.table(rows)


def _averaged(job: Job, measured: Labelled, average: str | None) -> dict[str, float]:
    """The error of the (averaged) weights at the end, and of the same with the statistics that the last steps left."""
    names = tuple(str(label) for label in range(job.classes))
    recipe = Recipe(policy=POLICIES[BEST], epochs=job.epochs, seed=job.seed, head="new", classes=names, average=average)
    sites = find_sites(job.model)
    for event in training(job.model, job.train.batches(BATCH), None, recipe):
        if isinstance(event, Stepped):
            left = {site.name: site.statistics() for site in sites}
    estimated = error(job.model, measured)
    for site in sites:
        if (statistics := left[site.name]) is not None:
            site.write_(statistics)
    return {"error": estimated, "error_copied": error(job.model, measured)}


def _joint(
    seed: int, way: str, model: nn.Module, source: Labelled, target: Labelled, test: Labelled
) -> dict[str, float]:
    """The error on USPS, none of whose labels were seen, of the network trained on MNIST."""
    if way == "recalibrated":
        recalibrate_(model, target.unlabelled())
    elif way == "source again":
        finetune_(model, source.batches(), policy="all", head="keep", epochs=JOINT_EPOCHS, seed=seed)
    elif way != "as it came":
        unlabelled: Any = target.unlabelled()
        chosen: Any = way
        finetune_(model, source.batches(), head="keep", epochs=JOINT_EPOCHS, seed=seed, target=unlabelled, joint=chosen)
    return {"error": error(model, test)}


def _share(train: Labelled, share: float, seed: int) -> Labelled:
    """`share` of the samples of each class, at least two, drawn by `seed`."""
    generator = np.random.default_rng(seed)
    labels = train.labels.numpy()
    chosen = [generator.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    kept = generator.permutation(np.concatenate([c[: max(2, round(share * len(c)))] for c in chosen]))
    return Labelled(train.inputs[kept], train.labels[kept])


def _sizes(model: nn.Module) -> dict[str, float]:
    """Numbers in the norm part of an adapter, and in the whole checkpoint."""
    parts = split(model)
    own, base = divided(model, parts)
    norm = sum(tensor.numel() for name, tensor in own.items() if not parts.is_head(name))
    return {"norm_numbers": norm, "numbers": sum(tensor.numel() for tensor in (*own.values(), *base.values()))}


def _cost(source: Callable[[], nn.Module], train: Labelled, seed: int) -> dict[str, float]:
    """Processor seconds of a step of a plain loop and of ours, the same optimiser in both: medians, the least of some turns."""
    seconds = {"plain": float("inf"), "ours": float("inf")}
    batches = train.first(BATCH * (COST_STEPS + 1)).batches(BATCH)
    for _ in range(COST_TURNS):
        for way, run in (("plain", _plain_steps), ("ours", _our_steps)):
            marks = run(source(), batches, seed)
            # the median: whoever else runs on the machine now and then is not the loop's
            seconds[way] = min(seconds[way], float(np.median(np.diff(marks))))
    return seconds


def _plain_steps(model: nn.Module, batches: list[Any], seed: int) -> list[float]:
    torch.manual_seed(seed)
    model.train()
    optimiser = torch.optim.AdamW(model.parameters())
    marks = []
    for inputs, labels in batches:
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels % 10)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        loss.item()
        marks.append(process_time())
    return marks


def _our_steps(model: nn.Module, batches: list[Any], seed: int) -> list[float]:
    told = [(inputs, labels % 10) for inputs, labels in batches]
    recipe = Recipe(policy=POLICIES["all"], head="keep", epochs=1, seed=seed)
    return [process_time() for event in training(model, told, None, recipe) if isinstance(event, Stepped)]
