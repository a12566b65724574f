"""Do the samples fall into groups, each with moments of its own: domains that one set of statistics is to serve?"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from renorm.calls import Caller, read
from renorm.errors import UsageError
from renorm.moments import TINY, Moments, Observed
from renorm.observe import visiting
from renorm.shift import Shift
from renorm.sites import Site, unwrap
from renorm.state import evaluating, preserving

__all__ = ["Mixture", "apart", "mixtures"]

FEWEST = 96  # samples: a single normal cloud of 64, cut in two, seems 3.9 widths apart at times, one of 128 3.5
GROUP = 16  # samples of a known domain that is compared
AXES = 2  # principal components in which groups are looked for: in many dimensions any split looks like one


class Mixture(NamedTuple):
    """Two groups of samples at a site, or known domains.

    apart   how far their means lie apart, in widths (sd) of a group along that line; None for known domains
    share   of the samples in the smaller group
    moved   how far the moments of a group lie from those of all, sd, sampling error taken off, mean over channels: of the
            group that lies nearer, or of the known domain that lies farthest
    domain  the name of that domain
    """

    apart: float | None
    share: float
    moved: float
    domain: str | None = None


class _Seen(NamedTuple):
    """Mean and variance of each image and channel over its places. Shapes: both (N, C)."""

    mean: Tensor
    var: Tensor
    places: int

    def observed(self, chosen: Tensor | slice = slice(None)) -> Observed:
        """The moments of some of the images."""
        mean, var = self.mean[chosen], self.var[chosen]
        between = mean.var(0, correction=0)
        images = Moments(len(mean), mean.mean(0), between)
        return Observed(Moments(len(mean) * self.places, images.mean, var.mean(0) + between), images)

    def moved(self, chosen: Tensor, eps: float) -> float:
        """How far some of the images lie from all, in their sd."""
        whole, part = self.observed().values, self.observed(chosen)
        error = part.standard_error(whole.var + eps)
        squared = Shift.between(whole, part.values, eps=eps).wasserstein2.square() - 2 * error.square()
        return float(squared.clamp_min(0).sqrt().mean())


def mixtures(
    model: nn.Module,
    batches: Sequence[Any],
    sites: Sequence[Site],
    caller: Caller,
    domains: Sequence[Hashable] | None = None,
) -> dict[str, Mixture]:
    """What each site says: every one of known `domains`, a name a sample; else the first half, where classes do not show yet.

    Without names only sites that see several places a sample are asked: the columns of a table fall into groups by nature.
    Raises UsageError for fewer domains than samples.
    """
    samples = sum(read(batch).samples for batch in batches)
    if domains is not None and len(domains) < samples:
        raise UsageError(
            f"domains names the domain of each sample, in the order of the batches; got {len(domains)} for the first {samples}."
        )
    asked = list(sites) if domains is not None else list(sites[: (len(sites) + 1) // 2])
    found: dict[str, Mixture] = {}
    for name, seen in _seen(model, batches, asked, caller, samples).items():
        eps = next(site.eps for site in asked if site.name == name)
        mixture = _known(seen, domains, eps) if domains is not None else _found(seen, eps)
        if mixture is not None:
            found[name] = mixture
    return found


def _seen(
    model: nn.Module, batches: Sequence[Any], sites: Sequence[Site], caller: Caller, samples: int
) -> dict[str, _Seen]:
    """Per site that every sample reached once."""
    parts: dict[str, list[tuple[Tensor, Tensor, int]]] = {}

    def visit(site: Site, x: Tensor) -> None:
        x = x.detach().dequantize() if x.is_quantized else x.detach()
        if x.dim() >= 2 and x.numel():
            places = x[0].numel() // x.shape[site.axis]
            flat = x.movedim(site.axis, 1).reshape(x.shape[0], x.shape[site.axis], places)
            var, mean = torch.var_mean(flat.double().cpu(), 2, correction=0)
            parts.setdefault(site.name, []).append((mean, var, places))

    root = unwrap(model)
    with preserving(root), evaluating(root), visiting(root, [s for s in sites if s.tensors is not None], visit):
        for batch in batches:
            caller.run(model, batch)
    whole = {
        n: _Seen(torch.cat([m for m, _, _ in p]), torch.cat([v for _, v, _ in p]), p[0][2]) for n, p in parts.items()
    }
    return {n: s for n, s in whole.items() if len(s.mean) == samples and bool(torch.isfinite(s.mean + s.var).all())}


def _known(seen: _Seen, domains: Sequence[Hashable], eps: float) -> Mixture | None:
    names = [str(name) for name in domains[: len(seen.mean)]]
    groups = {name: torch.tensor([n == name for n in names]) for name in dict.fromkeys(names)}
    large = {name: chosen for name, chosen in groups.items() if int(chosen.sum()) >= GROUP}
    if len(large) < 2:
        return None
    moved = {name: seen.moved(chosen, eps) for name, chosen in large.items()}
    farthest = max(moved, key=lambda name: moved[name])
    return Mixture(None, float(large[farthest].double().mean()), moved[farthest], farthest)


def _found(seen: _Seen, eps: float) -> Mixture | None:
    if len(seen.mean) < FEWEST or seen.places < 2:
        return None
    varies = seen.observed().images.var > 1e-6 * seen.observed().values.var + TINY
    if not bool(varies.any()):
        return None
    distance, second = apart(seen.mean[:, varies].numpy())
    if not 0 < second.sum() < len(second):
        return None
    first, other = torch.from_numpy(~second), torch.from_numpy(second)
    share = min(float(first.double().mean()), float(other.double().mean()))
    return Mixture(distance, share, min(seen.moved(first, eps), seen.moved(other, eps)))


def apart(means: NDArray[np.float64]) -> tuple[float, NDArray[np.bool_]]:
    """How far the two groups that samples fall into best lie apart, in sd of a group along that line, and which is the second.

    Shapes: (N, C) → a number and (N,). A single normal cloud, cut in two, gives 2.65 along a line, a box 3.46.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    scaled = (means - means.mean(0)) / means.std(0)
    places = PCA(min(AXES, *scaled.shape), random_state=0).fit_transform(scaled)
    second = KMeans(2, n_init=4, random_state=0).fit_predict(places).astype(bool)
    if second.all() or not second.any():
        return 0.0, second
    line = places[second].mean(0) - places[~second].mean(0)
    length = float(np.linalg.norm(line))
    along = places @ (line / max(length, TINY))
    width = float(np.sqrt((along[second].var() + along[~second].var()) / 2))
    return length / max(width, TINY), second
