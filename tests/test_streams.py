"""Benchmark streams: the same seed gives the same one, orders hold every image once, and what is poisoned is marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from renorm.bench.beds import Bed, Labelled
from renorm.bench.corruptions import CLEAN
from renorm.bench.streams import ORDERS, STREAMS, stream
from renorm.errors import UnknownName

SHIFTS = (CLEAN, "darker", "brighter")
IMAGES = 400


class Fake(Bed):
    """Images that say which they are, (N, 1, 2, 2): number + 1,000 × the shift's."""

    name: ClassVar[str] = "fake"
    shifts: ClassVar[tuple[str, ...]] = SHIFTS
    classes: ClassVar[int] = 4
    needs: ClassVar[tuple[str, ...]] = ()

    def pool(self, shift: str, *, seed: int, classes: int | None = None) -> Labelled:
        order = np.random.default_rng(seed).permutation(self.most)
        inputs = torch.from_numpy(order).float() + 1000 * SHIFTS.index(shift)
        return Labelled(inputs[:, None, None, None].expand(-1, 1, 2, 2).clone(), torch.from_numpy(order % 4))

    def source(self, *, seed: int) -> Labelled:
        return self.pool(CLEAN, seed=seed)

    def _network(self) -> Any:
        return "", ""

    _parts = _images = _pixels = _network


def bed(most: int = IMAGES) -> Fake:
    return Fake(data=Path(), most=most, measured=0)


def numbers(inputs: torch.Tensor) -> torch.Tensor:
    return inputs[:, 0, 0, 0]


@pytest.mark.parametrize("kind", sorted(STREAMS))
def test_the_same_seed_gives_the_same_stream(kind: str) -> None:
    one, same, other = (stream(bed(), kind, "darker", seed=s, images=300) for s in (1, 1, 2))
    assert one.inputs.shape == (300, 1, 2, 2)
    assert one.labels.shape == one.counted.shape == (300,)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one.inputs, other.inputs)


@pytest.mark.parametrize("kind", sorted(ORDERS))
def test_an_order_holds_every_image_once_with_its_label(kind: str) -> None:
    found = stream(bed(), kind, "darker", seed=0, images=IMAGES)
    assert sorted(numbers(found.inputs).tolist()) == [1000 + k for k in range(IMAGES)]
    assert torch.equal(numbers(found.inputs).long() % 4, found.labels)  # 1,000 is a multiple of 4
    assert bool(found.counted.all())


def test_sorted_is_class_after_class_and_bursts_are_of_one_class() -> None:
    labels = stream(bed(), "sorted", "darker", seed=0, images=IMAGES).labels
    assert int((labels[1:] != labels[:-1]).sum()) == 3
    labels = stream(bed(), "bursts", "darker", seed=0, images=IMAGES).labels
    lengths = torch.unique_consecutive(labels, return_counts=True)[1]
    assert 6 < len(lengths) <= IMAGES // 20 + 4
    assert int((lengths < 20).sum()) <= 4  # what was left of each class


def test_dirichlet_windows_are_of_fewer_classes_than_even_ones() -> None:
    def largest(kind: str) -> float:
        labels = stream(bed(), kind, "darker", seed=0, images=IMAGES).labels
        return float(np.mean([torch.bincount(w, minlength=4).max() / len(w) for w in labels.split(64)]))

    assert largest("dirichlet") > largest("iid") + 0.1


def test_mixed_and_changing_take_every_domain_and_keep_the_image() -> None:
    for kind in ("mixed", "changing"):
        found = stream(bed(1000), kind, "darker", seed=0, images=1000)
        domains = numbers(found.inputs) // 1000
        assert set(domains.tolist()) == {0.0, 1.0, 2.0}
        assert torch.equal(numbers(found.inputs).long() % 4, found.labels)
        if kind == "changing":
            assert all(len(set(part.tolist())) == 1 for part in domains.split(256))


def test_drift_ends_at_the_shift_and_after_at_the_clean() -> None:
    drift = stream(bed(), "drift", "darker", seed=0, images=IMAGES)
    assert float(numbers(drift.inputs)[0]) < 1000 <= float(numbers(drift.inputs)[-1])
    after = stream(bed(), "after", "darker", seed=0, images=IMAGES)
    assert bool((numbers(after.inputs)[:200] >= 1000).all() & (numbers(after.inputs)[200:] < 1000).all())
    assert after.counted.tolist() == [False] * 200 + [True] * 200
    assert torch.equal(numbers(after.inputs).long() % 4, after.labels)


def test_poisoned_images_are_one_in_twenty_and_do_not_count() -> None:
    found = stream(bed(), "poisoned", "darker", seed=0, images=IMAGES)
    assert int((~found.counted).sum()) == IMAGES // 20
    sound = numbers(found.inputs)[found.counted]
    assert bool(((sound >= 1000) & (sound < 1000 + IMAGES)).all())
    assert torch.equal(sound.long() % 4, found.labels[found.counted])
    bad = numbers(found.inputs)[~found.counted]
    assert bool((bad == 5).any())
    assert bool((bad >= 1_000_000).any())


@pytest.mark.parametrize("kind", ["iid", "mixed", "after"])
def test_few_images_come_again(kind: str) -> None:
    found = stream(bed(30), kind, "darker", seed=0, images=100)
    assert found.inputs.shape[0] == len(found.labels) == 100


def test_another_kind_is_refused_by_name() -> None:
    with pytest.raises(UnknownName, match="there is no stream 'sortd'"):
        stream(bed(), "sortd", "darker", seed=0, images=10)
