"""Statistical rules of the doctor on ResNet-20 and its own kind of images, with a fault of a known strength planted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor, nn

from renorm.bench.beds import Labelled, ResNet20
from renorm.doctor import diagnose
from renorm.moments import Moments
from renorm.sites import find_sites

__all__ = ["PLANTS", "Plant", "run"]


class Case(NamedTuple):
    """A model and batches, and the checkpoints of other ranks where there are any."""

    model: nn.Module
    batches: list[Tensor]
    ranks: list[dict[str, Tensor]] | None = None


def _shifted(case: Case, strength: float, seed: int) -> Case:
    """Every mean of one layer in the middle, moved by so many sd."""
    site = [site for site in find_sites(case.model) if site.kind == "batch"][9]
    held = site.statistics()
    assert held is not None
    site.write_(Moments(1e9, held.mean + strength * (held.var + site.eps).sqrt(), held.var))
    return case


def _sorted(case: Case, strength: float, seed: int) -> Case:
    """That share of the images sorted by their mean brightness, in batches of 20."""
    images = torch.cat(case.batches)
    chosen = torch.randperm(len(images), generator=Generator().manual_seed(seed))[: round(strength * len(images))]
    order = torch.arange(len(images))
    places = chosen.sort().values
    order[places] = chosen[images[chosen].mean((1, 2, 3)).argsort()]
    return Case(case.model, list(torch.split(images[order], 20)))


def _outlier(case: Case, strength: float, seed: int) -> Case:
    """One batch of 20 multiplied."""
    batches = list(torch.split(torch.cat(case.batches), 20))
    batches[3] = batches[3] * strength
    return Case(case.model, batches)


def _updates(case: Case, strength: float, seed: int) -> Case:
    """What so many updates at momentum 0.1 leave of mean 0 and variance 1, mixed into the statistics."""
    left = 0.9**strength
    for site in find_sites(case.model):
        if site.kind == "batch" and site.tensors is not None:
            mean, var = site.tensors
            mean.mul_(1 - left)
            var.mul_(1 - left).add_(left)
            counter = getattr(site.module, "num_batches_tracked", None)
            if isinstance(counter, Tensor):
                counter.fill_(int(strength))
    return case


def _few(case: Case, strength: float, seed: int) -> Case:
    """So many images in all."""
    return Case(case.model, [torch.cat(case.batches)[: int(strength)]])


def _padding(case: Case, strength: float, seed: int) -> Case:
    """Sequences of 64 steps whose ends are 0, that share of them on average; a network of its own."""
    generator = Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.BatchNorm1d(4), nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8))
    x = torch.randn(64, 4, 64, generator=generator) + 1
    lengths = 64 - (128 * strength * torch.rand(64, generator=generator)).round().long()
    x = x * (torch.arange(64) < lengths[:, None, None])
    return Case(model.eval(), [x])


def _noisy(case: Case, strength: float, seed: int) -> Case:
    """That share of the images under noise, shuffled among the others."""
    images = torch.cat(case.batches)
    generator = Generator().manual_seed(seed)
    chosen = torch.randperm(len(images), generator=generator)[: round(strength * len(images))]
    images = images.clone()
    images[chosen] += 0.4 * torch.randn(images[chosen].shape, generator=generator)
    return Case(case.model, list(torch.split(images, 20)))


def _blurred(case: Case, strength: float, seed: int) -> Case:
    """Every variance held is multiplied, as where dropout in front of a layer was on while it was estimated."""
    for site in find_sites(case.model):
        held = site.statistics() if site.kind == "batch" else None
        if held is not None:
            site.write_(Moments(1e9, held.mean, held.var * strength))
    return case


def _ranks(case: Case, strength: float, seed: int) -> Case:
    """Another rank whose means lie so many sd away, up or down by chance."""
    generator = Generator().manual_seed(seed)
    other = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    for name in [name for name in other if name.endswith("running_mean")]:
        sd = other[name.replace("mean", "var")].sqrt()
        other[name] += strength * sd * (torch.randint(0, 2, sd.shape, generator=generator) * 2 - 1)
    return case._replace(ranks=[other])


class Plant(NamedTuple):
    """A fault, the rule that should find it, and strengths from none at all on; from `sure` on every one must be found.

    `passes` are enough for that rule, and too few for the looks that others want.
    """

    make: Callable[[Case, float, int], Case]
    rule: str
    strengths: tuple[float, ...]
    sure: float
    passes: int = 1

    @property
    def certain(self) -> tuple[float, ...]:
        """The strengths at which every one must be found."""
        return self.strengths[self.strengths.index(self.sure) :]


PLANTS: Mapping[str, Plant] = {
    "means of two ranks apart by, sd": Plant(_ranks, "BN204", (0.0, 0.1, 0.2, 0.3, 0.5), 0.3, passes=0),
    "means of a layer moved, sd": Plant(_shifted, "BN302", (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 1.0), 0.4),
    "every variance multiplied by": Plant(_blurred, "BN301", (1.0, 1.1, 1.2, 1.3, 1.5, 2.0), 1.5, passes=10),
    "images sorted, share": Plant(_sorted, "BN305", (0.0, 0.25, 0.5, 0.75, 1.0), 0.5),
    "images under noise, share": Plant(_noisy, "BN306", (0.0, 0.05, 0.1, 0.2, 0.35, 0.5), 0.2, passes=4),
    "padded steps, share": Plant(_padding, "BN307", (0.0, 0.02, 0.05, 0.1, 0.2, 0.4), 0.2, passes=4),
    "updates before the stop": Plant(_updates, "BN308", (40.0, 28.0, 20.0, 15.0, 10.0, 5.0), 20.0, passes=5),
    "one batch of ten multiplied by": Plant(_outlier, "BN309", (1.0, 1.5, 2.0, 3.0, 4.0, 6.0), 3.0),
    "images in all": Plant(_few, "BN311", (128.0, 64.0, 32.0, 16.0, 8.0, 4.0), 4.0),
}


def run(data: Path, plant: str, strength: float, seed: int) -> dict[str, float]:
    """Whether the rule found what was planted, the largest value it measured, and its limit; 0 and NaN where it was silent."""
    source = _source(data, seed)
    case = PLANTS[plant].make(Case(_bed(data).model(), source.unlabelled(20)), strength, seed)
    diagnosis = diagnose(case.model, case.batches, ranks=case.ranks, passes=PLANTS[plant].passes)
    found = [f for f in diagnosis.findings if f.rule == PLANTS[plant].rule]
    worst = max(found, key=lambda finding: finding.value, default=None)
    return {
        "found": float(worst is not None),
        "value": worst.value if worst else float("nan"),
        "limit": worst.limit if worst else float("nan"),
    }


def _bed(data: Path) -> ResNet20:
    return ResNet20(data, 200, 200)


@lru_cache(maxsize=3)
def _source(data: Path, seed: int) -> Labelled:
    """200 of the lossless training images, which the statistics fit."""
    every = _bed(data).source(seed=seed)
    chosen = torch.from_numpy(np.random.default_rng(seed).permutation(len(every.labels))[:200])
    return Labelled(every.inputs[chosen], every.labels[chosen])
