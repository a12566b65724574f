"""The zoo's own animals: small modules that do the odd things real ones do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def convs(*norms: nn.Module, channels: int = 4) -> nn.Sequential:
    """conv, norm, ReLU for each norm, then pooling and a head of three classes; (N, 3, H, W) in, (N, 3) out."""
    parts: list[nn.Module] = []
    width = 3
    for norm in norms:
        parts += [nn.Conv2d(width, channels, 3, padding=1), norm, nn.ReLU()]
        width = channels
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


class FrozenInFour(nn.Module):
    """Frozen batch norm as detection code bases write it: four buffers, no parameters, no counter."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = channels
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0 - eps)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, eps=self.eps)


class FrozenWithHiddenEps(nn.Module):
    """Frozen batch norm as detection transformers write it: a local eps, the counter's key dropped."""

    def __init__(self, n: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((n,), value))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, var, mean = (
            t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_var, self.running_mean)
        )
        epsilon = 1e-5
        scale = weight * (var + epsilon).rsqrt()
        return x * scale + (bias - mean * scale)


class ToyRMSNorm(nn.Module):
    """Root mean square norm as language models write it."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon)).to(hidden_states.dtype)


class LookAlike(nn.Module):
    """Has the attributes of a batch norm's statistics, but they are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.running_mean = [0.0, 0.0]
        self.running_var = "large"

    def forward(self, x: Tensor) -> Tensor:
        return x


class BatchNormReLU(nn.Module):
    """Named like a norm, but only holds one; has an attribute that Keras uses for its own lists."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self._layers = 2
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x).relu()


class Functional(nn.Module):
    """Calls F.batch_norm with buffers under names of its own; beside it one norm that can be found."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.register_buffer("mu", torch.full((4,), 0.1))
        self.register_buffer("sigma2", torch.full((4,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.conv(x), self.mu, self.sigma2, training=self.training)
        return self.bn(x).mean((2, 3))


class SharedNorm(nn.Module):
    """One batch norm under two names, called once under each, on values of different size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.first = nn.BatchNorm2d(4)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.conv(x))
        return self.second(F.avg_pool2d(x, 2) + 1).mean((2, 3))


class CalledTwice(nn.Module):
    """One batch norm called twice under its one name, as a siamese net does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.bn(self.conv(x)), self.bn(self.conv(x.flip(-1)) * 2)
        return (left - right).mean((2, 3))


class NeverCalled(nn.Module):
    """Holds one batch norm that forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.used = nn.BatchNorm2d(4)
        self.spare = nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(self.conv(x)).mean((2, 3))


class TwoInputs(nn.Module):
    """forward takes two tensors, by position or by the names `image` and `depth`."""

    def __init__(self) -> None:
        super().__init__()
        self.colour = nn.Conv2d(3, 4, 3)
        self.distance = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, image: Tensor, depth: Tensor) -> Tensor:
        return self.bn(self.colour(image) + self.distance(depth)).mean((2, 3))


class TakesDict(nn.Module):
    """forward takes one dict, as it comes from the loader."""

    def __init__(self) -> None:
        super().__init__()
        self.net = convs(nn.BatchNorm2d(4))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["image"])


@dataclasses.dataclass
class Answer:
    """What a library model returns."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...] = ()
    loss: Tensor | None = None


class Returns(nn.Module):
    """A small net that wraps its logits by `wrap`."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        hidden = self.bn(self.conv(x))
        return self.wrap(self.head(hidden.mean((2, 3))), hidden)


def as_dict(logits: Tensor, hidden: Tensor) -> dict[str, Tensor]:
    return {"hidden": hidden, "logits": logits}


def as_answer(logits: Tensor, hidden: Tensor) -> Answer:
    return Answer(logits, (hidden,))


def as_tuple(logits: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return logits, hidden


class Scaling(nn.Module):
    """Looks like a wrapper, having one part called `module`, but does something of its own before it."""

    def __init__(self) -> None:
        super().__init__()
        self.module = convs(nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x * 3 - 1)


class TwoSets(nn.Module):
    """Two sets of statistics in one module, after the protocol of slots: even samples are `day`, odd ones `night`."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.on_slot: Callable[[str, Tensor], None] | None = None
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("means", torch.tensor([[-0.2], [0.4]]).repeat(1, channels))
        self.register_buffer("variances", torch.tensor([[0.7], [1.6]]).repeat(1, channels))

    def slots(self) -> Sequence[str]:
        return ("day", "night")

    def slot_statistics(self, slot: str) -> tuple[Tensor, Tensor]:
        row = self.slots().index(slot)
        return self.means[row], self.variances[row]

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for row, slot in enumerate(self.slots()):
            part = x[row::2]
            if part.numel() == 0:
                continue
            if self.on_slot is not None:
                self.on_slot(slot, part)
            mean, var = self.slot_statistics(slot)
            out[row::2] = F.batch_norm(part, mean, var, self.weight, self.bias, False, eps=self.eps)
        return out


class OverTime(nn.Module):
    """Sequences (N, T, 3) through a recurrent network with statistics for four steps, and a batch norm."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.rnn: Any = kind(3, 4, steps=4, batch_first=True)
        self.bn = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)
        for module in self.rnn.children():
            module.tracked.fill_(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.rnn(x)[0][:, -1]))
