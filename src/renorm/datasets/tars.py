"""WebDataset's `.tar` shards: files that share a name up to its first dot are one sample, read in place by their offsets."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from renorm.datasets.arrays import LABELS, numbered
from renorm.datasets.base import Dataset, Indices, Options, assemble
from renorm.datasets.images import LOOKED, SUFFIXES, Decoder, Source
from renorm.errors import DataError, UsageError, require
from renorm.said import listed, say

__all__ = ["is_shards", "read"]

CLASS = ("cls", "cls.txt", "label", "label.txt")  # what the member with a sample's class is called in the wild
MOST = 1_000_000  # shards that a pattern may name: all of them are looked for
LARGEST = 1 << 20  # bytes of a label or of a .json that are read: more is something else


class _Place(NamedTuple):
    tar: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass
class _Sample:
    key: str
    members: dict[str, _Place] = field(default_factory=dict)

    @property
    def image(self) -> str:
        return next((name for name in self.members if f".{name.rpartition('.')[2]}" in SUFFIXES), "")


def is_shards(name: str) -> bool:
    """Whether `name` is a .tar, or a pattern of several: shard-{000..007}.tar, shards/*.tar."""
    return name.lower().endswith((".tar", ".tar.gz", ".tgz"))


def read(spec: str, options: Options) -> Dataset:
    """The samples with an image in the shards that `spec` names.

    Labels are the members `.cls`, or an entry of the `.json`, which `labels` names; groups likewise.

    Raises:
        DataError: no such shards, compressed or damaged ones, no images, labels or groups that only some samples have.
        UsageError: a split, which shards have none of.
        MissingExtra: Pillow is not installed.
    """
    require("PIL.Image", extra="images", purpose="reading images")
    if options.split:
        raise UsageError(
            f"{spec}: shards have no splits, and {options.split!r} was asked for. Name that split's shards."
        )
    shards = _shards(spec)
    samples, digest = _indexed(shards)
    held = [sample for sample in samples if sample.image]
    if not held:
        kinds = ", ".join(f"{n} .{kind}" for kind, n in Counter(m for s in samples for m in s.members).most_common(6))
        raise DataError(f"{spec} holds no images ({', '.join(SUFFIXES)}); found: {kinds or 'nothing'}.")
    notes: tuple[str, ...] = ()
    if len(held) < len(samples):
        without = len(samples) - len(held)
        notes += (say("{count} of {total} samples hold no image: left out", count=without, total=len(samples)),)
    decode = Decoder(options.preprocessing)

    def sources(indices: Indices) -> list[Source]:
        chosen = [held[k] for k in indices]
        return [Source(f"{s.members[s.image].tar}: {s.key}.{s.image}", s.members[s.image].read()) for s in chosen]

    def fetch(indices: Indices) -> Tensor:
        return decode(sources(indices))

    labels, classes = None, None
    if options.labels is not None:
        values, note = _labels(spec, held, options.labels)
        notes += note
        if values is not None:
            labels, classes, said = numbered(f"{spec}: labels", np.asarray(values), None)
            notes += said
    notes += decode.describe(sources(options.order(len(held))[:LOOKED]))
    return assemble(
        spec,
        options,
        fetch=fetch,
        total=len(held),
        labels=labels,
        classes=classes,
        groups=_each(spec, held, (options.group,), "group") if options.group else None,
        fingerprint="sha256 of names and sizes:" + digest,
        notes=notes,
        names=[sample.key for sample in held],
    )


def _shards(spec: str) -> list[Path]:
    names: list[str] = [spec]
    while found := re.search(r"\{(\d{1,18})\.\.(\d{1,18})\}", names[0]):
        first, last, width = int(found[1]), int(found[2]), len(found[1])
        if (many := len(names) * (last - first + 1)) > MOST:
            raise UsageError(
                f"{spec} names {many} shards. Give a pattern of {MOST} at most, or *.tar for those that are there."
            )
        numbers = [f"{k:0{width}d}" for k in range(first, last + 1)]
        names = [name.replace(found[0], number, 1) for name in names for number in numbers]
        if not names:
            raise UsageError(f"{spec} counts down: {found[0]} names no shard. Write {{{last}..{first}}}.")
    if len(names) == 1 and not os.path.exists(spec) and glob.has_magic(spec):
        names = sorted(glob.glob(spec))
    absent = [name for name in names if not os.path.isfile(name)]
    if absent or not names:
        raise DataError(
            f"there is no file {absent[0] if absent else spec}. Correct the path, or the pattern of the shards."
        )
    return [Path(name) for name in names]


def _indexed(shards: list[Path]) -> tuple[list[_Sample], str]:
    """Every sample of the shards, as they stand in them, and a digest of the names and sizes of their members."""
    digest = hashlib.sha256()
    samples: list[_Sample] = []
    for shard in shards:
        for name, place in _members(shard):
            digest.update(f"{name}\0{place.size}\n".encode(errors="surrogateescape"))
            folder, _, file = name.rpartition("/")
            stem, _, kind = file.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if (
                not samples
                or samples[-1].key != key
                or samples[-1].members[next(iter(samples[-1].members))].tar != shard
            ):
                samples.append(_Sample(key))
            samples[-1].members[kind.lower()] = place
    return samples, digest.hexdigest()


def _members(shard: Path) -> Iterator[tuple[str, _Place]]:
    if shard.name.lower().endswith((".gz", ".tgz")):
        raise DataError(
            f"{shard} is compressed, and could be read from front to back only. Unpack it first: gunzip {shard}."
        )
    size = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                hidden = member.name.rpartition("/")[2].startswith(".")
                if member.isreg() and not hidden:
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"{member.name} ends behind the end of the file")
                    yield member.name, _Place(shard, member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise DataError(f"{shard} is damaged, or no .tar file ({error}). Fetch or write it again.") from error


def _labels(spec: str, samples: list[_Sample], name: str) -> tuple[list[Any] | None, tuple[str, ...]]:
    wanted = (*CLASS, *LABELS) if name == "labels" else (name,)
    if name == "labels" and not any(_value(sample, wanted) is not None for sample in samples[:LOOKED]):
        return None, (say("no labels: no sample has a .cls, nor {names} in its .json", names=listed(LABELS)),)
    return _each(spec, samples, wanted, "label"), ()


def _each(spec: str, samples: list[_Sample], names: tuple[str, ...], what: str) -> list[Any]:
    """Each sample's own value under one of `names`, a member or an entry of its .json."""
    values = [_value(sample, names) for sample in samples]
    absent = [sample.key for sample, value in zip(samples, values, strict=True) if value is None]
    if absent:
        where = (
            f".{names[0]}, and no {' or '.join(names[-2:])} in a .json" if len(names) > 1 else f".{names[0]} or .json"
        )
        raise DataError(
            f"{spec}: {len(absent)} of {len(samples)} samples have no {what} ({where}), {absent[0]} first. Give one to each."
        )
    return values


def _value(sample: _Sample, names: tuple[str, ...]) -> Any:
    for name in names:
        place = sample.members.get(name.lower())
        if place is not None and place.size <= LARGEST:
            text = place.read().decode(errors="replace").strip()
            return int(text) if re.fullmatch(r"-?\d+", text) else text
    place = sample.members.get("json")
    if place is None or place.size > LARGEST:
        return None
    try:
        said = json.loads(place.read())
    except ValueError as error:
        raise DataError(f"{place.tar}: {sample.key}.json is no JSON ({error}). Write the shard again.") from error
    return next((said[name] for name in names if name in said), None) if isinstance(said, Mapping) else None
