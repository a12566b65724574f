"""The name of a source of data → the data set.

folder/                    images, in one folder per class or flat
file.npz   file.npy        arrays; file.npz#NAME for one by name
digits                     scikit-learn's 1,797 handwritten digits
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from renorm.datasets import arrays, digits, folders
from renorm.datasets.base import Dataset, Options
from renorm.errors import DataError, UsageError
from renorm.preprocessing import Preprocessing

__all__ = ["load_data"]

FORMS = "an image folder, a .npz or .npy file, or digits"
LATER = (".csv", ".csv.gz", ".tsv", ".parquet", ".tar", ".tgz", ".tar.gz")


def load_data(
    spec: str | os.PathLike[str],
    *,
    preprocessing: Preprocessing | None = None,
    batch_size: int = 64,
    labels: str | None = "labels",
    limit: int | None = None,
    split: str = "",
    seed: int | None = 0,
    classes: Sequence[str] | None = None,
) -> Dataset:
    """Open the data that `spec` names; images are decoded as they are asked for.

    `preprocessing` turns pixels into the model's input; without it they are divided by 255. Arrays of other numbers are
    taken as they are. `labels` names the array that holds them, None leaves labels away. `split` is the part of the name
    behind `images_` and `labels_`, or a subfolder. Samples come in a random order of `seed` (None: as they stand), and
    of that order the first `limit`. `classes`, the model's class names in the order of its outputs, number the labels.

    Raises:
        UsageError: no such form of name, or options that make no sense.
        DataError: missing, damaged, empty, not finite, or not what the model takes; says what to do.
        MissingExtra: image folders need the extra `images`.
    """
    options = Options(
        preprocessing=preprocessing,
        batch_size=batch_size,
        labels=labels,
        limit=limit,
        split=split,
        seed=seed,
        classes=None if classes is None else tuple(classes),
    )
    name = os.fspath(spec)
    if name == "digits":
        return digits.read(options)
    place, _, key = name.partition("#") if not os.path.exists(name) else (name, "", "")
    path = Path(place)
    if name.startswith("hf:") or path.name.lower().endswith(LATER):
        raise UsageError(f"{name}: tables, archives and the hub's data sets come in a later version. Use {FORMS}.")
    if path.is_dir():
        return folders.read(path, options)
    if not path.exists():
        raise DataError(f"there is no file or folder {place}. Correct the path, or use {FORMS}.")
    if path.suffix.lower() not in (".npz", ".npy"):
        raise DataError(f"{place} is no data that renorm reads. Use {FORMS}.")
    return arrays.read(path, key, options)
