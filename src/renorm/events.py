"""What a training run tells while it runs, and what it leaves: frozen values that edges draw and keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from renorm.choices import Choice, Facts
from renorm.evaluate import Score
from renorm.heads import NewHead
from renorm.policy import Policy
from renorm.state import Undo


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What one epoch came to: the mean `loss` of its steps, the `score` on val after it, the last `lr`, and its seconds.

    drift  {batch norm site: how far the statistics that it holds lie from the source's, in source sd}, as training left them
    """

    epoch: int
    loss: float
    score: Score | None
    lr: float
    seconds: float
    drift: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, kw_only=True)
class Started:
    """Before the first step: what was decided, and why. `done` steps of `steps` were taken by an earlier process."""

    policy: Choice
    lr: Choice
    head: Choice
    facts: Facts
    steps: int
    done: int
    history: tuple[Epoch, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """After a step of the optimiser."""

    step: int
    epoch: int
    loss: float
    lr: float


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """A model that was fine-tuned, and the way back.

    history    one `Epoch` for each
    value      the metric on val at the very end, statistics re-estimated; None without val
    score      the same with its interval
    moved      {parameter or statistic: how far it moved, by what it was or is, whichever is larger}
    drift      {batch norm site: how far its statistics now lie from the source's, in source sd}
    lr         the highest rate of the features' last stage
    policy     what was allowed to move
    head       "new" or "keep"
    why        {"policy", "lr", "head": the reason for each}
    facts      what the choices rest on
    steps      how many steps were taken
    notes      what else the user should know
    """

    history: tuple[Epoch, ...]
    value: float | None
    score: Score | None
    moved: Mapping[str, float]
    drift: Mapping[str, float]
    lr: float
    policy: Policy
    head: str
    why: Mapping[str, str]
    facts: Facts
    steps: int
    notes: tuple[str, ...]
    undo: Undo = field(repr=False)
    new_head: NewHead | None = field(repr=False)

    def restore_(self) -> None:
        """Give the model the weights, statistics and head it had before, bit for bit; a second call does nothing.

        Raises OpenChange where a later change at the same modules still stands.
        """
        if self.undo.is_open:
            self.undo.restore_()
            if self.new_head is not None:
                self.new_head.restore_()


@dataclass(frozen=True, kw_only=True)
class Finished:
    """After everything: the result."""

    result: FineTuned


Event = Started | Stepped | Epoch | Finished
