"""BSS: batch spectral shrinkage, against features that the source brought and the target does not need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from renorm.errors import UsageError
from renorm.regularisers.base import Penalty, Regulariser, Start, Step, check_weight, features_of, head_input, watched


@dataclass(frozen=True, kw_only=True)
class BSS(Regulariser):
    """eta times the sum of the k smallest squared singular values of a batch's features (N, D) (Chen et al. 2019, eq. 3).

    eta   0.001 is the authors' choice
    k     how many singular values, of min(N, D)
    """

    name: ClassVar[str] = "bss"
    cites: ClassVar[str] = (
        "@inproceedings{chen2019catastrophic, title={Catastrophic forgetting meets negative transfer: batch spectral shrinkage "
        "for safe transfer learning}, author={Chen, Xinyang and Wang, Sinan and Fu, Bo and Long, Mingsheng and Wang, Jianmin}, "
        "booktitle={NeurIPS}, year={2019}}"
    )

    eta: float = 0.001
    k: int = 1

    def __post_init__(self) -> None:
        check_weight(self, "eta")
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise UsageError(f"k of bss is a number of singular values, 1 or more; got {self.k!r}.")

    @contextmanager
    def over(self, start: Start) -> Iterator[Penalty]:
        place = head_input(start.parts, self)
        with watched(start.model, [place], inputs=True) as seen:

            def penalty(step: Step) -> Tensor:
                features = features_of(seen, place, self).float()
                # σ² are the eigenvalues of the smaller Gram matrix; svdvals has a gradient where values coincide, svd has not
                values: Tensor = torch.linalg.svdvals(features)[-self.k :]
                return self.eta * values.square().sum()

            yield penalty
