"""What one pass measured, as a value that can be saved, merged with another site's, and used where the data are not.

    hospital A: observe ─▶ site-a.moments ──┐
    hospital B: observe ─▶ site-b.moments ──┴▶ merge ─▶ both.moments ─▶ recalibrate_

The file holds a mean, a variance and a count per channel, and no sample.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from renorm.errors import CheckpointError, ModelError, UsageError
from renorm.files import writing
from renorm.moments import Moments, Observed
from renorm.provenance import fingerprint, provenance
from renorm.said import say
from renorm.sites import find_sites

__all__ = ["Observation", "Under"]

Under = Literal["batch", "running"]
FORMAT = "renorm-moments-1"
FIELDS = ("values.mean", "values.var", "images.mean", "images.var")
REMAKE = "Make it again with renorm observe MODEL DATA -o FILE."


class Observation(dict[str, Observed]):
    """What one pass measured: {site name: Observed}, in the order of the sites, for those a batch reached.

    under       "batch" or "running", as `observe` was asked
    samples     and `batches`: what was read, over all ranks
    unvisited   the sites that no batch reached
    functional  calls of `F.batch_norm` in the first batch that belong to no module, which renorm cannot reach
    model       the fingerprint of the model that was observed; None until it is saved
    parts       where it came from: one record for each pass that was saved and merged into this; empty until it is saved
    """

    def __init__(
        self,
        seen: Mapping[str, Observed],
        *,
        under: Under,
        samples: int,
        batches: int,
        unvisited: Sequence[str] = (),
        functional: int = 0,
        model: str | None = None,
        parts: Iterable[Mapping[str, Any]] = (),
    ):
        super().__init__(seen)
        self.under: Under = under
        self.samples: int = samples
        self.batches: int = batches
        self.unvisited: tuple[str, ...] = tuple(unvisited)
        self.functional: int = functional
        self.model: str | None = model
        self.parts: tuple[Mapping[str, Any], ...] = tuple(parts)

    @property
    def caveat(self) -> str:
        """What is approximate in moments that were merged, in words; "" where nothing is."""
        if self.under == "running" or len(self.parts) < 2:
            return ""
        return say(
            "the {count} parts were measured under='batch': pooled they equal, exactly, one pass over the batches of all "
            "parts as they were. What batches that mix the parts would have given they equal only at the first batch norm: "
            "after it, each part was normalised by its own batches, and differences between the parts are seen smaller than "
            "they are.",
            count=len(self.parts),
        )

    def merge(self, other: Observation) -> Observation:
        """What both passes measured together: `Moments.merge` at every site, so any split gives the same (1e-9).

        Raises UsageError where the two were measured under different statistics, or hold the same pass twice; ModelError,
        naming the first site that differs, where they are of different models.
        """
        if self.under != other.under:
            raise UsageError(
                f"moments measured under={self.under!r} and under={other.under!r} were to be merged; they answer different "
                "questions. Observe both with the same --under."
            )
        for name in self.keys() & other.keys():
            ours, theirs = len(self[name].values.mean), len(other[name].values.mean)
            if ours != theirs:
                raise ModelError(
                    f"moments of different models were to be merged: {name!r} has {ours} channels in one and {theirs} in "
                    "the other. Observe the same model at both sites."
                )
        _refuse_other_sites(self, other)
        if self.model and other.model and self.model != other.model:
            raise ModelError(
                f"moments of different models were to be merged: the layers have the same names, but the weights or the "
                f"statistics they held differ (fingerprints {self.model[:12]} and {other.model[:12]}). Give both sites one "
                "checkpoint, and observe before anything is changed."
            )
        twice = self._digests() & other._digests()
        if twice:
            raise UsageError(
                "the same moments were to be merged twice (equal to the last bit), which would count their samples twice. "
                "Give each site's file once."
            )
        names = [*self, *(name for name in other if name not in self)]
        found = {name: self[name].merge(other[name]) if name in self and name in other else None for name in names}
        return Observation(
            {name: both or (self if name in self else other)[name] for name, both in found.items()},
            under=self.under,
            samples=self.samples + other.samples,
            batches=self.batches + other.batches,
            unvisited=[name for name in self.unvisited if name not in other],
            functional=max(self.functional, other.functional),
            model=self.model if self.model == other.model else None,
            parts=[*self._records(), *other._records()],
        )

    def check(self, model: nn.Module) -> None:
        """Raise ModelError, naming what differs, unless these are moments of this very model: its layers, its weights."""
        channels = {site.name: site.channels for site in find_sites(model)}
        for name, seen in self.items():
            count = len(seen.values.mean)
            if channels.get(name) != count:
                found = f"has {channels[name]} channels there" if name in channels else "has no norm layer of that name"
                raise ModelError(
                    f"the moments know a batch norm {name!r} with {count} channels; this {type(model).__name__} {found}. "
                    "Give the model that was observed."
                )
        if self.model and self.model != (own := fingerprint(model)):
            raise ModelError(
                f"the moments were measured on a model with the same layers and other weights or statistics (fingerprint "
                f"{self.model[:12]}, here {own[:12]}): what its layers see is not what these would. Give the checkpoint that "
                "was observed, as it was then."
            )

    def save(
        self,
        path: str | os.PathLike[str],
        model: nn.Module | None = None,
        *,
        command: str = "",
        data: str | None = None,
        checkpoint: str | None = None,
        force: bool = False,
    ) -> None:
        """Write a safetensors side-car with the fingerprint of `model`, the one observed, as it was then.

        Complete or absent, over an existing file only with `force`; float64, so that what is loaded is equal to the bit.
        `model` may be left out where this was loaded or merged from files. `command`, `data` (a fingerprint) and
        `checkpoint` (its sha256) go into the record of where it came from.
        Raises UsageError without a model, ModelError where it is another one.
        """
        if model is not None:
            self.check(model)
        known = self.model or (fingerprint(model) if model is not None else None)
        if known is None:
            raise UsageError(
                "moments were to be saved without their model, whose fingerprint keeps them from being used for another. "
                "Give the model that was observed: seen.save(path, model)."
            )
        from safetensors.torch import save_file

        origin = provenance(command=command, model=known, data=data, checkpoint=checkpoint)
        parts = self.parts or tuple({**record, "origin": origin} for record in self._records())
        about = {
            "format": FORMAT,
            "sites": json.dumps({name: len(seen.values.mean) for name, seen in self.items()}),
            "about": json.dumps(
                {
                    "under": self.under,
                    "samples": self.samples,
                    "batches": self.batches,
                    "unvisited": self.unvisited,
                    "functional": self.functional,
                    "model": known,
                    "parts": parts,
                    "origin": origin,
                }
            ),
        }
        with writing(path, force=force) as temporary:
            save_file(self._tensors(), temporary, metadata=about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote. Raises CheckpointError for a file that is absent, cut off, or something else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"moments were to be read from {path}: {error}. {REMAKE}") from error
        if about.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} was given as moments, but its format is {about.get('format')!r} and not {FORMAT!r}. {REMAKE}"
            )
        try:
            return cls(_observed(json.loads(about["sites"]), tensors), **_about(json.loads(about["about"])))
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{path} holds moments that contradict themselves ({error}). {REMAKE}") from error

    def _tensors(self) -> dict[str, Tensor]:
        pairs = [(seen.values, seen.images) for seen in self.values()]
        columns = [t for v, i in pairs for t in (v.mean, v.var, i.mean, i.var)]
        empty = torch.zeros(0, dtype=torch.float64)
        return {name: torch.cat([empty, *(t.cpu() for t in columns[k::4])]) for k, name in enumerate(FIELDS)} | {
            "counts": torch.tensor([[v.count, i.count] for v, i in pairs], dtype=torch.float64).reshape(-1, 2)
        }

    def _records(self) -> tuple[Mapping[str, Any], ...]:
        """One record per pass: those it came with, or one of its own."""
        if self.parts:
            return self.parts
        digest = hashlib.sha256()
        for name, tensor in self._tensors().items():
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return ({"digest": digest.hexdigest(), "samples": self.samples, "batches": self.batches},)

    def _digests(self) -> set[str]:
        return {str(record["digest"]) for record in self._records()}


def _refuse_other_sites(one: Observation, other: Observation) -> None:
    ours, theirs = ({*each, *each.unvisited} for each in (one, other))
    strange = sorted(ours ^ theirs)
    if strange:
        holder = "one" if strange[0] in ours else "the other"
        raise ModelError(
            f"moments of different models were to be merged: only {holder} has a batch norm {strange[0]!r} "
            f"({len(strange)} sites differ). Observe the same model, with the same include=, at both sites."
        )


def _about(given: Mapping[str, Any]) -> dict[str, Any]:
    if given["under"] not in ("batch", "running"):
        raise ValueError(f"under is {given['under']!r}")
    for part in given["parts"]:
        part["digest"], int(part["samples"])  # what merging and the reports read
    int(given["samples"]), int(given["batches"]), tuple(given["unvisited"])
    kept = ("under", "samples", "batches", "unvisited", "functional", "model", "parts")
    return {name: given[name] for name in kept}


def _observed(sizes: Mapping[str, int], tensors: Mapping[str, Tensor]) -> dict[str, Observed]:
    counts = tensors["counts"].tolist()
    columns = [torch.split(tensors[name], list(sizes.values())) for name in FIELDS]
    for tensor in tensors.values():
        if not bool(torch.isfinite(tensor).all()) or tensor.dtype != torch.float64:
            raise ValueError("numbers that are not finite, or not float64")
    if any(not 1 <= count < math.inf for pair in counts for count in pair):
        raise ValueError("a count below 1")
    if any(bool((tensors[name] < 0).any()) for name in FIELDS[1::2]):
        raise ValueError("a variance below 0")
    return {
        name: Observed(Moments(values, *row[:2]), Moments(images, *row[2:]))
        for name, (values, images), *row in zip(sizes, counts, *columns, strict=True)
    }
