"""Batch norm itself, of any rank."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from renorm.errors import UsageError
from renorm.kernels import channels, weighed
from renorm.layers.base import Act, Tracking, finite_or


class BatchNorm(LazyModuleMixin, Tracking):
    """`y = act((x − μ) / sqrt(ε + σ²) · weight + bias)`, with μ and the biased σ² of the batch, in evaluation the running ones.

    In the spelling of the essay that this library grew from, `y = (x − μ) / sqrt(ε + σ²) · σ_new + γ` with
    `μ = 1/B Σ xᵢ` and `σ² = 1/B Σ (xᵢ − μ)²`: its `σ_new` is `weight` here and its `γ` is `bias`; the activation follows, as in
    its steps. A checkpoint of its wrapper (`bn.weight`, `bn.running_mean`, …) loads.

    One class for 1d, 2d, 3d and any other rank. Without `num_features` the first input decides. `BNLayer` is this class.

    On a call, `mask` says which positions count (True), and `weight` how much each does: padding then moves neither the
    moments nor the running statistics. All positions are normalised. In evaluation neither has an effect.

    Shapes: x (N, C, *), with C along `axis`; mask and weight: the shape of x without that dimension, or its first dimensions.
    Raises what every layer raises, and UsageError for a mask or weight of another shape or a negative weight.

    Ioffe and Szegedy 2015, algorithms 1 and 2.
    """

    name: ClassVar[str] = "batch"
    cites: ClassVar[str] = (
        "@inproceedings{ioffe2015batch, title={Batch Normalization: Accelerating Deep Network Training by Reducing Internal "
        "Covariate Shift}, author={Ioffe, Sergey and Szegedy, Christian}, booktitle={ICML}, year={2015}}"
    )

    num_features: int
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int | None = None,
        act: Act = None,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        axis: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Not LazyModuleMixin's own: it would warn, and register hooks on layers that are not lazy.
        Tracking.__init__(
            self,
            num_features or 0,
            eps=eps,
            momentum=momentum,
            affine=affine,
            act=act,
            axis=axis,
            device=device,
            dtype=dtype,
        )
        if num_features is None:
            self._wait_for_input(device=device, dtype=dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        values = self._first(x)
        counts = self._counts(x, mask, weight)
        return self._finished(self._normalised(values) if counts is None else self._weighed(values, counts))

    def _normalised(self, x: Tensor) -> Tensor:
        return self._by_batch(x) if self.training else self._by_held(x)

    def _weighed(self, x: Tensor, counts: Tensor) -> Tensor:
        mean, var = weighed(x, counts)
        # with 0 and 1 this is their number; it does not change when all weights double
        count = counts.sum().square() / counts.square().sum()
        enough = count > 1
        # not a number where nothing is to be learnt, so that it is left out
        self._track(mean.detach(), torch.where(enough, var.detach() * (count / (count - 1)), torch.nan))
        held_mean, held_var = self.running_mean.detach().clone(), self.running_var.detach().clone()
        mean, var = finite_or(torch.where(enough, mean, torch.nan), var, held_mean, held_var)
        y = (x - channels(mean, x)) * channels(self._scale(var, self.weight), x)
        return (y if self.bias is None else y + channels(self.bias, x)).to(x.dtype)

    def _counts(self, x: Tensor, mask: Tensor | None, weight: Tensor | None) -> Tensor | None:
        """How much every position counts, in a shape that broadcasts against x; None where all count the same."""
        counts = None
        positions = list(x.shape)
        del positions[self.axis]
        for name, given in (("mask", mask), ("weight", weight)):
            if given is None:
                continue
            if list(given.shape) != positions[: given.dim()] or given.dim() == 0:
                raise UsageError(
                    f"{self.where} was given a {name} of shape {tuple(given.shape)} for an input of shape {tuple(x.shape)}; "
                    f"it needs {tuple(positions)}, one number for every position, or the first of these dimensions."
                )
            part = given.detach().reshape(*given.shape, *[1] * (len(positions) - given.dim())).expand(positions)
            part = part.unsqueeze(self.axis).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
            counts = part if counts is None else counts * part
        if counts is None or not self.training:
            return None
        if weight is not None and not torch.compiler.is_compiling() and bool((weight < 0).any()):
            raise UsageError(f"{self.where} was given a weight below 0; a weight says how much a position counts.")
        return counts.movedim(self.axis, 1)

    def _wait_for_input(self, **where: Any) -> None:
        if self.affine:
            for name in ("weight", "bias"):
                self.register_parameter(name, cast(nn.Parameter, nn.UninitializedParameter(**where)))
        self.running_mean, self.running_var = nn.UninitializedBuffer(**where), nn.UninitializedBuffer(**where)
        hook: Any = self._lazy_load_hook
        self._load_hook = cast(Any, self)._register_load_state_dict_pre_hook(hook)
        self._initialize_hook = self.register_forward_pre_hook(self._infer_parameters, with_kwargs=True)

    def initialize_parameters(self, x: Tensor, *_: Any, **__: Any) -> None:
        """Take the number of channels from a first input; torch's lazy modules call this themselves."""
        if self.has_uninitialized_params():
            self.num_features = x.shape[self.axis]
            for tensor in (self.weight, self.bias, self.running_mean, self.running_var):
                if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
                    tensor.materialize((self.num_features,))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        if not self.has_uninitialized_params():
            super().reset_parameters()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for key in [key for key in state_dict if key.startswith(f"{prefix}bn.")]:
            state_dict[prefix + key.removeprefix(f"{prefix}bn.")] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if not self.has_uninitialized_params():
            self.num_features = self.running_mean.shape[0]


BNLayer = BatchNorm
