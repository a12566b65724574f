"""Streams made of a labelled test bed, by a seed: in which order images come, and from which domain each is.

    iid        in random order                         dirichlet   the class mix of every 64 images drawn anew (0.3)
    bursts     20 to 59 of one class at a time         sorted      class after class
    mixed      every image from a domain of its own    changing    another domain every 4 × 64 images
    drift      from the clean image to the shifted     after       the first half shifted, the second clean
    poisoned   one image in 20 is noise, a constant, or 1,000 times too large

Measured are all images but the poisoned ones, by the answers that the stream gave them as they came.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from renorm.bench.beds import Bed, Labelled
from renorm.bench.corruptions import CLEAN
from renorm.errors import UnknownName

__all__ = ["ORDERS", "STREAMS", "Images", "reordered", "stream"]

Order = NDArray[np.intp]
WINDOW = 64


class Images(NamedTuple):
    """A stream: inputs as they come, their labels, and which of them count."""

    inputs: Tensor
    labels: Tensor
    counted: Tensor


def stream(bed: Bed, kind: str, shift: str, *, seed: int, images: int) -> Images:
    """`images` images of `bed` under `shift` as a stream of this `kind`; the same seed gives the same stream.

    Raises UnknownName for a kind that is none of `STREAMS`.
    """
    if kind not in STREAMS:
        raise UnknownName("stream", kind, STREAMS)
    rng = np.random.default_rng([seed, 7])
    there = bed.pool(shift, seed=seed).first(images)
    while len(there.labels) < images:  # photographs are few: they come again, in another order
        there = Labelled(torch.cat([there.inputs] * 2)[:images], torch.cat([there.labels] * 2)[:images])
    if kind in ORDERS:
        return reordered(there.inputs, there.labels, kind, seed=seed)
    inputs, counted = _MIXES[kind](bed, there, rng, seed)
    return Images(inputs, there.labels, counted)


def reordered(inputs: Tensor, labels: Tensor, kind: str, *, seed: int) -> Images:
    """These images in one of `ORDERS`."""
    order = torch.from_numpy(ORDERS[kind](labels.numpy(), np.random.default_rng([seed, 7])))
    return Images(inputs[order], labels[order], torch.ones(len(order), dtype=torch.bool))


def _iid(labels: NDArray[np.integer], rng: Generator) -> Order:
    return rng.permutation(len(labels))


def _sorted(labels: NDArray[np.integer], rng: Generator) -> Order:
    classes = rng.permutation(np.unique(labels))
    return np.concatenate([rng.permutation(np.flatnonzero(labels == k)) for k in classes])


def _bursts(labels: NDArray[np.integer], rng: Generator) -> Order:
    pools = {int(k): list(rng.permutation(np.flatnonzero(labels == k))) for k in np.unique(labels)}
    order: list[int] = []
    while pools:
        k = int(rng.choice(list(pools)))
        length = int(rng.integers(20, 60))
        order += pools[k][:length]
        pools[k] = pools[k][length:]
        if not pools[k]:
            del pools[k]
    return np.array(order)


def _dirichlet(labels: NDArray[np.integer], rng: Generator) -> Order:
    pools = {int(k): list(rng.permutation(np.flatnonzero(labels == k))) for k in np.unique(labels)}
    order: list[int] = []
    while pools:
        shares = rng.dirichlet([0.3] * len(pools))
        for k in rng.choice(list(pools), size=WINDOW, p=shares):
            if pools.get(int(k)):
                order.append(pools[int(k)].pop())
        pools = {k: pool for k, pool in pools.items() if pool}
    return np.array(order)


def _domains(bed: Bed, there: Labelled, seed: int) -> list[Tensor]:
    return [bed.pool(shift, seed=seed).first(len(there.labels)).inputs for shift in bed.shifts]


def _mixed(bed: Bed, there: Labelled, rng: Generator, seed: int) -> tuple[Tensor, Tensor]:
    domains = _domains(bed, there, seed)
    count = min(len(d) for d in domains)
    drawn = rng.integers(0, len(domains), size=len(there.labels))
    return torch.stack([domains[d][k % count] for k, d in enumerate(drawn)]), _all(there)


def _changing(bed: Bed, there: Labelled, rng: Generator, seed: int) -> tuple[Tensor, Tensor]:
    domains = _domains(bed, there, seed)
    order = rng.permutation(len(domains))
    count = min(len(d) for d in domains)
    at = [order[(k // (4 * WINDOW)) % len(domains)] for k in range(len(there.labels))]
    return torch.stack([domains[d][k % count] for k, d in enumerate(at)]), _all(there)


def _drift(bed: Bed, there: Labelled, rng: Generator, seed: int) -> tuple[Tensor, Tensor]:
    clean = _clean(bed, there, seed)
    share = torch.linspace(0, 1, len(there.labels))[:, None, None, None]
    return (1 - share) * clean + share * there.inputs, _all(there)


def _after(bed: Bed, there: Labelled, rng: Generator, seed: int) -> tuple[Tensor, Tensor]:
    half = len(there.labels) // 2
    counted = torch.arange(len(there.labels)) >= half  # what the stream made of the clean half is the question
    return torch.cat([there.inputs[:half], _clean(bed, there, seed)[half:]]), counted


def _poisoned(bed: Bed, there: Labelled, rng: Generator, seed: int) -> tuple[Tensor, Tensor]:
    inputs = there.inputs.clone()
    bad = torch.from_numpy(rng.permutation(len(inputs))[: len(inputs) // 20])
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(bad), *inputs.shape[1:], generator=generator) * inputs.std() * 3
    kinds = torch.arange(len(bad))[:, None, None, None] % 3
    garbage = torch.where(kinds == 0, noise, torch.where(kinds == 1, torch.full_like(noise, 5.0), inputs[bad] * 1000))
    inputs[bad] = garbage
    counted = _all(there)
    counted[bad] = False
    return inputs, counted


def _clean(bed: Bed, there: Labelled, seed: int) -> Tensor:
    clean = bed.pool(CLEAN, seed=seed).inputs
    return clean[torch.arange(len(there.labels)) % len(clean)]


def _all(there: Labelled) -> Tensor:
    return torch.ones(len(there.labels), dtype=torch.bool)


ORDERS: dict[str, Callable[[NDArray[np.integer], Generator], Order]] = {
    "iid": _iid,
    "bursts": _bursts,
    "sorted": _sorted,
    "dirichlet": _dirichlet,
}
_MIXES: dict[str, Callable[[Bed, Labelled, Generator, int], tuple[Tensor, Tensor]]] = {
    "mixed": _mixed,
    "changing": _changing,
    "drift": _drift,
    "after": _after,
    "poisoned": _poisoned,
}
STREAMS: dict[str, Callable[..., Any]] = {**ORDERS, **_MIXES}
