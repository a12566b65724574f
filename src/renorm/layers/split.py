"""Batch norm with auxiliary sets for part of each training batch, such as adversarial or strongly augmented samples."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from renorm.errors import UsageError
from renorm.layers.per_domain import Sets


class Split(Sets):
    """In training each of `splits` consecutive parts of the batch has statistics and affine parameters of its own.

    The first part is normalised by the main set, which is torch's own in the state and which evaluation uses for everything.
    `ids` (N,), 0 for the main set, say which sample goes by which set where the parts are not consecutive. Parts are as equal
    as they can be, the first ones larger.

    Raises UsageError for less than one part.
    Xie et al. 2020 (AdvProp), section 3.2.
    """

    name: ClassVar[str] = "split"
    cites: ClassVar[str] = (
        "@inproceedings{xie2020adversarial, title={Adversarial Examples Improve Image Recognition}, author={Xie, Cihang and "
        "Tan, Mingxing and Gong, Boqing and Wang, Jiang and Yuille, Alan L and Le, Quoc V}, booktitle={CVPR}, year={2020}}"
    )
    options: ClassVar[tuple[str, ...]] = ("splits",)

    def __init__(self, num_features: int, *, splits: int = 2, **common: Any) -> None:
        if splits < 1:
            raise UsageError(f"splits is the number of parts of a batch, 1 or more; got {splits!r}.")
        super().__init__(num_features, ["main", *(f"aux{i}" for i in range(1, splits))], **common)
        self.splits: int = splits

    def _default(self, x: Tensor) -> Tensor:
        count = x.shape[0]
        if not self.training:
            return torch.zeros(count, dtype=torch.long, device=x.device)
        return torch.arange(count, device=x.device) * self.splits // count
