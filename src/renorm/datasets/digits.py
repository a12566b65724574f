"""scikit-learn's digits: real handwriting, 8 × 8, installed with the package, so that it needs no network."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from renorm.datasets.arrays import pixel_reader
from renorm.datasets.base import Dataset, Options, assemble
from renorm.errors import UnknownName, UsageError
from renorm.said import say

__all__ = ["read"]

TRAIN = 1000  # of 1,797


def read(options: Options) -> Dataset:
    """All 1,797 digits, or of a fixed shuffle the first 1,000 (`split="train"`) or the other 797 (`"target"`).

    Raises:
        UnknownName: another split.
        UsageError: groups, which it has none of.
    """
    from sklearn.datasets import load_digits

    if options.group:
        raise UsageError(f"digits have no groups, and --group {options.group} was asked for. Leave it away.")

    if options.split not in ("", "train", "target"):
        raise UnknownName("split of digits", options.split, ("train", "target"))
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    part = {"": order, "train": order[:TRAIN], "target": order[TRAIN:]}[options.split]
    # grey levels 0 to 16 become pixels 0 to 255, so that they take the way of all images
    images = np.rint(found.images[part] * (255 / 16)).astype(np.uint8)
    fetch, notes = pixel_reader(images, options.preprocessing, "digits")
    if options.split:
        drawn = say(
            "split {split}: {count} of 1,797, drawn at random once and for all", split=options.split, count=len(part)
        )
        notes = (drawn, *notes)
    return assemble(
        "digits",
        options,
        fetch=fetch,
        total=len(part),
        labels=None if options.labels is None else torch.from_numpy(found.target[part].astype(np.int64)),
        classes=tuple(map(str, found.target_names)),
        fingerprint="sha256:" + hashlib.sha256(images.tobytes()).hexdigest(),
        notes=notes,
    )
