"""Make the model surer of the stream, by its scale and shift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from renorm.online.base import Running, Subject
from renorm.online.kinds.descent import Descending, Gradient, entropy


@dataclass(frozen=True, kw_only=True)
class Tent(Gradient):
    """One step down the mean entropy of every batch; the answer is from before the step (Wang et al. 2021, sec. 3).

    Unlike the official code it keeps the source's statistics and every layer's eps, trains no dropout, and takes layers of
    one, two and three dimensions. Falls apart in batches below 16, in streams sorted by class, and in long ones.
    """

    name: ClassVar[str] = "tent"
    any_norm: ClassVar[bool] = True
    cites: ClassVar[str] = (
        "@inproceedings{wang2021tent, title={Tent: Fully test-time adaptation by entropy minimization}, author={Wang, Dequan "
        "and Shelhamer, Evan and Liu, Shaoteng and Olshausen, Bruno and Darrell, Trevor}, booktitle={ICLR}, year={2021}}"
    )

    def start(self, subject: Subject) -> Running:
        return _Entropy(subject, self)


class _Entropy(Descending):
    def loss(self, logits: Tensor) -> Tensor:
        return entropy(logits).mean()
