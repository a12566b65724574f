"""Co-Tuning: the source's own head goes on telling, through what its classes have to do with the target's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.errors import UsageError
from renorm.regularisers.base import Penalty, Regulariser, Start, Step, check_weight, head_input, watched
from renorm.state import evaluating


@dataclass(frozen=True, kw_only=True)
class CoTuning(Regulariser):
    """weight times the cross-entropy of the old head's answer with p(source class | target class) (You et al. 2020, eq. 1).

    weight   2.3 is the authors' choice

    The relation is their direct one: the mean of the source's probabilities over the training samples of each target class,
    read in one pass beforehand. Their calibration on source data is left out, there being none, and the old head stays as it
    was, where theirs trains along.
    Raises UsageError where the head was kept, since source and target classes are then the same.
    """

    name: ClassVar[str] = "co_tuning"
    cites: ClassVar[str] = (
        "@inproceedings{you2020cotuning, title={Co-Tuning for transfer learning}, author={You, Kaichao and Kou, Zhi and Long, "
        "Mingsheng and Wang, Jianmin}, booktitle={NeurIPS}, year={2020}}"
    )

    weight: float = 2.3

    def __post_init__(self) -> None:
        check_weight(self, "weight")

    @contextmanager
    def over(self, start: Start) -> Iterator[Penalty]:
        if not start.old_head:
            raise UsageError(
                'co_tuning relates old classes to new ones, and the head was kept; give head="new", or leave it.'
            )
        place = head_input(start.parts, self)
        # a copy: the undo puts the old head itself back, untouched
        head = deepcopy(start.old_head[0]).requires_grad_(False).eval()
        with watched(start.model, [_last_below(start.model, place)], inputs=True) as seen:
            relation = self._relation(start, head, seen)

            def penalty(step: Step) -> Tensor:
                said: Tensor = head(next(iter(seen.values()))).flatten(1).log_softmax(1)
                wanted = relation[step.result.labels.long().to(relation.device)]
                return self.weight * -(wanted.to(said.device) * said).sum(1).mean()

            yield penalty

    def _relation(self, start: Start, head: nn.Module, seen: dict[str, Tensor]) -> Tensor:
        """p(source class | target class), (target classes, source classes)."""
        chances: list[Tensor] = []
        labels: list[Tensor] = []
        with evaluating(start.model):
            for index, batch in enumerate(start.passing(asked=self.name)):
                result = start.caller.run(start.model, batch, index=index)
                chances.append(head(next(iter(seen.values()))).flatten(1).softmax(1).cpu().double())
                labels.append(_indices(result.labels).cpu())
        truth = F.one_hot(torch.cat(labels).long()).double()
        return ((truth.T @ torch.cat(chances)) / truth.sum(0).clamp_min(1)[:, None]).float()


def _indices(labels: Any) -> Tensor:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() != 1:
        raise UsageError("co_tuning relates classes to classes: it needs one class index for each sample.")
    return labels


def _last_below(model: nn.Module, name: str) -> str:
    """The layer of the head that was replaced: the last with weights of its own."""
    module = model.get_submodule(name)
    own = [n for n, part in module.named_modules() if part._parameters]
    return f"{name}.{own[-1]}" if own and own[-1] else name
