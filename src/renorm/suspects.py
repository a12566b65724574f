"""The preprocessing detective: which usual mistake, taken back, makes the shift vanish?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.calls import Caller, map_tensors, read, tensors_in
from renorm.errors import RenormError
from renorm.evaluate import collect
from renorm.sites import unwrap

__all__ = ["Suspect", "Verdict", "interrogate", "suspects_of", "worth_asking"]

Distances = Mapping[str, float]


class Suspect(NamedTuple):
    """A usual mistake in preprocessing, by name, and the map that takes it back. Shapes: (N, C, H, W) → the same rank."""

    name: str
    repair: Callable[[Tensor], Tensor]


class Verdict(NamedTuple):
    """The mistake that explains the shift: mean distance over the sites as the data came, and with it taken back.

    `surer` is how much the model's mean confidence in its answers rises by that, None where it was not asked.
    """

    name: str
    before: float
    after: float
    surer: float | None
    site: str


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Pixels in [0, 1] less `mean` over `std`, as a model's own preprocessing or a widespread one."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalise(self, x: Tensor) -> Tensor:
        """Pixels in [0, 1] → input."""
        mean, std = self._along(x)
        return (x - mean) / std

    def pixels(self, x: Tensor) -> Tensor:
        """Input → pixels in [0, 1]."""
        mean, std = self._along(x)
        return x * std + mean

    def equals(self, other: Scaling) -> bool:
        """Whether both are the same map, with one number for all channels written once or once for each."""
        return all(a * len(b) == b * len(a) for a, b in ((self.mean, other.mean), (self.std, other.std)))

    def _along(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (x.new_tensor(v).reshape(1, -1, 1, 1) for v in (self.mean, self.std))
        return mean, std


IMAGENET = Scaling(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
HALF = Scaling(mean=(0.5,), std=(0.5,))
UNIT = Scaling(mean=(0.0,), std=(1.0,))

# Set on ResNet-20, ResNet-8 and MobileNet (tests/test_suspects.py plants every mistake and six corruptions on each), 128
# images: data of their own kind lie at a mean distance of 0.04 to 0.13. A planted mistake taken back leaves at most 0.32 of
# the distance; no suspect takes a corruption below 0.56. Channel order and inversion move moments little: taken back
# they leave 0.68 to 0.85, but the model's mean confidence then rises by 0.03 to 0.15. No other suspect, nor any
# on a corruption, lowers the distance to 0.9 and raises the confidence by 0.02.
START = 0.1  # mean distance, source sd: below, nothing is asked
FIT = (
    0.2  # mean distance, source sd: what is left may not exceed it, and between START and it only slight ones are asked
)
REST = 0.45  # share of the distance that a mistake taken back may leave
SLIGHT_REST, SURER = 0.9, 0.02  # the same for those that move moments little, and what confidence must rise by
ENOUGH = 32  # samples: one batch of so many is asked instead of all
SLIGHT = ("channels in the order BGR", "colours inverted")


def suspects_of(model: nn.Module) -> list[Suspect]:
    """The mistakes worth trying on `model`; with a `pretrained_cfg` its own scaling and size are known, else usual ones."""
    given = getattr(unwrap(model), "pretrained_cfg", None)
    known = given if isinstance(given, Mapping) else {}
    if "mean" in known and "std" in known:
        own = [Scaling(mean=tuple(known["mean"]), std=tuple(known["std"]))]
    else:
        own = [IMAGENET, HALF, UNIT]
    found = [
        Suspect("not divided by 255", lambda x: x / 255),
        Suspect("divided by 255 twice", lambda x: x * 255),
        Suspect("rows and channels mixed up", _relaid),
    ]
    for scaling in own:
        found += _about(scaling)
    size = known.get("input_size")
    if isinstance(size, Sequence) and len(size) == 3:
        found.append(Suspect("not resized", _resizing(int(size[1]), int(size[2]))))
    return found


def _about(own: Scaling) -> Iterator[Suspect]:
    yield Suspect("channels in the order BGR", lambda x: own.normalise(own.pixels(x).flip(1)))
    yield Suspect("colours inverted", lambda x: own.normalise(1 - own.pixels(x)))
    if len(set(own.mean)) > 1 or own.mean[0] != 0 or len(set(own.std)) > 1:  # else scaling is all there is to it
        yield Suspect("normalised twice", own.pixels)
        yield Suspect("not normalised", own.normalise)
        yield Suspect("neither divided by 255 nor normalised", lambda x: own.normalise(x / 255))
        yield Suspect("normalised without dividing by 255", lambda x: own.normalise(own.pixels(x) / 255))
        yield Suspect("divided by 255 twice, then normalised", lambda x: own.normalise(own.pixels(x) * 255))
    for other in (IMAGENET, HALF):
        if not own.equals(other):
            name = "normalised as for ImageNet" if other is IMAGENET else "normalised to [-1, 1]"
            yield Suspect(name, _translating(other, own))


def _translating(one: Scaling, own: Scaling) -> Callable[[Tensor], Tensor]:
    return lambda x: own.normalise(one.pixels(x))


def _relaid(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, h, w, c).permute(0, 3, 1, 2)


def _resizing(height: int, width: int) -> Callable[[Tensor], Tensor]:
    def resize(x: Tensor) -> Tensor:
        if x.shape[-2:] == (height, width):
            raise ValueError("it has the size that it should have")
        return F.interpolate(x, (height, width), mode="bicubic", antialias=True)

    return resize


def worth_asking(distances: Distances) -> bool:
    """Whether the data lie far enough from the statistics that a mistake may have been made."""
    return bool(distances) and _mean(distances) >= START


def interrogate(
    model: nn.Module,
    batches: Sequence[Any],
    before: Distances,
    distances: Callable[[Iterable[Any]], Distances],
    caller: Caller,
) -> Verdict | None:
    """The suspect that leaves the least of the shift, if what it leaves is little enough; None where none does.

    `before` are the distances of the batches as they came, in the order of the sites; `distances` measures others.
    A mistake that these inputs cannot have made is passed over. Batches without images (N, C, H, W) are not asked about.
    """
    if not worth_asking(before):
        return None
    if read(batches[0]).samples >= ENOUGH and len(batches) > 1:
        batches = batches[:1]
        before = distances(batches)
    if not any(_is_image(t) for batch in batches for t in tensors_in(batch)):
        return None
    start = _mean(before)
    best: Verdict | None = None
    sure = _confidence(model, batches, caller)
    for suspect in suspects_of(model):
        slight = suspect.name in SLIGHT
        if start < FIT and not slight:
            continue
        try:
            repaired = [_repaired(batch, suspect) for batch in batches]
            after = _mean(distances(repaired))
        except (RenormError, RuntimeError, ValueError):
            continue  # these inputs cannot have been made by this mistake
        # a little less than the best before it is no reason to prefer it: the simplest are asked first
        if after > min(FIT, (SLIGHT_REST if slight else REST) * start, 0.95 * best.after if best else FIT):
            continue
        surer = None
        if slight:
            now = _confidence(model, repaired, caller)
            surer = None if now is None or sure is None else now - sure
            if surer is None or surer < SURER:
                continue
        best = Verdict(suspect.name, start, after, surer, next(iter(before)))
    return best


def _is_image(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_floating_point()


def _repaired(batch: Any, suspect: Suspect) -> Any:
    return map_tensors(lambda t: suspect.repair(t) if _is_image(t) else t, batch)


def _confidence(model: nn.Module, batches: Sequence[Any], caller: Caller) -> float | None:
    """Mean probability of the first answer; None where the outputs are no logits (N, classes)."""
    try:
        logits = collect(model, batches, caller=caller, asked="the confidence").logits
    except (RenormError, RuntimeError):  # no logits, or of several sizes
        return None
    if logits.dim() != 2 or logits.shape[1] < 2:
        return None
    return float(logits.softmax(1).amax(1).mean())


def _mean(distances: Distances) -> float:
    return float(torch.tensor(list(distances.values()), dtype=torch.float64).mean())
