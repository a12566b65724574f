"""What the gradient methods share: normalise by the batch, take one step on the affine parameters, keep the source at hand."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from renorm.errors import UnknownName, UsageError
from renorm.observe import visiting
from renorm.online.base import Early, Online, Running, State, Subject, check_positive, refuse_slots
from renorm.sites import Site

OPTIMISERS = ("adam", "sgd")


@dataclass(frozen=True, kw_only=True)
class Gradient(Online):
    """The options of every gradient method; only scale and shift of the norm layers are trained.

    lr         of the optimiser; official values are 1e-3 with adam at 32 × 32 and 2.5e-4 with sgd at 224 × 224
    optimiser  "adam" (0.9, 0.999) or "sgd" with momentum 0.9; no weight decay
    """

    lr: float = 1e-3
    optimiser: Literal["adam", "sgd"] = "adam"

    def __post_init__(self) -> None:
        check_positive(self, "lr")
        if self.optimiser not in OPTIMISERS:
            raise UnknownName("optimiser", self.optimiser, OPTIMISERS)


class Descending(Running):
    """One step down a loss after every batch, on the scale and shift of the norm layers.

    Batch norms normalise by the batch, with its gradient, whatever the caller's mode; a single value per channel leaves the
    source's statistics. A loss or a gradient that is not finite moves nothing: `skipped` counts those.
    """

    trains = True

    def __init__(self, subject: Subject, method: Gradient) -> None:
        super().__init__(subject)
        refuse_slots(subject, method)
        self.parameters: dict[str, torch.nn.Parameter] = {
            f"{site.name}.{key}": p for site in subject.norms for key, p in site.affine.items()
        }
        if not self.parameters:
            raise UsageError(
                f"the online method {method.name!r} trains the scale and shift of norm layers, and this model has none that "
                "are parameters (frozen copies keep buffers); use a method without gradients, such as shrink."
            )
        self.origin: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.skipped: int = 0
        self._early = Early(subject.sites, self.held)
        held = list(self.parameters.values())
        adam = method.optimiser == "adam"
        self._optimiser: torch.optim.Optimizer = (
            torch.optim.Adam(held, lr=method.lr) if adam else torch.optim.SGD(held, lr=method.lr, momentum=0.9)
        )

    def visit(self, site: Site, x: Tensor) -> Tensor | None:
        self._early.see(site, x)
        return by_batch(site, x)

    @property
    def moved(self) -> float:
        return self._early.moved

    def finish(self, logits: Tensor) -> None:
        loss = self.loss(logits)
        if loss is not None:
            self.step(loss)
        self._early.commit()

    @abstractmethod
    def loss(self, logits: Tensor) -> Tensor | None:
        """What the next step goes down; None where no sample is worth one. Shapes: logits (N, K) with their graph."""

    def step(self, loss: Tensor) -> None:
        """One step of the optimiser, unless anything about it is not finite."""
        parameters = list(self.parameters.values())
        grads: Any = [None] * len(parameters)
        if bool(torch.isfinite(loss)):
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        known = [grad for grad in grads if grad is not None]
        if not known or not all(bool(torch.isfinite(grad).all()) for grad in known):
            self.skipped += 1
            return
        before = [p.grad for p in parameters]  # the caller's own
        try:
            for p, grad in zip(parameters, grads, strict=True):
                p.grad = grad
            self._optimiser.step()
        finally:
            for p, grad in zip(parameters, before, strict=True):
                p.grad = grad

    def scores(self, batch: Any) -> Tensor:
        """One row of class scores per sample, normalised as the batch that is learnt from is."""
        with visiting(self.subject.model, self.subject.sites, by_batch):
            return self.subject.logits(batch)

    def back_to_source(self) -> None:
        """Parameters and optimiser as they were before the first step."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.origin[name])
        self._optimiser.state.clear()

    def state(self) -> State:
        found = self._early.state()
        found |= {f"parameter.{name}": p.detach().clone() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self._optimiser.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"optimiser.{key}.{name}"] = value.detach().clone()
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._optimiser.state.clear()
        self._early.load(state)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[f"parameter.{name}"])
                own: dict[str, Any] = {}
                for key in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer"):
                    value = state.get(f"optimiser.{key}.{name}")
                    if value is not None:
                        own[key] = value.clone()
                if own:
                    self._optimiser.state[parameter] = own


def by_batch(site: Site, x: Tensor) -> Tensor | None:
    """`x` such that `site`, normalising by what it holds, gives `x` normalised by its own moments, with their gradient.

    None where there is one value per channel. Shapes: x (N, C, *), and the result.
    """
    held = site.statistics()
    moved = x.movedim(site.axis, 1)
    if held is None or moved.numel() // max(1, moved.shape[1]) < 2:
        return None
    scale, shift = (held.var + site.eps).sqrt().to(moved), held.mean.to(moved)
    return F.batch_norm(moved, None, None, scale, shift, True, 0.0, site.eps).movedim(1, site.axis)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each row's softmax, in nats. Shapes: (N, K) → (N,)."""
    logs = logits.log_softmax(1)
    return -(logs.exp() * logs).sum(1)
