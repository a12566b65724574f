"""What stands next to a norm layer, as far as a model says so without being run: its neighbours in an `nn.Sequential`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor, nn

from renorm.errors import UsageError
from renorm.mend import Fix
from renorm.sites import Site, find_sites, unwrap, walk
from renorm.state import Undo

__all__ = ["absorbing_bias", "layers_before", "sites_before"]


def sites_before(model: nn.Module, kind: type[nn.Module]) -> Iterator[str]:
    """The batch norm sites followed by a module of this `kind`, in their `nn.Sequential` or as a module of their own."""
    sites = _by_module(model)
    for before, after in _pairs(model):
        if before in sites and isinstance(after, kind):
            yield sites[before].name
    for module, site in sites.items():
        if any(isinstance(child, kind) for child in module.children()):
            yield site.name


def layers_before(model: nn.Module) -> dict[str, nn.Module]:
    """{batch norm site with statistics: the convolution or linear layer right in front of it}; shared ones are left out."""
    sites = _by_module(model)
    pairs = [(before, after) for before, after in _pairs(model) if after in sites and isinstance(before, _LINEAR)]
    once = [before for before, _ in pairs]
    found: dict[str, nn.Module] = {}
    for before, after in pairs:
        site = sites[after]
        if once.count(before) == 1 and site.slot is None and site.tensors is not None and site.axis == 1:
            found[site.name] = before
    return found


def absorbing_bias(names: Sequence[str]) -> Fix:
    """A fix that takes the bias in front of every site in `names` off its running mean, and sets it to 0.

    The fix raises UsageError for a model without such a pair.
    """

    def fix_(model: nn.Module) -> Undo:
        found, sites = layers_before(model), {site.name: site for site in find_sites(model)}
        missing = [name for name in names if name not in found]
        if missing:
            raise UsageError(
                f"absorbing a bias was to be done at {missing[0] or 'the model itself'!r}, and {type(model).__name__} has no "
                "layer right in front of such a norm layer; give the model that was diagnosed, or a copy of it."
            )
        modules = {name: sites[name].module for name in names}
        modules |= {f"{name}, in front": found[name] for name in names}
        undo = Undo("absorbing a bias", modules, parameters=True)
        for name in names:
            bias, tensors = found[name].bias, sites[name].tensors
            if isinstance(bias, Tensor) and tensors is not None:
                tensors[0].data.sub_(bias.data)
                bias.data.zero_()
        return undo

    return fix_


_LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


def _by_module(model: nn.Module) -> dict[nn.Module, Site]:
    return {site.module: site for site in find_sites(model) if site.kind == "batch"}


def _pairs(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    for _, module in walk(unwrap(model)):
        if isinstance(module, nn.Sequential):
            yield from pairwise(module)
