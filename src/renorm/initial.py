"""What a batch norm is created with, and what is left of it after few updates: mean 0, variance 1, one weight and bias."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import inf

from torch import Tensor, nn

from renorm.mend import Fix, at_sites
from renorm.moments import Moments
from renorm.sites import Site, is_lazy

__all__ = ["NEARER", "share_left", "taking_off", "was_trained", "without_initial", "without_it"]

LEFT = 0.05  # share of the initial values that counts: n < 29 at momentum 0.1, n < 299 at 0.01
NEARER = 0.5  # of the distance from the data: no more may be left of it for few updates to be its cause
ROUNDING = 1e-5  # of a variance near 1, kept in float32 over hundreds of updates: a channel that never varied


def share_left(site: Site) -> float | None:
    """The share of the initial values after the updates that the layer counted; None where it does not say."""
    counter = getattr(site.module, "num_batches_tracked", None)
    if site.momentum is None or not isinstance(counter, Tensor) or int(counter) < 1:
        return None
    return float((1 - site.momentum) ** int(counter))


def without_initial(site: Site) -> Moments | None:
    """Its statistics with that share taken off, so the mean of what training showed; None where no more than LEFT is left.

    None too where that would leave less than no variance: then the counter does not say how these statistics came about.
    """
    held, left = site.statistics(), share_left(site)
    if held is None or left is None or not LEFT < left < 1:
        return None
    var = (held.var - left) / (1 - left)
    if not bool((var > -ROUNDING).all()):
        return None
    return Moments(held.count, held.mean / (1 - left), var.clamp_min(0))


def taking_off(names: Iterable[str]) -> Fix:
    """A fix that takes that share off at every site in `names`."""
    return at_sites(list(names), _take_off_, label="taking the initial values off")


def _take_off_(site: Site) -> None:
    corrected = without_initial(site)
    if corrected is not None:
        site.write_(corrected)


def without_it(
    model: nn.Module,
    sites: Iterable[Site],
    distances: Mapping[str, float],
    again: Callable[[], Mapping[str, float]],
) -> dict[str, float]:
    """The distances that `again` measures with that share taken off, for those of `sites` that it brings nearer.

    It is taken off everywhere at once: a layer behind others was trained on what those send without it. `again` is not asked
    where no site has such a share; the model is the same afterwards, bit for bit.
    """
    initial = [site.name for site in sites if site.name in distances and without_initial(site) is not None]
    if not initial:
        return {}
    undo = taking_off(initial)(model)
    try:
        left = again()
    finally:
        undo.restore_()
    return {name: left[name] for name in initial if left.get(name, inf) < distances[name]}


def was_trained(site: Site) -> bool:
    """Whether weight or bias differ between channels; every initialisation in use sets them to constants."""
    if is_lazy(site):
        return False
    tensors = (getattr(site.module, name, None) for name in ("weight", "bias"))
    return any(isinstance(t, Tensor) and t.numel() > 1 and bool((t != t.flatten()[0]).any()) for t in tensors)
