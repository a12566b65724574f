"""Momentum and eps as other libraries mean them: converted where a model comes in, told where one was not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from renorm.errors import UnknownName, UsageError
from renorm.said import say
from renorm.sites import find_sites


@dataclass(frozen=True)
class Convention:
    """What a library means by momentum (`keeps`: the weight of the old statistics), and what it takes if nothing is said."""

    keeps: bool
    momentum: float
    eps: float


CONVENTIONS: dict[str, Convention] = {
    "torch": Convention(keeps=False, momentum=0.1, eps=1e-5),
    "keras": Convention(keeps=True, momentum=0.99, eps=1e-3),
    "tensorflow": Convention(keeps=True, momentum=0.99, eps=1e-3),
    "flax": Convention(keeps=True, momentum=0.99, eps=1e-5),
}

SUSPICIOUS = (
    0.5  # torch's momentum says how much a new batch counts; one that counts more than all before is no average
)


def to_torch(library: str, momentum: float | None = None, eps: float | None = None) -> dict[str, float]:
    """`momentum` and `eps` for a torch layer, from what a layer of `library` was given; None is that library's default.

    Raises UnknownName for a library that is not in CONVENTIONS, UsageError for a momentum outside [0, 1] or an eps below 0.
    """
    if library not in CONVENTIONS:
        raise UnknownName("library", library, CONVENTIONS)
    known = CONVENTIONS[library]
    given = known.momentum if momentum is None else momentum
    added = known.eps if eps is None else eps
    if not 0 <= given <= 1:
        raise UsageError(f"momentum is a share in [0, 1]; {library}'s was said to be {given!r}.")
    if not added >= 0:
        raise UsageError(f"eps is added to a variance and at least 0; {library}'s was said to be {added!r}.")
    # rounded: 1 − 0.99 is 0.010000000000000009
    return {"momentum": round(1 - given, 12) if known.keeps else given, "eps": added}


def foreign_conventions(model: nn.Module) -> tuple[str, ...]:
    """In words, where the batch norms of `model` show another library's convention; empty where none does.

    A momentum above 0.5 in torch's meaning forgets everything before the last batch or two: it is TensorFlow's, Keras' or
    Flax's number, copied. A small one says nothing, and an eps alone neither.
    """
    odd = [s for s in find_sites(model) if s.kind == "batch" and s.tracks and (s.momentum or 0) > SUSPICIOUS]
    if not odd:
        return ()
    momenta = sorted({s.momentum for s in odd if s.momentum is not None})
    text = say(
        "{count} batch norms, {site!r} first, have momentum {momenta}: in torch that is the weight of the new batch, in "
        "TensorFlow, Keras and Flax of the old statistics. Set it to {right} before training{eps}.",
        count=len(odd),
        site=odd[0].name or "the model itself",
        momenta=_listed(momenta),
        right=_listed([round(1 - m, 12) for m in momenta]),
        eps=say("; eps is torch's 1e-05, where TensorFlow and Keras take 0.001 unless told: compare it with the source")
        if any(s.eps == CONVENTIONS["torch"].eps for s in odd)
        else "",
    )
    return (text,)


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
