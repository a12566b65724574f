"""L2-SP: weights are pulled to where they started, and not to zero."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from renorm.regularisers.base import Penalty, Regulariser, Start, Step, check_weight
from renorm.sites import parameters_of


@dataclass(frozen=True, kw_only=True)
class L2SP(Regulariser):
    """½ alpha Σ (w − w0)² over the parameters that the source has, and ½ beta Σ w² over a new head's (Li et al. 2018, eq. 3).

    alpha   pull to the source; 0.1 is the authors' choice. Norm layers' weight and bias count, statistics do not
    beta    pull of a new head to zero; 0.01

    Parameters that do not train add nothing. Weight decay is then off: it would pull to zero what this pulls to the source.
    """

    name: ClassVar[str] = "l2_sp"
    replaces_decay: ClassVar[bool] = True
    cites: ClassVar[str] = (
        "@inproceedings{li2018explicit, title={Explicit inductive bias for transfer learning with convolutional networks}, "
        "author={Li, Xuhong and Grandvalet, Yves and Davoine, Franck}, booktitle={ICML}, year={2018}}"
    )

    alpha: float = 0.1
    beta: float = 0.01

    def __post_init__(self) -> None:
        check_weight(self, "alpha", "beta")

    @contextmanager
    def over(self, start: Start) -> Iterator[Penalty]:
        new = start.parts.is_head if start.old_head else lambda name: False
        held = [(name, p) for name, p in parameters_of(start.model).items() if p.requires_grad]
        near = [(p, start.state[name]) for name, p in held if not new(name)]
        fresh = [p for name, p in held if new(name)]

        def penalty(step: Step) -> Tensor:
            # accumulated in float32 whatever the weights are in: thousands of tiny squares vanish in half precision
            pull = sum(((p.float() - source.float()).square().sum() for p, source in near), torch.zeros(()))
            size = sum((p.float().square().sum() for p in fresh), torch.zeros(()))
            return 0.5 * (self.alpha * pull + self.beta * size)

        yield penalty
