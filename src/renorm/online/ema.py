"""Running statistics that follow the stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from renorm.moments import Moments
from renorm.online.base import Online, Running, Subject, check_share
from renorm.online.kinds.lending import Following
from renorm.sites import Site


@dataclass(frozen=True, kw_only=True)
class Ema(Online):
    """Each batch moves the statistics by `rate` and is normalised by what comes out (Yuan et al. 2023, eq. 4).

    rate   the share of a batch of 64; one of n counts `1 − (1 − rate)^(n/64)`, so that the batch size changes nothing
    """

    name: ClassVar[str] = "ema"
    cites: ClassVar[str] = (
        "@inproceedings{yuan2023robust, title={Robust test-time adaptation in dynamic scenarios}, author={Yuan, Longhui and "
        "Xie, Binhui and Li, Shuang}, booktitle={CVPR}, year={2023}}"
    )

    rate: float = 0.05

    def __post_init__(self) -> None:
        check_share(self, "rate")

    def start(self, subject: Subject) -> Running:
        return _Running(subject, rate=self.rate)


class _Running(Following):
    def lent(self, site: Site, seen: Moments, samples: int) -> Moments:
        return self.moved_by(site, seen, samples, self.held[site.name])
