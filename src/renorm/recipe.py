"""Everything that a training run is told, checked in one place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from renorm.calls import Caller, Result
from renorm.errors import UnknownName, UsageError
from renorm.evaluate import METRICS, Metric
from renorm.policy import Policy
from renorm.regularisers.base import Regulariser, settings

Loss = str | Callable[[Any, Any], Tensor]
Optimiser = str | Callable[[list[dict[str, Any]]], torch.optim.Optimizer]

OPTIMISERS = ("adamw", "sgd")
MEMORIES = ("normal", "lean")
AVERAGES = ("ema", "swa")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The options of `finetune_`, which says what they mean."""

    policy: str | Policy = "auto"
    regularisers: tuple[Regulariser, ...] = ()
    epochs: int = 5
    lr: float | Literal["auto"] = "auto"
    head: str = "auto"
    head_name: Literal["auto"] | str | Sequence[str] = "auto"
    loss: Loss | None = None
    metric: Metric = "accuracy"
    memory: str = "normal"
    seed: int = 0
    classes: tuple[str, ...] | None = None
    optimiser: Optimiser = "adamw"
    weight_decay: float = 0.01
    depth_decay: float = 1.0
    gradual: bool = False
    clip: float | None = 1.0
    average: str | None = None
    ema_decay: float = 0.999
    target: Iterable[Any] | None = None
    joint: str = "transferable"
    target_weight: float = 0.1
    run: str | os.PathLike[str] | None = None
    save_every: int | None = None
    accelerator: Any = None
    caller: Caller = field(default_factory=Caller)

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("save_every", 1), ("seed", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and value >= least):
                raise UsageError(f"{name} is a whole number of at least {least}; got {value!r}.")
        if self.memory not in MEMORIES:
            raise UnknownName("memory", self.memory, MEMORIES)
        if isinstance(self.loss, str) and self.loss not in LOSSES:
            raise UnknownName("loss", self.loss, LOSSES)
        if isinstance(self.metric, str) and self.metric not in METRICS:
            raise UnknownName("metric", self.metric, METRICS)
        if isinstance(self.optimiser, str) and self.optimiser not in OPTIMISERS:
            raise UnknownName("optimiser", self.optimiser, OPTIMISERS)
        if self.average is not None and self.average not in AVERAGES:
            raise UnknownName("average", self.average, AVERAGES)
        if not 0 < self.ema_decay < 1:
            raise UsageError(f"ema_decay is what is kept at each step, between 0 and 1; got {self.ema_decay!r}.")
        weight = self.target_weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise UsageError(f"target_weight is a number of at least 0; got {weight!r}.")
        if self.clip is not None and not self.clip > 0:
            raise UsageError(f"clip is the largest norm of a gradient, above 0, or None; got {self.clip!r}.")

    @property
    def asks_for_steps(self) -> bool:
        """Whether something was asked for that only steps of training heed."""
        own = self.regularisers or self.gradual or self.target is not None or self.average or self.lr != "auto"
        return bool(own) or self.loss not in (None, "cross_entropy")

    def made(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        """The optimiser over these groups."""
        if callable(self.optimiser):
            return self.optimiser(groups)
        if self.optimiser == "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
        return torch.optim.AdamW(groups, lr=lr)

    def loss_of(self, result: Result) -> Tensor:
        """The loss of one forward, a scalar; without a `loss`, the one that the labels' type and shape ask for."""
        labels = result.labels
        if callable(self.loss):
            return self.loss(result.output if result.logits is None else result.logits, labels)
        logits = self.caller.logits(result, asked="the loss")
        labels = labels.to(logits.device) if isinstance(labels, Tensor) else labels
        name = self.loss
        if name is None:
            name = "cross_entropy" if not labels.is_floating_point() else "mse"
        return LOSSES[name](logits.float(), labels)

    def identity(self) -> dict[str, Any]:
        """The options that decide the result, as plain values."""
        named = (
            "epochs",
            "lr",
            "head",
            "head_name",
            "seed",
            "weight_decay",
            "depth_decay",
            "gradual",
            "clip",
            "memory",
        )
        told = {name: getattr(self, name) for name in named}
        for name in ("policy", "loss", "optimiser"):
            value = getattr(self, name)
            told[name] = value if isinstance(value, str) or value is None else getattr(value, "name", _called(value))
        if self.average is not None:
            told |= {"average": self.average, "ema_decay": self.ema_decay}
        if self.target is not None:
            told |= {"joint": self.joint, "target_weight": self.target_weight}
        told["regularisers"] = [settings(each) for each in self.regularisers]
        return told


def _called(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _targets(logits: Tensor, labels: Tensor) -> Tensor:
    return labels.reshape(logits.shape).to(logits.dtype)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda logits, labels: F.cross_entropy(
        logits, labels if labels.is_floating_point() else labels.long()
    ),
    "bce": lambda logits, labels: F.binary_cross_entropy_with_logits(logits, _targets(logits, labels)),
    "mse": lambda logits, labels: F.mse_loss(logits, _targets(logits, labels)),
    "l1": lambda logits, labels: F.l1_loss(logits, _targets(logits, labels)),
}


def labels_of(train: Iterable[Any], asked: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names of the labels: as asked, or as the data, or the data set below a loader, says under `classes`."""
    for source in (train, getattr(train, "dataset", None)):
        found = asked or getattr(source, "classes", None)
        if isinstance(found, list | tuple) and all(isinstance(name, str) for name in found):
            return tuple(found)
    return None
