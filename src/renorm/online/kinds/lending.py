"""What the methods without gradients share: each batch norm is lent moments, and statistics run along with the stream."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor

from renorm.moments import Moments
from renorm.online.base import Early, Running, State, Subject, glance, packed, unpacked
from renorm.sites import Site


class Lending(Running):
    """Every site normalises by a blend of what it held and what the batch shows; nothing is kept from batch to batch."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self._samples = 0
        self._early = Early(subject.sites, self.held)

    def begin(self, samples: int, batch: object, *, learn: bool) -> None:
        self._samples = samples

    def visit(self, site: Site, x: Tensor) -> None:
        self._early.see(site, x)
        seen = glance(x, axis=site.axis)
        if seen is not None:
            site.normalise_by_(self.lent(site, seen, self._samples))

    def finish(self, logits: Tensor) -> None:
        self._early.commit()

    @property
    def moved(self) -> float:
        return self._early.moved

    def state(self) -> State:
        return self._early.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._early.load(state)

    @abstractmethod
    def lent(self, site: Site, seen: Moments, samples: int) -> Moments:
        """What `site` normalises a batch of `samples` samples with these moments by."""


class Following(Lending):
    """Running statistics that follow the stream, updated once a batch, by `rate` at 64 samples."""

    def __init__(self, subject: Subject, *, rate: float) -> None:
        super().__init__(subject)
        self.rate = rate
        self.running: dict[str, Moments] = {}
        self._now: dict[str, Moments] = {}

    def begin(self, samples: int, batch: object, *, learn: bool) -> None:
        super().begin(samples, batch, learn=learn)
        self._now = {}

    def finish(self, logits: Tensor) -> None:
        super().finish(logits)
        self.running.update(self._now)

    def settle(self) -> None:
        for site in self.subject.sites:
            site.normalise_by_(self.running.get(site.name, self.held[site.name]))

    def state(self) -> State:
        order = {name: self.running.get(name, held) for name, held in self.held.items()}
        return super().state() | (packed(order) if self.running else {})

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        self.running = unpacked(state, self.held)

    def moved_by(self, site: Site, seen: Moments, samples: int, start: Moments) -> Moments:
        """The running moments with this batch in them; it counts from `finish` on."""
        share = 1 - (1 - self.rate) ** (samples / 64)
        before = self.running.get(site.name, start)
        self._now[site.name] = before.blend(seen, source_weight=1 - share, cross_term=False)
        return self._now[site.name]
