"""What every layer shares: torch's keys and modes, the activation, the tracking of statistics; and the catalogue."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from renorm.errors import BatchError, UnknownName, UsageError
from renorm.family import members
from renorm.kernels import recomputing

Act = str | Callable[[Tensor], Tensor] | None
COMMON = ("num_features", "eps", "momentum", "affine", "act", "axis", "device", "dtype", "common")  # of every layer


class Layer(nn.Module, ABC):
    """A layer of the catalogue: `name` for `convert_`, `cites` the BibTeX of its paper, and the activation it ends in.

    `keeps` says whether, in evaluation, it gives what the batch norm gave whose tensors it took over.
    """

    name: ClassVar[str]
    cites: ClassVar[str] = ""
    keeps: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ()  # attributes that its text form shows
    stays: ClassVar[str] = ""  # why `recalibrate_` leaves its statistics alone unless it is named; "" where it does not

    site: str = ""  # the dotted name of its place, once `convert_` has put it there
    origin: type[nn.Module] | None = None  # torch's class that stood there before, if it was one
    act: Any

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The normalised `x`, of the same shape."""

    @abstractmethod
    def take_(self, held: BatchNormTensors) -> None:
        """Hold the tensors of a batch norm, themselves where this layer has the like."""

    def _set_act(self, act: Act) -> None:
        if isinstance(act, str):
            act = _activation(act)
        if act is not None and not callable(act):
            raise UsageError(f"act is the name of an activation of torch.nn, a module or a function; got {act!r}.")
        self.act = act

    def _activated(self, y: Tensor) -> Tensor:
        drop = self._modules.get("drop")  # what timm's batch norm with activation may hold besides
        y = y if drop is None else drop(y)
        return y if self.act is None else self.act(y)

    @property
    def where(self) -> str:
        """The layer in words, for messages."""
        return f"{type(self).__name__} at {self.site!r}" if self.site else f"{type(self).__name__}"

    def extra_repr(self) -> str:
        own = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.options)
        return super().extra_repr() + (f", {own}" if own else "")


class BatchNormTensors(NamedTuple):
    """What a batch norm consists of. Shapes: (C,), tracked ()."""

    mean: Tensor
    var: Tensor
    tracked: Tensor
    weight: nn.Parameter | None
    bias: nn.Parameter | None


class Tracking(Layer, _NormBase):
    """A batch norm of any rank; a subclass changes which moments normalise in training, in evaluation, or both.

    It has torch's attributes, `state_dict` keys and conventions: momentum is the weight of the new batch, a batch normalises
    by its biased variance, and the unbiased one is stored. `axis` is the dimension that holds the channels.

    What torch's own does not do: a batch with a value that is not finite leaves the statistics alone and is counted in
    `skipped`; gradient checkpointing does not count a batch twice; `momentum=None` compiles.

    It is no subclass of torch's `_BatchNorm`, so that `convert_sync_batchnorm` does not quietly make another layer of it.

    Shapes: x (N, C, *) → the same, with C along `axis`.
    Raises UsageError for a momentum outside [0, 1] or an `eps` below 0; on a call BatchError for another number of channels
    and, in training, for a batch that holds one value per channel.
    """

    needs_two_values: ClassVar[bool] = True  # whether one value per channel is refused in training

    skipped: Tensor
    num_batches_tracked: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        act: Act = None,
        axis: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if momentum is not None and not 0 <= momentum <= 1:
            raise UsageError(f"momentum is the weight of the new batch, in [0, 1], or None; got {momentum!r}.")
        if not eps >= 0:
            raise UsageError(f"eps is added to a variance and must not be below 0; got {eps!r}.")
        if num_features < 0:
            raise UsageError(f"num_features is a number of channels; got {num_features!r}.")
        _NormBase.__init__(self, num_features, eps, momentum, affine, True, device, dtype)
        # not in the state: torch's batch norm has no such key, and a checkpoint must go both ways
        self.register_buffer("skipped", torch.zeros((), dtype=torch.long, device=device), persistent=False)
        self.axis: int = axis
        self._set_act(act)

    def forward(self, x: Tensor) -> Tensor:
        return self._finished(self._normalised(self._first(x)))

    @abstractmethod
    def _normalised(self, x: Tensor) -> Tensor:
        """What the layer gives in the mode it is in, before the activation. Shapes: x (N, C, *)."""

    def _by_held(self, x: Tensor) -> Tensor:
        """`x` normalised by the running statistics, as a batch norm does in evaluation. Shapes: x (N, C, *)."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def _by_batch(self, x: Tensor) -> Tensor:
        """`x` normalised by its own moments, which move the statistics, as in a batch norm in training. Shapes: x (N, C, *)."""
        # The kernel leaves mean and unbiased variance in its buffers: scratch, so that they can be looked at before they count.
        mean, unbiased = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        y = F.batch_norm(x, mean, unbiased, self.weight, self.bias, True, 1.0, self.eps)
        self._track(mean, unbiased)
        return y

    def plain(self) -> BatchNormTensors:
        """The batch norm that, in evaluation, gives what this layer gives, or comes nearest to it."""
        return BatchNormTensors(self.running_mean, self.running_var, self.num_batches_tracked, self.weight, self.bias)

    def take_(self, held: BatchNormTensors) -> None:
        self.running_mean, self.running_var, self.num_batches_tracked = held.mean, held.var, held.tracked
        for name in ("weight", "bias"):
            setattr(self, name, getattr(held, name))

    def _scale(self, var: Tensor, weight: Tensor | None) -> Tensor:
        scale = torch.rsqrt(var + self.eps)
        return scale if weight is None else scale * weight

    def _first(self, x: Tensor) -> Tensor:
        """`x` with its channels in dimension 1, checked."""
        axis = self.axis if self.axis >= 0 else x.dim() + self.axis
        if x.dim() < 2 or not 0 < axis < x.dim() or x.shape[axis] != self.num_features:
            raise BatchError(
                f"{self.where} has {self.num_features} channels along dimension {self.axis} of its input, and was given "
                f"the shape {tuple(x.shape)}."
            )
        if self.training and self._refuses_one_value() and x.numel() <= self.num_features:
            raise BatchError(
                f"{self.where} was given the shape {tuple(x.shape)} in training: one value per channel has no variance. "
                "Use larger batches (`drop_last=True`), or freeze the layer."
            )
        return x if axis == 1 else x.movedim(axis, 1)

    def _refuses_one_value(self) -> bool:
        return self.needs_two_values

    def _finished(self, y: Tensor) -> Tensor:
        """The activated `y`, with its channels where those of the input were."""
        return self._activated(y if self.axis == 1 else y.movedim(1, self.axis))

    def _track(self, mean: Tensor, unbiased: Tensor) -> None:
        """Move the statistics towards a batch's mean and unbiased variance; not where these are not finite."""
        if not self.track_running_stats or recomputing():
            return
        with torch.no_grad():
            ok = torch.isfinite(mean.sum() + unbiased.sum())
            self.num_batches_tracked.add_(ok)
            self.skipped.add_(~ok)
            factor = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            for held, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                moved = held + factor * (new.to(held.dtype) - held)
                held.copy_(torch.where(ok, moved, held))

    def _track_values(self, x: Tensor, mean: Tensor, var: Tensor) -> None:
        """`_track` for the moments of `x`, given the biased variance."""
        self._track(mean, unbiased(var, x.numel() // x.shape[1]))


class Held(NamedTuple):
    """What a layer held at a moment: running mean, running variance, and the number of batches behind them."""

    mean: Tensor
    var: Tensor
    batches: Tensor


class Mixing(Tracking):
    """A layer that normalises by a mix of the batch's moments and what it holds, or otherwise reads this in training.

    What it reads is what it held before the batch moved it, also where gradient checkpointing runs the forward again.
    """

    KEPT = 8  # batches between a forward and its recomputation: more micro-batches than that are not in flight at once

    def __init__(self, num_features: int, **common: Any) -> None:
        super().__init__(num_features, **common)
        self._met: deque[tuple[Tensor, Held]] = deque(maxlen=self.KEPT)

    def _held(self, x: Tensor) -> Held:
        """Copies of the statistics held when this batch first came."""
        if self.training and recomputing() and self._met:
            mean = _mean(x)
            return min(self._met, key=lambda met: float((met[0] - mean).abs().nan_to_num(torch.inf).max()))[1]
        held = Held(*(t.detach().clone() for t in (self.running_mean, self.running_var, self.num_batches_tracked)))
        if self.training and not torch.compiler.is_compiling():
            self._met.append((_mean(x), held))
        return held


def _mean(x: Tensor) -> Tensor:
    """Enough of a batch to know it again."""
    return x.detach()[:1].flatten(2).float().mean(-1) if x.dim() > 2 else x.detach()[:1].float()


def mixed(
    mean: Tensor, var: Tensor, held_mean: Tensor, held_var: Tensor, share: Tensor | float
) -> tuple[Tensor, Tensor]:
    """`share` of what is held and the rest of the batch's moments, without the term between the means."""
    return share * held_mean + (1 - share) * mean, share * held_var + (1 - share) * var


def finite_or(mean: Tensor, var: Tensor, held_mean: Tensor, held_var: Tensor) -> tuple[Tensor, Tensor]:
    """The batch's moments, and what is held in the channels where those are not finite."""
    finite = torch.isfinite(mean + var)
    return torch.where(finite, mean, held_mean.to(mean.dtype)), torch.where(finite, var, held_var.to(var.dtype))


def unbiased(var: Tensor, count: int) -> Tensor:
    """The unbiased variance; not a number, and so left out of statistics, where one value has none."""
    return var * (count / (count - 1)) if count > 1 else torch.full_like(var, torch.nan)


@cache
def catalogue() -> dict[str, type[Layer]]:
    """Every layer in this folder, by its name."""
    return members("renorm.layers", Layer)


def options_of(layer: type[Layer]) -> list[str]:
    """The options of a layer beyond those that every layer has."""
    return [name for name in inspect.signature(layer).parameters if name not in COMMON]


def checked_options(layer: type[Layer], options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` as they are.

    Raises UnknownName for one that the layer does not have.
    """
    for option in options:
        if option not in options_of(layer):
            raise UnknownName(f"option of the layer {layer.name!r}", option, options_of(layer))
    return dict(options)


def _activation(name: str) -> nn.Module:
    home = nn.modules.activation
    known = {
        thing.__name__: thing
        for thing in vars(home).values()
        if isinstance(thing, type) and issubclass(thing, nn.Module) and thing.__module__ == home.__name__
    }
    lower = {key.lower(): found for key, found in known.items()}
    if name.lower() not in lower:
        raise UnknownName("activation", name, sorted(known))
    return lower[name.lower()]()
