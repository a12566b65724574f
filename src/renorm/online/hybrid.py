"""Only channels that say little about the class follow the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from renorm.moments import Moments
from renorm.online.base import Online, Running, State, Subject, check_share, profile_of
from renorm.online.kinds.lending import Lending
from renorm.profile import Profile
from renorm.shift import Shift
from renorm.sites import Site


@dataclass(frozen=True, kw_only=True)
class Hybrid(Online):
    """Channel-selective normalisation: batch moments where a channel hardly tells classes apart, the source's elsewhere.

    A channel's score is the Wasserstein distance between the source's moments and those of each class, averaged by the class
    mix predicted so far (Vianna et al. 2025, sec. 3). The share of channels that follow the batch, those of the lowest
    scores, falls linearly from `first` at the first site to `last` at the last: later layers know more of classes. How fast
    it falls is ours; the paper tunes a threshold. Needs the source's class moments, a profile.
    """

    name: ClassVar[str] = "hybrid"
    needs_source: ClassVar[bool] = True
    cites: ClassVar[str] = (
        "@inproceedings{vianna2025channel, title={Channel-selective normalization for label-shift robust test-time "
        "adaptation}, author={Vianna, Pedro and Chaudhary, Muawiz and Mehrbod, Paria and Tang, An and Cloutier, Guy and Wolf, "
        "Guy and Eickenberg, Michael and Belilovsky, Eugene}, booktitle={Conference on Lifelong Learning Agents}, year={2025}}"
    )

    first: float = 1.0
    last: float = 0.0

    def __post_init__(self) -> None:
        check_share(self, "first", "last")

    def start(self, subject: Subject) -> Running:
        return _Selective(subject, self, profile_of(subject, self))


class _Selective(Lending):
    def __init__(self, subject: Subject, method: Hybrid, profile: Profile) -> None:
        super().__init__(subject)
        self._profile = profile
        classes = torch.eye(len(profile.counts), dtype=torch.float64)
        at = [profile.at(mix) for mix in classes]
        self._distances = {
            name: torch.stack([Shift.between(held, each[name]).wasserstein2 for each in at])
            for name, held in self.held.items()
            if name in profile.held
        }
        steps = max(1, len(self.held) - 1)
        self._share = {
            name: method.first + (method.last - method.first) * k / steps for k, name in enumerate(self.held)
        }
        self._mix = profile.prior
        self._follow = self._chosen()

    def lent(self, site: Site, seen: Moments, samples: int) -> Moments:
        held, follow = self.held[site.name], self._follow.get(site.name)
        if follow is None:
            return held
        return Moments(seen.count, torch.where(follow, seen.mean, held.mean), torch.where(follow, seen.var, held.var))

    def finish(self, logits: Tensor) -> None:
        super().finish(logits)
        probabilities = logits.detach().double().cpu().softmax(1)
        self._mix = 0.95 * self._mix + 0.05 * probabilities.mean(0)
        self._follow = self._chosen()

    def _chosen(self) -> dict[str, Tensor]:
        return {name: least(self._mix @ distances, self._share[name]) for name, distances in self._distances.items()}

    @property
    def target_weight(self) -> float:
        return sum(float(f.double().mean()) for f in self._follow.values()) / max(1, len(self._follow))

    def state(self) -> State:
        return super().state() | {"mix": self._mix.clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        self._mix = state["mix"].clone()
        self._follow = self._chosen()


def least(scores: Tensor, share: float) -> Tensor:
    """Which channels are the `share` of lowest scores, by their number rounded. Shapes: (C,) → (C,) bool."""
    count = round(share * len(scores))
    chosen: Tensor = torch.zeros(len(scores), dtype=torch.bool)
    chosen[scores.argsort(stable=True)[:count]] = True
    return chosen
