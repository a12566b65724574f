"""Diverse, certain samples; answers that agree under small changes; a pull back to the source; the class mix in the answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from renorm.calls import map_tensors
from renorm.online.base import Running, State, Subject, check_positive, check_share
from renorm.online.kinds.descent import Descending, Gradient


@dataclass(frozen=True, kw_only=True)
class Roid(Gradient):
    """Weighted soft likelihood ratio, consistency, weight ensembling and prior correction (Marsden et al. 2024, sec. 4).

    Two forwards a batch. The change for the consistency term is a mirrored and by up to two pixels shifted copy of images,
    and Gaussian noise of a twentieth of the spread elsewhere; the paper uses stronger ones. The prior is added to log
    probabilities: the official code multiplies logits, which pushes negative ones the wrong way. A batch of one, or of equal
    answers, weighs its samples equally instead of dividing by zero.

    temperature   of the sample weights `exp(diversity · certainty / temperature)`
    keep          the trained share of the parameters after every step; the rest is the source's
    consistency   whether the second forward is run
    """

    name: ClassVar[str] = "roid"
    any_norm: ClassVar[bool] = True
    cites: ClassVar[str] = (
        "@inproceedings{marsden2024universal, title={Universal test-time adaptation through weight ensembling, diversity "
        'weighting, and prior correction}, author={Marsden, Robert A. and D{\\"o}bler, Mario and Yang, Bin}, '
        "booktitle={WACV}, year={2024}}"
    )

    temperature: float = 1 / 3
    keep: float = 0.99
    consistency: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "temperature")
        check_share(self, "keep")

    def start(self, subject: Subject) -> Running:
        return _Ensembling(subject, self)


class _Ensembling(Descending):
    def __init__(self, subject: Subject, method: Roid) -> None:
        super().__init__(subject, method)
        self._method = method
        self._batch: Any = None
        self._mean: Tensor | None = None
        self._steps = 0

    def begin(self, samples: int, batch: Any, *, learn: bool) -> None:
        self._batch = batch

    def loss(self, logits: Tensor) -> Tensor | None:
        probabilities = logits.detach().softmax(1)
        mean = torch.full_like(probabilities[0], 1 / logits.shape[1]) if self._mean is None else self._mean
        diversity = _between(1 - F.cosine_similarity(mean[None], probabilities, dim=1))
        certainty = _between((probabilities * probabilities.clamp_min(1e-12).log()).sum(1))
        weights = (diversity * certainty / self._method.temperature).exp()
        kept = diversity >= diversity.mean()
        if not bool(kept.any()):
            return None
        loss = (soft_likelihood_ratio(logits)[kept] * weights[kept]).sum() / len(logits)
        if self._method.consistency:
            changed = self.scores(_changed(self._batch, self._steps))
            loss = loss + (_symmetric(logits, changed)[kept] * weights[kept]).sum() / len(logits)
        self._mean = 0.9 * mean + 0.1 * probabilities.mean(0)
        return loss

    def finish(self, logits: Tensor) -> None:
        super().finish(logits)
        self._steps += 1
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.lerp_(self.origin[name], 1 - self._method.keep)
        self._batch = None

    def answer(self, logits: Tensor) -> Tensor:
        mix = logits.detach().softmax(1).mean(0)
        smooth = max(1 / len(logits), 1 / logits.shape[1]) / max(1e-12, float(mix.max()))
        prior = (mix + smooth) / (1 + smooth * len(mix))
        return logits.log_softmax(1) + prior.log()

    def back_to_source(self) -> None:
        super().back_to_source()
        self._mean = None

    def state(self) -> State:
        found = super().state() | {"steps": torch.tensor(self._steps)}
        return found if self._mean is None else found | {"mean": self._mean.clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        self._steps = int(state["steps"])
        self._mean = state["mean"].clone() if "mean" in state else None


def soft_likelihood_ratio(logits: Tensor) -> Tensor:
    """`−Σ p ln(p / (1 − p) + 1e-5)` with p at most 0.99, per row. Shapes: (N, K) → (N,)."""
    p = logits.softmax(1).clamp(0, 0.99)
    return -(p * (p / (1 - p) + 1e-5).log()).sum(1)


def _symmetric(logits: Tensor, changed: Tensor) -> Tensor:
    one, other = logits.softmax(1), changed.softmax(1)
    return -0.5 * (one * changed.log_softmax(1)).sum(1) - 0.5 * (other * logits.log_softmax(1)).sum(1)


def _between(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    return torch.ones_like(values) if float(high - low) < 1e-12 else (values - low) / (high - low)


def _changed(batch: Any, step: int) -> Any:
    """A copy of the batch a little changed, the same for the same step."""
    generator = torch.Generator().manual_seed(step)

    def change(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        if x.dim() == 4:
            by = torch.randint(-2, 3, (2,), generator=generator).tolist()
            return torch.roll(x.flip(-1), by, (-2, -1))
        noise = torch.randn(x.shape, generator=generator).to(x)
        return x + 0.05 * x.std() * noise if x.numel() > 1 else x

    return map_tensors(change, batch)
