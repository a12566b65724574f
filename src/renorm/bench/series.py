"""Real streams: data in the order in which they came, each with the network that first met their source.

gas     an MLP trained on two months of a gas sensor array; the following months in time order, batches 3 to 6
ecg     a convolution in time trained on other patients' heart beats; six patients, one after another
digits  a small network trained on mnist15k; USPS in an order of `streams.ORDERS`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from renorm.bench.signals import beats, gas, profiled
from renorm.bench.streams import ORDERS, Images, reordered
from renorm.bench.transfer_tasks import digit_domains
from renorm.profile import Profile

__all__ = ["SERIES", "Kind", "Series"]


class Series(NamedTuple):
    """A network, what it was trained on, and what came."""

    model: nn.Module
    source: tuple[Tensor, Tensor]
    came: Images

    def profile(self) -> Profile:
        """What the source's owner tells once."""
        return profiled(self.model, self.source)


class Kind(NamedTuple):
    """How a series is made from (data, order, seed, images), the orders that it comes in, and the files that it needs."""

    make: Callable[[Path, str, int, int], Series]
    orders: tuple[str, ...]
    needs: tuple[str, ...]


def _in_order(parts: tuple[nn.Module, tuple[Tensor, Tensor], dict[str, tuple[Tensor, Tensor]]]) -> Series:
    model, source, later = parts
    inputs, labels = (torch.cat([part[k] for part in later.values()]) for k in (0, 1))
    return Series(model, source, Images(inputs.float(), labels, torch.ones(len(labels), dtype=torch.bool)))


def _gas(data: Path, order: str, seed: int, images: int) -> Series:
    return _in_order(gas(data, seed))


def _ecg(data: Path, order: str, seed: int, images: int) -> Series:
    return _in_order(beats(data, seed))


@lru_cache(maxsize=2)
def _digits(data: Path, order: str, seed: int, images: int) -> Series:
    model, source, there, more = digit_domains(data, seed=seed, framed=True)
    inputs, labels = torch.cat([there.inputs, more.inputs]), torch.cat([there.labels, more.labels])
    drawn = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:images]
    return Series(model, (source.inputs, source.labels), reordered(inputs[drawn], labels[drawn], order, seed=seed))


SERIES: Mapping[str, Kind] = {
    "gas": Kind(_gas, ("in time",), ("gas_drift.npz",)),
    "ecg": Kind(_ecg, ("patients",), ("ecg_ds1.npz",)),
    "digits": Kind(_digits, tuple(order for order in ORDERS if order != "dirichlet"), ("mnist15k.npz", "usps.npz")),
}
