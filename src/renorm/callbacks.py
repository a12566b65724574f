"""`watch` inside loops that others write: callbacks for Lightning's and transformers' trainers.

With accelerate no callback is needed: `watch` takes what `Accelerator.prepare` gave back.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn

from renorm.errors import require
from renorm.rules.base import Finding
from renorm.watch import Watch, watch

__all__ = ["lightning", "transformers"]


class _Watcher:
    """One watch over one training run; `findings` can be asked while it runs and afterwards."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._watch: Watch | None = None
        self._validation: ExitStack = ExitStack()

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is wrong with the loop so far, worst first; empty before it began."""
        return () if self._watch is None else self._watch.findings

    def begin(self, model: nn.Module, optimizers: Any) -> None:
        """Begin to watch; an earlier watch ends."""
        self.close()
        self._watch = self._stack.enter_context(watch(model, optimizers))

    def close(self) -> None:
        """Take every hook away; the findings stay."""
        self._validation.close()
        self._stack.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


def lightning() -> Any:
    """A callback for Lightning's Trainer: `callback.findings` after `fit`, and no hook left however that ended.

    Updates while validating count as leaks, with or without gradients.
    Raises MissingExtra without lightning (or pytorch_lightning).
    """
    try:
        pl = require("lightning.pytorch", extra="lightning", purpose="a callback for Lightning")
    except ImportError:
        pl = require("pytorch_lightning", extra="lightning", purpose="a callback for Lightning")

    class WatchNorms(_Watcher, pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
            self.begin(trainer.strategy.model or pl_module, list(trainer.optimizers))

        def on_validation_start(self, trainer: Any, pl_module: nn.Module) -> None:
            if self._watch is not None:
                self._validation.enter_context(self._watch.validating())

        def on_validation_end(self, trainer: Any, pl_module: nn.Module) -> None:
            self._validation.close()

        def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
            self.close()

        def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
            self.close()

        def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
            self.close()

    return WatchNorms()


def transformers() -> Any:
    """A callback for transformers' Trainer: `callback.findings` after `train`.

    That trainer does not tell callbacks of an exception: where hooks must go then too, train inside `with callback:`.
    Raises MissingExtra without transformers.
    """
    library = require("transformers", extra="text", purpose="a callback for transformers' Trainer")

    class WatchNorms(_Watcher, library.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.begin(given["model"], given.get("optimizer"))

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.close()

    return WatchNorms()
