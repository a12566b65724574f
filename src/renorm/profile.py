"""What the source's owner can tell once: how each class looks at every batch norm, and how sure the model is at home."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.calls import Caller, Forward, Output, nonempty
from renorm.errors import BatchError, CheckpointError, ModelError, UsageError
from renorm.files import writing
from renorm.moments import TINY, Moments
from renorm.observe import visiting
from renorm.shift import Shift
from renorm.sites import Site, batch_sites, find_sites
from renorm.state import evaluating, preserving

FLOOR = 0.02  # the least gap believed: training images, which most profiles are made of, show no train/test gap at all
ENOUGH = 50  # images of a class whose moments are believed as they are
UNEVEN = 0.5  # heart beats 0.16-0.22, gas sensors 0.89, the image sets 1.00: nothing was measured between
FULL_BYTES, SMALL_BYTES = (
    2_000_000,
    4_600_000,
)  # class moments: exact in float32 up to the first, else float16 within the second
FORMAT = "renorm-profile-1"


@dataclass(frozen=True, kw_only=True, eq=False)
class Profile:
    """A model's source in a few numbers: class-conditional moments of every site, the source's own gap, its confidence.

    held        {site: the statistics the model held}, in the order of the sites; with the channels, the fingerprint
    gaps        {site: the `moved` of fresh source data against `held`}, rid of the noise of finitely many images
    counts      (K,) images per class (sums of probabilities without labels)
    base        (2P,) mean over classes of the image moments, P channels in all: first moments, then second
    scores      (K, R) and
    directions  (R, 2P): what a class adds to `base` is `scores[k] @ directions`. R < K only where that would be large
    samples     source images read
    labelled    whether classes are labels, or the model's own softmax
    accuracy    on the profile's images; None without labels
    confidence  mean largest probability on them
    threshold   the confidence below which as many of them lie as are answered wrong (ATC); None without labels, or in files
                of before it was kept

    Moments are kept in units of `held`: ((x − μs)/σs) and its square, averaged per image, then per class.
    """

    held: Mapping[str, Moments]
    gaps: Mapping[str, float]
    counts: Tensor
    base: Tensor
    scores: Tensor
    directions: Tensor
    samples: int
    labelled: bool
    accuracy: float | None
    confidence: float
    threshold: float | None = None

    @property
    def prior(self) -> Tensor:
        """The source's class mix, (K,) float64, summing to one."""
        return self.counts / self.counts.sum()

    @property
    def evenness(self) -> float:
        """How evenly the source's classes are mixed, in [0, 1]: entropy of `prior` over that of equal shares."""
        entropy = -float(torch.special.xlogy(self.prior, self.prior).sum())
        return entropy / math.log(len(self.prior)) if len(self.prior) > 1 else 1.0

    @property
    def is_uneven(self) -> bool:
        """Whether `evenness` is below one half, where a class mix found on other data can hardly be believed."""
        return self.evenness < UNEVEN

    @property
    def belief(self) -> Tensor:
        """How far a share of each class found on other data is believed, (K,) in [0, 1]: by its images, 50 and more in full.

        Times `evenness`: a model trained on nearly one class is unsure of others wherever the data moved, which looks like
        more of them. On heart beats (93 % of one class) believing them in full turned normal beats into others.
        """
        return self.evenness * (self.counts.double() / ENOUGH).clamp_max(1)

    def gap(self, site: str) -> float:
        """The `moved` to be expected at `site` of data that did not shift: as measured, and 0.02 at the least."""
        return max(FLOOR, self.gaps.get(site, 0.0))

    def at(self, mix: Tensor) -> dict[str, Moments]:
        """The source's moments at every site if its classes were mixed as `mix`, (K,) summing to one."""
        home = (mix.to(self.scores) @ self.scores) @ self.directions + self.base
        found, start, total = {}, 0, len(home) // 2
        for name, held in self.held.items():
            stop = start + len(held.mean)
            first, second = home[start:stop], home[total + start : total + stop]
            var = (second - first.square()).clamp_min(0)
            found[name] = Moments(math.inf, held.mean + first * held.sd, var * held.var)
            start = stop
        return found

    def check(self, model: nn.Module) -> None:
        """Raise ModelError, naming the first site that differs, unless this profile was made of such a model."""
        channels = {site.name: site.channels for site in find_sites(model)}
        for name, held in self.held.items():
            if channels.get(name) != len(held.mean):
                found = f"has {channels[name]} channels there" if name in channels else "has no norm layer of that name"
                raise ModelError(
                    f"the profile knows a batch norm {name!r} with {len(held.mean)} channels; "
                    f"this {type(model).__name__} {found}. Make a profile of this model: renorm.profile(model, source_batches)."
                )

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write a safetensors side-car; complete or absent, over an existing file only with `force`."""
        from safetensors.torch import save_file

        sites = list(self.held.values())
        tensors = {
            "held.mean": torch.cat([m.mean for m in sites]).float(),
            "held.var": torch.cat([m.var for m in sites]).float(),
            "gaps": torch.tensor([self.gaps[name] for name in self.held]),
            "counts": self.counts,
            "base": self.base.float(),
            "scores": _stored(self.scores),
            "directions": _stored(self.directions),
        }
        if len(self.scores) * self.directions.shape[1] * 4 > FULL_BYTES:
            tensors |= {name: tensors[name].half() for name in ("scores", "directions")}
        about = {
            "format": FORMAT,
            "sites": json.dumps({name: len(m.mean) for name, m in self.held.items()}),
            "source": json.dumps(
                {name: getattr(self, name) for name in ("samples", "labelled", "accuracy", "confidence", "threshold")}
            ),
        }
        with writing(path, force=force) as temporary:
            save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata=about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read what `save` wrote. Raises CheckpointError for a file that is absent, cut off, or something else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name).double() for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"a source profile was to be read from {path}: {error}. Make one with renorm profile."
            ) from error
        if about.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} was given as a source profile, but its format is {about.get('format')!r} and not {FORMAT!r}; "
                "make one with renorm profile MODEL SOURCE_DATA -o FILE."
            )
        sizes = json.loads(about["sites"])
        columns = (tensors[n].split(list(sizes.values())) for n in ("held.mean", "held.var"))
        return cls(
            held={name: Moments(math.inf, mean, var) for name, mean, var in zip(sizes, *columns, strict=True)},
            gaps=dict(zip(sizes, tensors["gaps"].tolist(), strict=True)),
            **{name: tensors[name] for name in ("counts", "base", "scores", "directions")},
            **json.loads(about["source"]),
        )


def profile(
    model: nn.Module,
    labelled_batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    output: Output | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
) -> Profile:
    """Measure a model on its own source, in one pass in evaluation; the model comes out bit-identical.

    The batches should be a sample of the source: their class mix is taken for the source's. Held-out images are best, since
    they also show the source's own gap; training images do. About 50 images a class are enough. Batches without labels
    are sorted by the model's own softmax.

    Raises BatchError for batches that cannot be used, or labels that are no class numbers of the model's output;
    UsageError where the output has no logits (N, K); NoBatchNorm for a model without batch norm statistics.
    """
    caller = Caller(forward=forward, output=output, device=device, autocast=autocast, channels_last=channels_last)
    sites = batch_sites(model, asked="profile")
    tally = _Tally(sites)
    with preserving(model), evaluating(model), visiting(model, sites, tally.visit):
        for index, batch in nonempty(labelled_batches, asked="profile"):
            result = caller.run(model, batch, index=index)
            tally.count(class_logits(caller.logits(result, asked="profile"), result.samples), result.labels, index)
    return tally.profile()


def class_logits(logits: Tensor, samples: int) -> Tensor:
    """`logits`, float64 on the CPU, if they are one row of class scores per sample; a single column is a sigmoid's.

    Shapes: logits (N, K) → (N, K); (N, 1) or (N,) → (N, 2).
    Raises UsageError for another shape: equal label mix needs one class per sample.
    """
    logits = logits[:, None] if logits.dim() == 1 else logits
    if logits.dim() != 2 or len(logits) != samples:
        raise UsageError(
            f"a source profile sorts samples by class and needs logits (N, K); got {tuple(logits.shape)} for {samples} "
            "samples. Say with output= how to get them, or recalibrate without source=."
        )
    logits = logits.detach().to("cpu", torch.float64)
    return logits if logits.shape[1] > 1 else torch.cat([torch.zeros_like(logits), logits], dim=1)


class _Tally:
    """Sums over source images of their moments at every site: by class, and by halves for the gap."""

    def __init__(self, sites: list[Site]) -> None:
        self._held = {site.name: held for site in sites if (held := site.statistics()) is not None}
        self._eps = {site.name: site.eps for site in sites}
        self._now: dict[str, list[Tensor]] = {}
        self._by_class: dict[str, Tensor] = {}
        self._by_half: dict[str, Tensor] = {}
        self._counts = torch.zeros(0, dtype=torch.float64)
        self._halves = torch.zeros(2, dtype=torch.float64)
        self._samples = self._right = 0
        self._sure: list[Tensor] = []
        self._labelled = True

    def visit(self, site: Site, x: Tensor) -> None:
        if x.numel():
            self._now.setdefault(site.name, []).append(_image_moments(x.movedim(site.axis, 1), self._held[site.name]))

    def count(self, logits: Tensor, labels: Any, index: int) -> None:
        """Book what `visit` saw of one batch under its classes, now that they are known."""
        probabilities = logits.softmax(1)
        if index == 0:
            self._counts, self._labelled = torch.zeros(logits.shape[1], dtype=torch.float64), labels is not None
        classes = self._classes(probabilities, labels, index)
        halves = F.one_hot((self._samples + torch.arange(len(logits))) % 2, 2).double()
        for name, calls in self._now.items():
            rows = torch.stack(calls).mean(0) if len({len(c) for c in calls}) == 1 else torch.cat(calls)
            if len(rows) != len(logits):  # not one row per sample, as in a detector's head: the same for every class
                rows = rows.mean(0).expand(len(logits), -1)
            _add(self._by_class, name, classes.T @ rows)
            _add(self._by_half, name, halves.T @ rows)
        self._now.clear()
        self._counts += classes.sum(0)
        self._halves += halves.sum(0)
        self._samples += len(logits)
        self._sure.append(probabilities.amax(1))
        if self._labelled:
            self._right += int((logits.argmax(1) == classes.argmax(1)).sum())

    def profile(self) -> Profile:
        held = {name: self._held[name] for name in self._held if name in self._by_class}
        by_class = [self._by_class[name].chunk(2, dim=1) for name in held]
        sums = torch.cat([first for first, _ in by_class] + [second for _, second in by_class], dim=1)
        seen = self._counts > 0
        base = sums.sum(0) / self._samples
        excess = torch.where(seen[:, None], sums / self._counts.clamp_min(TINY)[:, None] - base, 0.0)
        scores, directions = low_rank(excess)
        sure, right = torch.cat(self._sure), self._right / self._samples
        return Profile(
            held=held,
            gaps={name: self._gap(name) for name in held},
            counts=self._counts,
            base=base,
            scores=scores,
            directions=directions,
            samples=self._samples,
            labelled=self._labelled,
            accuracy=right if self._labelled else None,
            confidence=float(sure.mean()),
            threshold=reached_by(sure, right) if self._labelled else None,
        )

    def _classes(self, probabilities: Tensor, labels: Any, index: int) -> Tensor:
        if (labels is not None) != self._labelled:
            raise BatchError(
                f"batch {index} comes {'without' if labels is None else 'with'} labels, unlike those before it; "
                "profile takes all of them labelled, or none."
            )
        if labels is None:
            return probabilities
        labels = torch.as_tensor(labels).cpu().reshape(-1)
        known = len(labels) == len(probabilities) and not labels.is_floating_point()
        if not known or int(labels.min()) < 0 or int(labels.max()) >= probabilities.shape[1]:
            raise BatchError(
                f"the labels of batch {index} should be {len(probabilities)} class numbers from 0 to "
                f"{probabilities.shape[1] - 1}; got {len(labels)} of {labels.dtype}, {labels.min()} to {labels.max()}. "
                "Leave labels out to use the model's own predictions."
            )
        return F.one_hot(labels.long(), probabilities.shape[1]).double()

    def _gap(self, name: str) -> float:
        halves, held, eps = self._by_half[name], self._held[name], self._eps[name]
        whole = moved(halves.sum(0) / self._samples, held, eps=eps)
        if self._samples < 2:
            return whole
        # with noise c/n the halves show gap + 2c/n and the whole gap + c/n: the difference is the noise
        part = sum(moved(half, held, eps=eps) for half in halves / self._halves[:, None]) / 2
        return max(0.0, 2 * whole - part)


def reached_by(sure: Tensor, accuracy: float) -> float:
    """The confidence that a share `accuracy` of these reach. Shapes: sure (N,)."""
    return float(torch.quantile(sure.sort().values[-(2**24) :], 1.0 - accuracy))  # torch's quantile takes no more


def moved(home: Tensor, held: Moments, *, eps: float) -> float:
    """`Shift.moved` from `held` of moments in its own units, first ones and then second. Shapes: home (2C,)."""
    first, second = home.chunk(2)
    there = Moments(math.inf, held.mean + first * held.sd, (second - first.square()).clamp_min(0) * held.var)
    return Shift.between(held, there, eps=eps).moved


def low_rank(excess: Tensor) -> tuple[Tensor, Tensor]:
    """`scores` (K, R), `directions` (R, 2P) whose product is `excess` (K, 2P), or the nearest that fits into 4.6 MB.

    Exact, with R = K, while float32 stays below 2 MB; else the truncated singular value decomposition, with both factors
    scaled to the size of `excess`, so that float16 holds them. One decomposition for all sites: they see the same classes.
    """
    classes, columns = excess.shape
    rank = min(classes, SMALL_BYTES // (2 * (classes + columns)))
    if classes * columns * 4 <= FULL_BYTES:
        return torch.eye(classes, dtype=excess.dtype), excess
    values, vectors = torch.linalg.eigh(excess @ excess.T)  # of the K × K Gram matrix: columns are many
    scores = vectors[:, values.argsort(descending=True)[: max(1, rank)]] * math.sqrt(classes)
    return scores, scores.T @ excess / classes


def _stored(factor: Tensor) -> Tensor:
    return factor.float()


def _add(sums: dict[str, Tensor], name: str, more: Tensor) -> None:
    sums[name] = sums[name] + more if name in sums else more


def _image_moments(x: Tensor, held: Moments) -> Tensor:
    """Per sample the mean of (x − μs)/σs over positions, and of its square. Shapes: x (N, C, *) → (N, 2C) float64."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    wide = x.detach().double() if x.dtype == torch.float64 else x.detach().float()
    mean, sd = (t.to(wide).view(shape) for t in (held.mean, held.var.clamp_min(TINY).sqrt()))
    home = ((wide - mean) / sd).reshape(len(x), x.shape[1], -1)
    return torch.cat([home.mean(2), home.square().mean(2)], dim=1).cpu().double()
