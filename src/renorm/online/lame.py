"""Neighbours in feature space answer alike; nothing in the model changes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from renorm.errors import UsageError
from renorm.online.base import Online, Running, Subject
from renorm.sites import Site


@dataclass(frozen=True, kw_only=True)
class Lame(Online):
    """Laplacian-adjusted answers within each batch, from the source model (Boudiaf et al. 2022, eq. 5).

    Answers Y go on as `softmax(ln p + W Y)` until the bound changes by less than 1e-8 of itself, `rounds` times at the most.
    W is a radial basis function of the distance between l2-normalised class scores (logits), its width the mean
    distance to the `neighbours`-th neighbour, itself counted. The paper measures distances between features before the head;
    class scores need no knowledge of the model. Wins only where neighbours in time are of one class, and does harm elsewhere.
    """

    name: ClassVar[str] = "lame"
    any_norm: ClassVar[bool] = True
    cites: ClassVar[str] = (
        "@inproceedings{boudiaf2022parameter, title={Parameter-free online test-time adaptation}, author={Boudiaf, Malik and "
        "Mueller, Romain and Ben Ayed, Ismail and Bertinetto, Luca}, booktitle={CVPR}, year={2022}}"
    )

    neighbours: int = 5
    rounds: int = 100

    def __post_init__(self) -> None:
        if min(self.neighbours, self.rounds) < 1:
            raise UsageError(
                f"neighbours and rounds of lame are 1 or more; got {self.neighbours!r} and {self.rounds!r}."
            )

    def start(self, subject: Subject) -> Running:
        return _Answering(subject, self)


class _Answering(Running):
    def __init__(self, subject: Subject, method: Lame) -> None:
        super().__init__(subject)
        self._method = method

    def begin(self, samples: int, batch: Any, *, learn: bool) -> None:
        return None

    def visit(self, site: Site, x: Tensor) -> None:
        return None

    def answer(self, logits: Tensor) -> Tensor:
        return adjusted(logits, neighbours=self._method.neighbours, rounds=self._method.rounds)

    @property
    def target_weight(self) -> float:
        return 0.0


def adjusted(logits: Tensor, *, neighbours: int, rounds: int) -> Tensor:
    """Log of the answers that neighbours agree on; they sum to one. Shapes: (N, K) → (N, K)."""
    logs = logits.detach().double().log_softmax(1)
    features = F.normalize(logits.detach().double(), dim=1)
    distances = torch.cdist(features, features)
    nearest = distances.topk(min(neighbours, len(logits)), dim=1, largest=False).values[:, -1]
    width = nearest.mean().clamp_min(1e-12)
    affinity = (-distances.square() / (2 * width.square())).exp()
    answers, bound = logs.exp(), math.inf
    for _ in range(rounds):
        pull = affinity @ answers
        answers = (logs + pull).softmax(1)
        now = float((answers * (answers.clamp_min(1e-20).log() - logs - pull)).sum())
        if abs(now - bound) <= 1e-8 * abs(bound) if math.isfinite(bound) else False:
            break
        bound = now
    return answers.clamp_min(1e-20).log().to(logits.dtype)
