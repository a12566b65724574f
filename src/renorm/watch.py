"""The doctor beside a training loop: count what it does to the norm layers, and say what is wrong with that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import nn
from torch.optim import Optimizer

from renorm.facts import Facts
from renorm.loop import Loop, Watching, optimizers_in
from renorm.rules.base import Finding, catalogue, worst_first

__all__ = ["Watch", "watch"]


class Watch:
    """What `watch` yields: ask `findings` at any time, in the block or after it."""

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], watching: Watching) -> None:
        self._model = model
        self._optimizers = optimizers
        self._watching = watching

    @property
    def loop(self) -> Loop:
        """What was counted so far."""
        return self._watching.seen()

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is wrong with the loop so far, worst first: the rules that read a loop or an optimiser."""
        facts = Facts(self._model, optimizers=self._optimizers, loop=self.loop)
        asked = [rule for rule in catalogue().values() if {"loop", "optimizers", "calls"} & set(rule.needs)]
        found = [finding for rule in asked if all(map(facts.has, rule.needs)) for finding in rule().check(facts)]
        return worst_first(found)

    def validating(self) -> AbstractContextManager[None]:
        """Inside, every update of statistics is a leak of validation data (BN405); without gradients it is one anyway."""
        return self._watching.validating()

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings)) or "nothing wrong was found in the loop"


@contextmanager
def watch(model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None = None) -> Iterator[Watch]:
    """Count what a loop does to the statistics of `model`, in the block; nothing of the loop is changed by that.

    `optimizer` is the one that trains the model, or several; its steps are what updates are counted by. Wrap and compile
    first, then watch. Layers in compiled parts are counted by their `num_batches_tracked`. However the block ends, no hook
    stays behind, and `findings` can be asked after it.
    Raises UsageError for an `optimizer` that is none.
    """
    optimizers = optimizers_in(optimizer)
    watching = Watching(model, optimizers)
    watching.open()
    try:
        yield Watch(model, optimizers, watching)
    finally:
        watching.close()
