"""Suite `transfer`: a pretrained network on a new task with few labels, ours beside the scripts that people write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from renorm.bench import transfer_table
from renorm.bench.base import Cell, Row, Suite
from renorm.bench.beds import Labelled, error
from renorm.finetune import finetune_
from renorm.heads import new_head_
from renorm.models import load_model
from renorm.sites import find_sites
from renorm.split import split

__all__ = ["Transfer"]

TASKS = {"tinyimagenet20": 20, "pneumoniamnist": 2}  # classes
SHARES: dict[str, tuple[float, ...]] = {"quick": (0.15,), "full": (0.05, 0.15, 0.3, 1.0)}
EPOCHS = {"quick": 10, "full": 30}
MEASURED = {"quick": 500, "full": 5000}
BATCH = 32
PLAIN_RATE = 1e-3  # Adam's default, as scripts leave it


@dataclass(frozen=True)
class Task:
    """What a way of fine-tuning is given."""

    model: nn.Module
    train: Labelled
    classes: int
    epochs: int
    seed: int


def plain(task: Task, *, still: bool) -> None:
    """A script as people write it: a new head, Adam, train(); with `still` its batch norms in eval."""
    torch.manual_seed(task.seed)
    new_head_(task.model, split(task.model), task.classes)
    optimiser = torch.optim.Adam(task.model.parameters(), lr=PLAIN_RATE)
    for _ in range(task.epochs):
        task.model.train()
        for site in find_sites(task.model) if still else ():
            site.module.eval()
        for rows in torch.split(torch.randperm(len(task.train.labels)), BATCH):
            if len(rows) > 1:
                optimiser.zero_grad()
                loss = F.cross_entropy(task.model(task.train.inputs[rows]), task.train.labels[rows])
                torch.autograd.backward(loss)
                optimiser.step()
    task.model.eval()


def ours(task: Task, **options: Any) -> None:
    """`finetune_` with these options, and nothing tuned by hand."""
    names = [str(label) for label in range(task.classes)]
    finetune_(
        task.model, task.train.batches(BATCH), epochs=task.epochs, seed=task.seed, head="new", classes=names, **options
    )


WAYS: dict[str, Callable[[Task], None]] = {
    "plain": lambda task: plain(task, still=False),
    "plain, BN in eval": lambda task: plain(task, still=True),
    "auto": lambda task: ours(task),
    **{
        policy: lambda task, policy=policy: ours(task, policy=policy)  # type: ignore[misc]
        for policy in ("all", "frozen-statistics", "recalibrate-then-freeze", "affine-and-head", "head-only")
    },
    **{
        f"auto + {name}": lambda task, name=name: ours(task, regularisers=name)  # type: ignore[misc]
        for name in ("l2_sp", "delta", "bss", "co_tuning")
    },
}
QUICK = ("plain", "plain, BN in eval", "auto", "frozen-statistics", "affine-and-head", "head-only")


class Transfer(Suite):
    """CIFAR-10's ResNet-20 on other tasks, by share of labels: policies, then regularisers, one factor at a time."""

    name: ClassVar[str] = "transfer"
    revision: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = (
        "nets.py",
        "weights/resnet20-12fca82f.th",
        *(f"{task}.npz" for task in TASKS),
    )

    def cells(self) -> Iterator[Cell]:
        for task in TASKS:
            for share in SHARES[self.size]:
                for seed in range(self.seeds):
                    for way in QUICK if self.size == "quick" else WAYS:
                        yield Cell.of(task=task, share=share, seed=seed, way=way)

    def run_cell(self, cell: Cell) -> Mapping[str, float]:
        train, test = _parts(self.data, cell["task"], cell["share"], cell["seed"])
        model = load_model(
            f"{self.data / 'nets.py'}:resnet20", checkpoint=self.data / "weights/resnet20-12fca82f.th"
        ).to(memory_format=torch.channels_last)
        task = Task(model, train, TASKS[cell["task"]], EPOCHS[self.size], cell["seed"])
        start = perf_counter()
        WAYS[cell["way"]](task)
        seconds = perf_counter() - start
        measured = test.first(MEASURED[self.size])
        return {"error": error(model, measured), "labels": len(train.labels), "training_seconds": seconds}

    def table(self, rows: Sequence[Row]) -> str:
        return transfer_table.table(rows)


def _parts(data: Path, task: str, share: float, seed: int) -> tuple[Labelled, Labelled]:
    """Training images, `share` of each class drawn by `seed`, and all test images."""
    images, labels, test_images, test_labels = _arrays(data / f"{task}.npz")
    generator = np.random.default_rng(seed)
    chosen = [generator.permutation(np.flatnonzero(labels == c)) for c in range(TASKS[task])]
    kept = generator.permutation(np.concatenate([c[: max(2, round(share * len(c)))] for c in chosen]))
    return _ready(images[kept], labels[kept]), _ready(test_images, test_labels)


def _ready(images: Any, labels: Any) -> Labelled:
    mean, deviation = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    colour = np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images
    inputs = torch.from_numpy(colour).permute(0, 3, 1, 2).float() / 255
    inputs = ((inputs - mean) / deviation).contiguous(memory_format=torch.channels_last)
    return Labelled(inputs, torch.from_numpy(labels.astype(np.int64).reshape(-1)))


@lru_cache(maxsize=2)
def _arrays(path: Path) -> tuple[Any, Any, Any, Any]:
    with np.load(path, allow_pickle=False) as file:
        # the order of a test set may follow its classes, and a quick run measures a part of it
        order = np.random.default_rng(0).permutation(len(file["labels_test"]))
        return file["images"], file["labels"].reshape(-1), file["images_test"][order], file["labels_test"][order]
