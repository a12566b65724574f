"""The name of a source of data → the data set.

folder/                    images, in one folder per class or flat
file.npz   file.npy        arrays; file.npz#NAME for one by name
file.csv   file.parquet    a table (.csv.gz and .tsv too); parquet may be larger than memory
shard-{000..007}.tar       WebDataset's shards; one, or a pattern
hf:ORG/NAME   hf:FOLDER    the hub's data sets, through the package datasets
digits                     scikit-learn's 1,797 handwritten digits
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from renorm.columns import Columns
from renorm.datasets import arrays, digits, folders, hub, tables, tars
from renorm.datasets.base import Dataset, Options
from renorm.errors import DataError
from renorm.preprocessing import Preprocessing

__all__ = ["load_data"]

FORMS = "an image folder, .npz, .npy, .csv, .parquet, .tar shards, hf:NAME, or digits"


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
    inputs: str = "",
    group: str = "",
    tokenize: Callable[[list[str]], dict[str, Tensor]] | None = None,
    columns: Columns | None = None,
) -> Dataset:
    """Open the data that `spec` names; images are decoded as they are asked for.

    `preprocessing` turns pixels into the model's input; without it they are divided by 255. Arrays of other numbers are
    taken as they are. `labels` names the array or column that holds them, None leaves labels away. `split` is the part of
    the name behind `images_` and `labels_`, a subfolder, or a split of the hub. Samples come in a random order of `seed`
    (None: as they stand), and of that order the first `limit`. `classes`, the model's class names in the order of its
    outputs, number the labels.

    `group` names the array or column that says which hospital or camera a sample is from (of an image folder: the level of
    the folders, 1 or 2). `inputs` names the column that is the model's input where a table does not make it plain: texts,
    which `tokenize` turns into inputs, or images and their paths. `columns` are those that the model was trained on: a table is
    read by their names, in their order.

    Raises:
        UsageError: options that make no sense.
        UnknownName: no such array, column, split or subfolder.
        DataError: missing, damaged, empty, not finite, or not what the model takes; says what to do.
        MissingExtra: images need the extra `images`, tables `tables`, the hub `hub`.
    """
    options = Options(
        preprocessing=preprocessing,
        batch_size=batch_size,
        labels=labels,
        limit=limit,
        split=split,
        seed=seed,
        classes=None if classes is None else tuple(classes),
        inputs=inputs,
        group=group,
        tokenize=tokenize,
        columns=columns,
    )
    name = os.fspath(spec)
    if name == "digits":
        return digits.read(options)
    if name.startswith("hf:") and not os.path.exists(name):
        return hub.read(name.removeprefix("hf:"), options)
    if tars.is_shards(name):
        return tars.read(name, options)
    place, _, key = name.partition("#") if not os.path.exists(name) else (name, "", "")
    path = Path(place)
    if os.path.isdir(path):  # unlike Path's, no error for a name that is too long
        return folders.read(path, options)
    if not os.path.exists(path):
        raise DataError(f"there is no file or folder {place}. Correct the path, or use {FORMS}.")
    if path.name.lower().endswith(tables.SUFFIXES):
        return tables.read(path, options)
    if path.suffix.lower() not in (".npz", ".npy"):
        raise DataError(f"{place} is no data that renorm reads. Use {FORMS}.")
    return arrays.read(path, key, options)
