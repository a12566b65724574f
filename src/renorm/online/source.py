"""The model as it is: what every other method is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from renorm.online.base import Online, Running, Subject
from renorm.sites import Site


@dataclass(frozen=True, kw_only=True)
class Source(Online):
    """Nothing adapts: every answer is the source model's own."""

    name: ClassVar[str] = "source"
    any_norm: ClassVar[bool] = True

    def start(self, subject: Subject) -> Running:
        return _Still(subject)


class _Still(Running):
    def visit(self, site: Site, x: Tensor) -> None:
        return None

    @property
    def target_weight(self) -> float:
        return 0.0
