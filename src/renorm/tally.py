"""What is counted at one norm layer while a loop runs: its updates by their kind, and the last finite statistics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from renorm.lean import is_lent
from renorm.moments import Moments
from renorm.sites import Site

__all__ = ["Counts", "Kept", "Tally", "by_place"]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a loop did to the statistics of one batch norm.

    updates     {updates between two steps of the optimiser: how many steps had so many}; what follows is left out
    again       updates made once more while gradients were computed: activation checkpointing
    silent      updates without gradients
    validating  updates while validating, as far as the watch was told
    calls       the most calls in one forward of the model
    samples     the fewest samples that it normalised by; 0 where none was seen
    """

    updates: Mapping[int, int]
    again: int = 0
    silent: int = 0
    validating: int = 0
    calls: int = 0
    samples: int = 0

    @property
    def usual(self) -> int:
        """The number of updates that most steps had, of those that had any."""
        some = {number: steps for number, steps in self.updates.items() if number}
        return max(some, key=lambda number: some[number], default=0)

    @property
    def trained(self) -> int:
        """Updates with gradients."""
        return sum(number * steps for number, steps in self.updates.items())


class Tally:
    """What is counted at one site: since the last step, and in all."""

    def __init__(self, site: Site, owner: int) -> None:
        self.site = site
        self.owner = owner
        self.polled = False
        self.live: int = 0
        self.again: int = 0
        self.silent: int = 0
        self.validating: int = 0
        self.samples: int = 0
        self._momentum = site.momentum
        self._updates: Counter[int] = Counter()
        self._again = self._silent = self._forward = self._calls = self._most = 0
        self._version = 0
        self.look()

    def moves(self) -> bool:
        """Whether a forward in training moves the statistics as in training.

        One who set another momentum re-estimates them, and a block that `lean_` runs again works on copies.
        """
        site = self.site
        if any(map(is_lent, site.tensors or ())):
            return False
        return site.momentum == self._momentum and site.tracks

    def look(self) -> int:
        """How often the layer's counter moved since the last look."""
        counter = getattr(self.site.module, "num_batches_tracked", None)
        before, self._version = self._version, counter._version if isinstance(counter, Tensor) else 0
        return max(0, self._version - before)

    def called(self, forward: int) -> None:
        self._calls = self._calls + 1 if forward == self._forward else 1
        self._forward = forward
        if forward > 0:  # below: called by itself, not within a forward of the model
            self._most = max(self._most, self._calls)

    def close_step(self) -> None:
        live, silent, again = self._split()
        self._updates[live] += 1
        self._silent += silent
        self._again += again
        self.live = self.silent = self.again = 0

    def _split(self) -> tuple[int, int, int]:
        """Updates, silent ones and repeated ones since the last step.

        Reentrant checkpointing runs its first pass without gradients: as many silent updates as were repeated beyond the
        live ones are such first passes.
        """
        first = min(self.silent, max(0, self.again - self.live))
        return self.live + first, self.silent - first, self.again

    def counts(self) -> Counts:
        live, silent, again = self._split()
        return Counts(
            updates=dict(self._updates if self._updates else Counter([live])),
            again=self._again + again,
            silent=self._silent + silent,
            validating=self.validating,
            calls=self._most,
            samples=self.samples,
        )


class Kept:
    """The last finite value of every statistic of some sites on one device, kept without waiting for the device."""

    def __init__(self, tallies: Sequence[Tally]) -> None:
        self._sites = [tally.site for tally in tallies]
        self._values = self._flat()

    def _flat(self) -> Tensor:
        return torch.cat([t.detach() for site in self._sites for t in site.tensors or ()])

    def keep(self) -> None:
        now = self._flat()
        if now.shape == self._values.shape and now.device == self._values.device:
            self._values = torch.where(now.isfinite(), now, self._values)
        else:  # resized, or moved to another device
            self._values = now

    def poisoned(self) -> Iterator[tuple[str, Moments]]:
        """The sites whose statistics are not finite though their affine is, with the values kept."""
        parts = iter(torch.split(self._values, [t.numel() for site in self._sites for t in site.tensors or ()]))
        for site in self._sites:
            mean, var = next(parts), next(parts)
            broken = not all(bool(t.isfinite().all()) for t in site.tensors or ())
            if broken and all(bool(p.isfinite().all()) for p in site.affine.values()):
                yield site.name, Moments(float("inf"), mean.double().cpu(), var.double().cpu())


def by_place(tallies: Sequence[Tally]) -> list[list[Tally]]:
    """The tallies whose statistics lie on one device in one dtype, together."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tally]] = {}
    for tally in tallies:
        mean, _ = tally.site.tensors or (torch.empty(0), None)
        groups.setdefault((mean.device, mean.dtype), []).append(tally)
    return list(groups.values())
