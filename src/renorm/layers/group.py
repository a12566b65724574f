"""Group norm in the place of a batch norm, set so that an image of the source's statistics is normalised as before."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.errors import BatchError, UsageError
from renorm.layers.base import Act, BatchNormTensors, Layer
from renorm.moments import as_float64


class Group(Layer, nn.GroupNorm):
    """Group norm: each image is normalised over the positions and channels of each of `groups` groups, in both modes.

    It holds no statistics. Taking over a batch norm, or loading its checkpoint, it takes from them the weight and bias by which
    an image with exactly the running moments comes out as before; other images do not, and `convert_` says how far.
    `groups` is by default the largest power of two up to 32 that divides the channels.

    Raises UsageError for a number of groups that does not divide the channels; BatchError for an input of another width.
    Wu and He 2018.
    """

    name: ClassVar[str] = "group"
    cites: ClassVar[str] = (
        "@inproceedings{wu2018group, title={Group Normalization}, author={Wu, Yuxin and He, Kaiming}, booktitle={ECCV}, "
        "year={2018}}"
    )
    keeps: ClassVar[bool] = False

    def __init__(
        self,
        num_features: int,
        *,
        groups: int | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        act: Act = None,
        axis: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        groups = math.gcd(num_features, 32) if groups is None else groups
        if groups < 1 or num_features % groups:
            raise UsageError(f"groups must divide the channels, {num_features}; got {groups!r}.")
        nn.GroupNorm.__init__(self, groups, num_features, eps=eps, affine=affine, device=device, dtype=dtype)
        self.num_features: int = num_features
        self.axis: int = axis
        self._set_act(act)

    def forward(self, x: Tensor) -> Tensor:
        axis = self.axis % max(x.dim(), 1)
        if x.dim() < 2 or x.shape[axis] != self.num_features:
            raise BatchError(
                f"{self.where} has {self.num_features} channels along dimension {self.axis} of its input, and was given the "
                f"shape {tuple(x.shape)}."
            )
        y = F.group_norm(x.movedim(axis, 1), self.num_groups, self.weight, self.bias, self.eps).to(x.dtype)
        return self._activated(y.movedim(1, axis))

    def take_(self, held: BatchNormTensors) -> None:
        weight, bias = self._folded(*(None if t is None else t.detach() for t in held))
        for name, tensor, old in (("weight", weight, held.weight), ("bias", bias, held.bias)):
            trains = old is None or old.requires_grad
            setattr(self, name, nn.Parameter(tensor.to(held.mean), requires_grad=trains))

    def _folded(self, mean: Any, var: Any, tracked: Any, weight: Any, bias: Any) -> tuple[Tensor, Tensor]:
        mean, var, weight, bias = (None if t is None else as_float64(t) for t in (mean, var, weight, bias))
        slope = torch.rsqrt(var + self.eps) * (1.0 if weight is None else weight)
        means, squares = (t.view(self.num_groups, -1).mean(1) for t in (mean, var + mean.square()))
        spread = torch.sqrt(squares - means.square() + self.eps)
        size = self.num_features // self.num_groups
        middle, spread = means.repeat_interleave(size), spread.repeat_interleave(size)
        return slope * spread, (middle - mean) * slope + (0.0 if bias is None else bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        names = ("running_mean", "running_var", "num_batches_tracked", "weight", "bias")
        found = [state_dict.get(prefix + name) for name in names]
        if found[0] is not None and found[1] is not None:
            for name in names[:3]:
                state_dict.pop(prefix + name, None)
            if self.weight is not None:
                state_dict[f"{prefix}weight"], state_dict[f"{prefix}bias"] = self._folded(*found)
        super()._load_from_state_dict(state_dict, prefix, *rest)
