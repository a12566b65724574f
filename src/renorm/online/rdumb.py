"""Start again from the source every so often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from renorm.errors import UsageError
from renorm.online.base import Running, State, Subject
from renorm.online.eata import Eata, Selecting


@dataclass(frozen=True, kw_only=True)
class RDumb(Eata):
    """EATA without its anchor, and every `every` steps the source again, optimiser and all (Press et al. 2023, sec. 4)."""

    name: ClassVar[str] = "rdumb"
    cites: ClassVar[str] = (
        "@inproceedings{press2023rdumb, title={RDumb: A simple approach that questions our progress in continual test-time "
        'adaptation}, author={Press, Ori and Schneider, Steffen and K{\\"u}mmerer, Matthias and Bethge, Matthias}, '
        "booktitle={NeurIPS}, year={2023}}"
    )

    anchor: float | None = 0.0
    every: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise UsageError(f"every of rdumb is a number of steps, 1 or more; got {self.every!r}.")

    def start(self, subject: Subject) -> Running:
        return _Resetting(subject, self)


class _Resetting(Selecting):
    def __init__(self, subject: Subject, method: RDumb) -> None:
        super().__init__(subject, method)
        self._every, self._steps = method.every, 0

    def finish(self, logits: Tensor) -> None:
        super().finish(logits)
        self._steps += 1
        if self._steps % self._every == 0:
            self.back_to_source()

    def state(self) -> State:
        return super().state() | {"steps": torch.tensor(self._steps)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        self._steps = int(state["steps"])
