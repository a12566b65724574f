"""Learn only from samples that are sure and unlike those before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from renorm.errors import UsageError
from renorm.online.base import Running, State, Subject
from renorm.online.kinds.descent import Descending, Gradient, entropy


@dataclass(frozen=True, kw_only=True)
class Eata(Gradient):
    """Entropy steps on sure and non-redundant samples, held near the source (Niu et al. 2022, eq. 3 to 9).

    sure     samples with an entropy below this share of ln K are learnt from
    margin   and whose probabilities have a cosine below this with the mean of those before; None: 1.5/√K, 0.9 at the most.
             The official 0.05 (K = 1,000) and 0.4 lie on either side of 1/√K, the cosine of a sure answer with the even mix:
             at K = 10 the first passes nothing and the second everything
    anchor   how strongly Fisher information holds parameters at the source's; None: 1 up to 100 classes, 2,000 above.
             Only with batches of the source (source=): a profile has no gradients in it
    """

    name: ClassVar[str] = "eata"
    any_norm: ClassVar[bool] = True
    cites: ClassVar[str] = (
        "@inproceedings{niu2022efficient, title={Efficient test-time model adaptation without forgetting}, author={Niu, "
        "Shuaicheng and Wu, Jiaxiang and Zhang, Yifan and Chen, Yaofo and Zheng, Shijian and Zhao, Peilin and Tan, Mingkui}, "
        "booktitle={ICML}, year={2022}}"
    )

    sure: float = 0.4
    margin: float | None = None
    anchor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sure <= 1:
            raise UsageError(f"sure of {self.name} is a share of ln K in (0, 1]; got {self.sure!r}.")
        if self.margin is not None and not 0 < self.margin <= 1:
            raise UsageError(f"margin of {self.name} is a cosine in (0, 1], or None; got {self.margin!r}.")
        if self.anchor is not None and not self.anchor >= 0:
            raise UsageError(f"anchor of {self.name} is a weight of at least 0, or None; got {self.anchor!r}.")

    def start(self, subject: Subject) -> Running:
        return Selecting(subject, self)


class Selecting(Descending):
    """`selected` counts the samples that were learnt from."""

    def __init__(self, subject: Subject, method: Eata) -> None:
        super().__init__(subject, method)
        self._method = method
        self._mean: Tensor | None = None  # of the probabilities of selected samples
        self._fisher = self._measured() if subject.home is not None and method.anchor != 0 else {}
        self.selected: int = 0

    def loss(self, logits: Tensor) -> Tensor | None:
        classes = logits.shape[1]
        doubt, probabilities = entropy(logits), logits.detach().softmax(1)
        limit = self._method.sure * math.log(classes)
        keep = doubt.detach() < limit
        if self._mean is not None:
            margin = min(0.9, 1.5 / math.sqrt(classes)) if self._method.margin is None else self._method.margin
            keep &= F.cosine_similarity(probabilities, self._mean[None], dim=1).abs() < margin
        if not bool(keep.any()):
            return None  # the mean of nothing would be NaN, and momentum would move the parameters all the same
        self.selected += int(keep.sum())
        now = probabilities[keep].mean(0)
        self._mean = now if self._mean is None else 0.9 * self._mean + 0.1 * now
        weights = (limit - doubt[keep].detach()).exp()
        return (doubt[keep] * weights).mean() + self._pull(classes)

    def back_to_source(self) -> None:
        super().back_to_source()
        self._mean = None

    def state(self) -> State:
        return super().state() | ({} if self._mean is None else {"mean": self._mean.clone()})

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        self._mean = state["mean"].clone() if "mean" in state else None

    def _pull(self, classes: int) -> Tensor | float:
        anchor = (1.0 if classes <= 100 else 2000.0) if self._method.anchor is None else self._method.anchor
        terms = [
            (fisher * (self.parameters[name] - self.origin[name]).square()).sum()
            for name, fisher in self._fisher.items()
        ]
        return anchor * torch.stack(terms).sum() if terms else 0.0

    def _measured(self) -> dict[str, Tensor]:
        """The mean over source batches of the squared gradient of the cross-entropy on the model's own answers."""
        assert self.subject.home is not None
        sums = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        batches = 0
        flags = {p: p.requires_grad for p in self.parameters.values()}
        try:
            for p in flags:
                p.requires_grad_(True)
            with torch.enable_grad():
                for batch in self.subject.home():
                    logits = self.scores(batch)
                    loss = F.cross_entropy(logits, logits.argmax(1))
                    grads: Any = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
                    for total, grad in zip(sums.values(), grads, strict=True):
                        total += 0 if grad is None else grad.square()
                    batches += 1
        finally:
            for p, flag in flags.items():
                p.requires_grad_(flag)
        return {name: total / max(1, batches) for name, total in sums.items()}
