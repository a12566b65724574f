"""BN203: averaged or merged weights beside the statistics of a model before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from renorm.freeze import holds_statistics
from renorm.provenance import plain_names
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say
from renorm.sites import unwrap


@dataclass(frozen=True, kw_only=True)
class StaleStatistics(Rule):
    """Weights that moved (an average, a merged adapter) while the statistics behind them did not: they fit other weights.

    Seen against a `checkpoint` of the model before: its convolutions and linear layers differ from the model's, the last one
    apart, and the statistics are the same bits. Layers that are held still are left out. With batches it is an error where
    these lie beyond the limit, and nothing where they do not.
    """

    id: ClassVar[str] = "BN203"
    title: ClassVar[str] = say("new weights, old statistics")
    needs: ClassVar[tuple[str, ...]] = ("file", "held")
    wants: ClassVar[tuple[str, ...]] = ("distances",)
    explains: ClassVar[tuple[str, ...]] = ("BN301", "BN302")

    limit: float = 0.3  # source sd, as for a data shift (BN302)

    def check(self, facts: Facts) -> Iterator[Finding]:
        unmoved = _unmoved(facts)
        stale = [s.name for s in facts.batch if s.name in facts.held and s.tracks and s.name in unmoved]
        far = (
            {name: facts.distances[name] for name in stale if name in facts.distances} if facts.can("distances") else {}
        )
        if not stale or (far and max(far.values()) <= self.limit):
            return
        worst = max(far, key=lambda name: far[name], default=stale[0])
        yield Finding(
            rule=self.id,
            site=worst,
            severity="error" if far else "warning",
            value=far.get(worst, float(len(stale))),
            unit=say("source sd")
            if far
            else many(
                len(stale), "layer with the statistics of other weights", "layers with the statistics of other weights"
            ),
            limit=self.limit if far else 0.0,
            message=say(
                "The weights are not those of the checkpoint any more, the statistics still are: merged or averaged weights "
                "were put beside them."
            ),
            advice=say(
                "Estimate the statistics for these weights (recalibrate, or torch's update_bn), or average "
                "the buffers too."
            ),
            fix_=facts.estimating(*stale),
        )


def _unmoved(facts: Facts) -> set[str]:
    """The sites whose statistics are the file's though other weights than the head's are not; empty without a file."""
    if facts.file is None:
        return set()
    own = unwrap(facts.model).state_dict()
    plain = {plain: own[name] for plain, name in plain_names(own).items()}
    differs = {name for name, tensor in plain.items() if name in facts.file and not _same(tensor, facts.file[name])}
    norms = tuple(f"{site.name}.".lstrip(".") for site in facts.sites)
    weights = [name for name in plain if plain[name].is_floating_point() and not name.startswith(norms)]
    if differs.isdisjoint(weights[:-2]):  # a new head is no reason
        return set()
    held = {site.name for site in facts.batch if holds_statistics(site.module)}
    moved = {name.rpartition(".")[0] for name in differs if name.rpartition(".")[2] in ("running_mean", "running_var")}
    return {site.name for site in facts.batch} - held - moved


def _same(tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape == other.shape and bool((tensor.cpu() == other.cpu().to(tensor.dtype)).all())
