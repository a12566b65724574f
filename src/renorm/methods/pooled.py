"""Re-estimate statistics from all target batches pooled, with the source as a prior."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from renorm.calls import Caller
from renorm.errors import UsageError
from renorm.methods.base import Estimate, Method
from renorm.moments import FLOOR, Moments, Observed, source_share
from renorm.observation import Observation
from renorm.observe import finish, observing
from renorm.profile import Profile
from renorm.said import say
from renorm.shift import Shift
from renorm.sites import Site


@dataclass(frozen=True, kw_only=True)
class Pooled(Method):
    """Every site holds the target's moments, measured in batch mode and pooled exactly, blended with the source's.

    prior       "auto": per layer, by the noise of the target's moments: with z the mean over channels of the squared standard
                error of the mean in source sd, the source's share is 0.1 + 0.9 · 20 z / (1 + 20 z), and variances are blended
                geometrically; a profile's gap raises the 0.1 where the layer moved little against it;
                an integer N: the source counts as N images (Schneider et al. 2020, eq. 4); 0: the source is forgotten
    tolerance   stop reading once the standard error of the mean, in source standard deviations (root mean square over
                channels), is below this at every site; None: read everything. 0.05 takes about 200 images, 0.01 about 4,000

    With all batches read and `prior=0` this is AdaBN (Li et al. 2016) as PreciseBN (Wu and Johnson 2021, sec. 3) computes it,
    with exact pooling in place of averages of batches.
    """

    name: ClassVar[str] = "pooled"
    cites: ClassVar[str] = (
        "@inproceedings{schneider2020covariate, title={Improving robustness against common corruptions by covariate shift "
        "adaptation}, author={Schneider, Steffen and Rusak, Evgenia and Eck, Luisa and Bringmann, Oliver and Brendel, Wieland "
        "and Bethge, Matthias}, booktitle={NeurIPS}, year={2020}}"
    )

    prior: int | Literal["auto"] = "auto"
    tolerance: float | None = None

    def __post_init__(self) -> None:
        whole = isinstance(self.prior, int) and not isinstance(self.prior, bool) and self.prior >= 0
        if self.prior != "auto" and not whole:
            raise UsageError(
                f'prior is "auto" or the number of images, 0 or more, that the source counts as; got {self.prior!r}.'
            )
        if self.tolerance is not None and not self.tolerance > 0:
            raise UsageError(
                f"tolerance is a standard error in source standard deviations, above 0; got {self.tolerance!r}."
            )

    def estimate(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        sites: list[Site],
        caller: Caller,
        source: Profile | None = None,
    ) -> Estimate:
        seen, notes = self._measure(model, batches, sites, {site.name: site.statistics() for site in sites}, caller)
        return self._blended(seen, notes, sites, source)

    def estimate_from(self, seen: Observation, *, sites: list[Site], source: Profile | None = None) -> Estimate:
        if self.tolerance is not None:
            raise UsageError(
                f"tolerance={self.tolerance:g} says when to stop reading batches, and moments were given: there are none to "
                "read. Leave it away."
            )
        return self._blended(seen, (seen.caveat,) if seen.caveat else (), sites, source)

    def _blended(
        self, seen: Observation, notes: tuple[str, ...], sites: list[Site], source: Profile | None
    ) -> Estimate:
        held = {site.name: site.statistics() for site in sites}
        moments, weights = {}, {}
        for site in sites:
            known, found = held[site.name], seen.get(site.name)
            if known is None or found is None:
                continue
            known = _mended(known, found.values)
            weight = self._source_weight(site, known, found, source)
            blended = known.blend(found.values, source_weight=weight, cross_term=False, geometric=self.prior == "auto")
            moments[site.name] = blended
            weights[site.name] = weight
        target = {name: found.values for name, found in seen.items() if held.get(name) is not None}
        return Estimate(
            moments=moments,
            target=target,
            unblended=target,
            weights=weights,
            samples=seen.samples,
            batches=seen.batches,
            unvisited=tuple(site.name for site in sites if site.name not in seen),
            notes=notes,
        )

    def _measure(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        sites: list[Site],
        held: dict[str, Moments | None],
        caller: Caller,
    ) -> tuple[Observation, tuple[str, ...]]:
        tolerance = self.tolerance
        passing = observing(model, batches, under="batch", include=[site.name for site in sites], caller=caller)
        if tolerance is None:
            return finish(passing, sites), ()
        seen = finish(passing, sites, enough=lambda seen: widest(seen, held) <= tolerance)
        if widest(seen, held) <= tolerance:
            return seen, ()
        return seen, (
            say(
                "all {count} images were read, and the least certain site still has a standard error of {error:.3g} source "
                "sd; tolerance asked for {tolerance:g}.",
                count=seen.samples,
                error=widest(seen, held),
                tolerance=tolerance,
            ),
        )

    def _source_weight(self, site: Site, known: Moments, found: Observed, source: Profile | None) -> float:
        if self.prior != "auto":
            return self.prior / (self.prior + found.images.count)
        floor = FLOOR
        if source is not None:
            moved, gap = Shift.between(known, found.values, eps=site.eps).moved, source.gap(site.name)
            floor = max(floor, gap / (gap + moved))
        return source_share(float(found.standard_error(known.var + site.eps).square().mean()), floor=floor)


def _mended(held: Moments, target: Moments) -> Moments:
    """`held`, with the target's moments in channels that hold what no data can give: there is no source to blend with."""
    sound = torch.isfinite(held.mean) & torch.isfinite(held.var) & (held.var >= 0)
    mean, var = (
        torch.where(sound, own, new.to(own)) for own, new in ((held.mean, target.mean), (held.var, target.var))
    )
    return Moments(held.count, mean, var)


def widest(seen: Observation, held: dict[str, Moments | None]) -> float:
    """The largest over sites of the root mean square over channels of the standard error of the mean, in source sd."""
    errors = [
        _rms(found.standard_error(known.var)) for name, found in seen.items() if (known := held.get(name)) is not None
    ]
    return max(errors, default=0.0)


def _rms(values: Tensor) -> float:
    return float(torch.sqrt(values.square().mean()))
