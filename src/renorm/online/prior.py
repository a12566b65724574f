"""The source counts as a few samples beside every batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from renorm.errors import UsageError
from renorm.moments import Moments
from renorm.online.base import Online, Running, Subject
from renorm.online.kinds.lending import Lending
from renorm.sites import Site


@dataclass(frozen=True, kw_only=True)
class Prior(Online):
    """A batch of n is normalised by `N/(N+n)` of the source and the rest of itself (Schneider et al. 2020, eq. 4).

    images   N, what the source counts as; 16 was best at batches of one. The variance blended is the unbiased one, as there
    """

    name: ClassVar[str] = "prior"
    cites: ClassVar[str] = (
        "@inproceedings{schneider2020covariate, title={Improving robustness against common corruptions by covariate shift "
        "adaptation}, author={Schneider, Steffen and Rusak, Evgenia and Eck, Luisa and Bringmann, Oliver and Brendel, Wieland "
        "and Bethge, Matthias}, booktitle={NeurIPS}, year={2020}}"
    )

    images: int = 16

    def __post_init__(self) -> None:
        if isinstance(self.images, bool) or not isinstance(self.images, int) or self.images < 0:
            raise UsageError(f"images of prior is how many the source counts as, 0 or more; got {self.images!r}.")

    def start(self, subject: Subject) -> Running:
        return _Beside(subject, self.images)


class _Beside(Lending):
    def __init__(self, subject: Subject, images: int) -> None:
        super().__init__(subject)
        self._images = images

    def lent(self, site: Site, seen: Moments, samples: int) -> Moments:
        weight = self._images / (self._images + samples)
        unbiased = Moments(seen.count, seen.mean, seen.unbiased)
        return self.held[site.name].blend(unbiased, source_weight=weight, cross_term=False)

    @property
    def target_weight(self) -> float:
        return self._samples / max(1, self._images + self._samples)
