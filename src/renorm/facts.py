"""What can be known about a model, and about batches if there are any: each fact measured when asked for, once."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, islice
from math import inf, isfinite
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.optim import Optimizer

from renorm.accuracy import FEWEST, Accuracy, Home, Look, estimate, look, mean_moved, signals
from renorm.calls import Caller, read
from renorm.columns import Columns
from renorm.costs import PASSES, price
from renorm.errors import BatchError, UsageError
from renorm.freeze import holds_statistics
from renorm.initial import was_trained, without_it
from renorm.kind import Kind, kind, moved_at, traces
from renorm.loop import Loop
from renorm.mend import Fix, Without, reestimating
from renorm.methods.equal_mix import class_mix
from renorm.mixture import Mixture, mixtures
from renorm.moments import Moments, Observed
from renorm.observation import Observation
from renorm.observe import finish, observing, sites_to_observe
from renorm.ranks import of_files, of_group
from renorm.second_look import (
    Gap,
    Padding,
    Parting,
    calls_in_a_forward,
    depends_on_company,
    folded_apart,
    gap_between_modes,
    trailing_padding,
)
from renorm.shift import Shift, net_distance
from renorm.sites import Site, find_sites, is_lazy, unwrap, walk
from renorm.state import preserving
from renorm.stored import Stored
from renorm.suspects import Verdict, interrogate, worth_asking
from renorm.units import Mistake, mistakes_among

if TYPE_CHECKING:
    from renorm.profile import Profile

__all__ = ["Facts"]

LOOKED = 256  # samples of the first batches by which accuracy, kind and mixtures are estimated: 3 points
KEPT = 128  # samples of the first batches that are kept for a second look: the standard error of a share is 4 points
PARTS = 20  # batches whose moments are kept apart: users bring 5 to 20


@dataclass(frozen=True)
class Facts:
    """What can be known about a model, and about batches if there are any; asking for a fact measures it, once.

    The model is the same, bit for bit, after any of them.
    """

    model: nn.Module
    batches: Iterable[Any] | None = None
    source: Profile | None = None
    caller: Caller = field(default_factory=Caller)
    file: Mapping[str, Tensor] | None = None  # the tensors of the model's checkpoint, by plain name
    optimizers: Sequence[Optimizer] = ()
    loop: Loop | None = None  # what a training loop did, where one was watched
    graph: tuple[Stored, ...] | None = None  # the batch norms of an exported file, which `model` is then made of
    columns: Columns | None = None  # of the table that the model was trained on
    settings: bool = True  # whether eps and momentum are the model's: a file of weights does not say
    domains: Sequence[Hashable] | None = None  # the domain of each sample, in the order of the batches
    others: Sequence[Mapping[str, Tensor]] | Literal["group"] | None = (
        None  # checkpoints of other ranks, or the ranks here
    )
    folded: nn.Module | None = None  # what is said to be this model without its batch norms
    passes: float = inf  # the most passes over the batches that may be spent
    _kept: dict[int, Any] = field(default_factory=dict, repr=False, init=False)
    _failed: dict[int, Exception] = field(default_factory=dict, repr=False, init=False)
    _parts: list[Mapping[str, Observed]] = field(default_factory=list, repr=False, init=False)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every norm layer, of any kind; scripted ones, which cannot be looked into, are left out."""
        return tuple(site for site in find_sites(self.model) if not isinstance(site.module, ScriptModule))

    @cached_property
    def batch(self) -> tuple[Site, ...]:
        """The batch norm sites."""
        return tuple(site for site in self.sites if site.kind == "batch")

    @cached_property
    def held(self) -> dict[str, Moments]:
        """The statistics that each batch norm site holds, by name; sites without any are left out."""
        found = {site.name: site.statistics() for site in self.batch}
        return {name: moments for name, moments in found.items() if moments is not None}

    @cached_property
    def new(self) -> frozenset[str]:
        """The sites whose statistics are those that every layer is created with: mean 0 and variance 1 throughout."""
        return frozenset(
            name
            for name, held in self.held.items()
            if held.mean.numel() and bool((held.mean == 0).all() and (held.var == 1).all())
        )

    @cached_property
    def broken(self) -> frozenset[str]:
        """The sites whose statistics are missing, impossible, or lost though the layer's weights were trained."""
        absent = {site.name for site in self.batch if site.tensors is None}
        impossible = {
            name
            for name, held in self.held.items()
            if not bool((held.mean.isfinite() & held.var.isfinite() & (held.var >= 0)).all())
        }
        lost = self.new if len(self.new) < len(self.held) or any(map(was_trained, self.batch)) else frozenset[str]()
        return frozenset(absent | impossible | lost)

    @cached_property
    def ranks(self) -> list[dict[str, Moments]]:
        """What the batch norms of each rank hold: in a group in the order of the ranks, of checkpoints this model's first."""
        return of_group(self.batch) if self.others == "group" else of_files(self.batch, self.others or ())

    @cached_property
    def thawing(self) -> tuple[Site, ...]:
        """The batch norms that look frozen and that `train()` would set moving."""
        root = unwrap(self.model)
        trains = any(p.requires_grad for p in root.parameters())
        meant = [s for s in self.batch if not is_lazy(s) and s.tracks and not s.module.training]
        meant = [s for s in meant if not holds_statistics(s.module) and (root.training or (trains and _is_stopped(s)))]
        others = [m for _, m in walk(root) if "train" in vars(m) or type(m).train is not nn.Module.train]
        # a train() of the model's own has to be asked; one that a freeze put there remembers being asked, and holds only itself
        if meant and others and not any(map(holds_statistics, others)) and not any(map(is_lazy, self.batch)):
            with preserving(root):
                root.train()
                meant = [site for site in meant if site.module.training]
        return tuple(meant)

    @cached_property
    def observed(self) -> Observation:
        """What one pass over the batches sends into each site while the model runs as it would in use.

        Without a batch norm layer, the first batch only: it shows whether batch norm is called as a function.
        """
        batches = self.batches if self.batches is not None else ()
        asked = batches if self.batch else islice(batches, 1)
        passing = observing(
            self.model, self._keeping(asked), under="running", caller=self.caller, failed=self._failed.__setitem__
        )
        return finish(self._noting(passing), sites_to_observe(self.model), under="running")

    def _keeping(self, batches: Iterable[Any]) -> Iterable[Any]:
        """The batches themselves; the first are kept, so that a second look needs no second reading."""
        if isinstance(batches, Tensor | str | bytes | nn.Module) or not isinstance(batches, Iterable):
            return batches  # observe says what is wrong with them
        return self._remembering(batches)

    def _remembering(self, batches: Iterable[Any]) -> Iterator[Any]:
        kept = 0
        for index, batch in enumerate(batches):
            if kept < LOOKED:
                self._kept[index] = batch
                kept += read(batch).samples
            yield batch

    def _noting(self, passing: Generator[Observation]) -> Generator[Observation]:
        try:
            for seen in passing:
                if len(self._parts) < PARTS:
                    self._parts.append(dict(seen))
                yield seen
            if self._failed and not self._parts:
                raise next(iter(self._failed.values()))  # none could be run: then that is what is wrong
        finally:
            passing.close()

    @property
    def failed(self) -> Mapping[int, Exception]:
        """The batches that the model could not run, by number, and why; they are left out of everything."""
        _ = self.observed if self.batches is not None else None
        return self._failed

    def _able(self) -> Iterable[Any]:
        """The batches, to be read again, without those that the model could not run."""
        batches = self.batches if self.batches is not None else ()
        return Without(batches, self._failed)  # which ones may not be known yet

    @cached_property
    def parts(self) -> list[dict[str, Observed]]:
        """What each of the first batches alone sent into the sites it reached."""
        _ = self.observed
        earlier: list[Mapping[str, Observed]] = [{}, *self._parts[:-1]]
        return [
            {n: seen.without(before.get(n)) for n, seen in total.items() if seen is not before.get(n)}
            for before, total in zip(earlier, self._parts, strict=True)
        ]

    @cached_property
    def few(self) -> list[Any]:
        """The first batches, KEPT samples or one batch more, as they came."""
        _ = self.observed
        reached = list(accumulate(read(batch).samples for batch in self._sound))
        return [batch for batch, upto in zip(self._sound, [0, *reached], strict=False) if upto < KEPT]

    @property
    def _sound(self) -> list[Any]:
        """The batches that were kept, without those that the model could not run."""
        return [batch for index, batch in self._kept.items() if index not in self._failed]

    @cached_property
    def look(self) -> Look | None:
        """What the model says of the first batches (LOOKED samples) as it is and recalibrated; None where nothing can be told.

        That is for fewer than 32 samples, outputs that are no logits (N, classes), and statistics that are broken.
        """
        _ = self.observed
        sound = self.held and not self.broken and not self.observed.unvisited
        if not sound or sum(read(batch).samples for batch in self._sound) < FEWEST:
            return None
        try:
            return look(self.model, self._sound, self.caller, self.source)
        except (BatchError, UsageError):  # no logits, or a last batch that cannot stand alone
            return None

    @cached_property
    def accuracy(self) -> Accuracy | None:
        """The share of right answers, estimated without labels; None as for `look`."""
        if self.look is None:
            return None
        home = Home.known(self.source)
        found = signals(self.look, moved=self.moved, home=home)
        return estimate(found, samples=len(self.look.source), home=home)

    @cached_property
    def kind(self) -> Kind | None:
        """What kind of shift it is; None as for `look`."""
        return None if self.look is None else kind(traces(self.look, values=self.moved, source=self.source))

    @cached_property
    def moved(self) -> float:
        """How far the batches lie from the source, mean over sites: at equal class mix with a profile, else as they are."""
        if self.source is not None and self.look is not None:
            mix = class_mix(self.look.source, self.source.prior)
            return moved_at(mix, self.source, self.observed, self.batch)
        return mean_moved(shift.moved for shift in self.shifts.values())

    @cached_property
    def gap(self) -> Gap | None:
        """How far the answers move when batch norms normalise by the batch, as in training; None where it cannot be said."""
        return gap_between_modes(self.model, self.few, self.batch, self.caller)

    @cached_property
    def calls(self) -> Mapping[str, int]:
        """How often each site is called in one forward, on the first batch or in the loop that was watched."""
        if self.loop is not None:
            return {name: counts.calls for name, counts in self.loop.counts.items()}
        return calls_in_a_forward(self.model, self.few[0], self.batch, self.caller) if self.few else {}

    @cached_property
    def company(self) -> float | None:
        """How far a sample's answer depends on the samples beside it, in evaluation; None where it cannot be said."""
        return depends_on_company(self.model, self.few[0], self.caller) if self.few else None

    @cached_property
    def parting(self) -> Parting | None:
        """How far the folded model answers from this one, and from which site on; None without one."""
        if self.folded is None or not self.few:
            return None
        return folded_apart(self.model, self.folded, self.few[0], self.batch, self.caller)

    @cached_property
    def padding(self) -> dict[str, Padding]:
        """Per site that reads sequences: the share of padded positions, and how far they move its moments in their sd."""
        return trailing_padding(self.model, self.few, self.batch, self.caller)

    @cached_property
    def mixtures(self) -> dict[str, Mixture]:
        """Per site, the groups that the first samples fall into, or how far known domains lie apart."""
        _ = self.observed
        known: list[Hashable] | None = None if self.domains is None else []
        at = 0
        for index, batch in self._kept.items():
            upto = at + read(batch).samples
            if known is not None and self.domains is not None and index not in self._failed:
                known += self.domains[at:upto]
            at = upto
        return mixtures(self.model, self._sound, self.batch, self.caller, known)

    @cached_property
    def suspect(self) -> Verdict | None:
        """The wrong preprocessing whose repair makes the shift vanish, if there is one."""
        return interrogate(self.model, self.few, self.distances, self._redistanced, self.caller)

    @cached_property
    def mistakes(self) -> tuple[Mistake, ...]:
        """What is wrong with the columns of a table; empty for other inputs, and where nothing tells how they should lie."""
        _ = self.observed
        held = {name: moments for name, moments in self.held.items() if name not in self.broken | self.new}
        return mistakes_among(self._sound, self.columns, held, self.parts)

    @property
    def spoilt(self) -> bool:
        """Whether the inputs are plainly wrong, so that statistics estimated on them would hide a mistake."""
        hidden = self.can("suspect") and self.suspect is not None
        return hidden or any(mistake.kind != "elsewhere" for mistake in self.mistakes)

    def _redistanced(self, batches: Iterable[Any]) -> dict[str, float]:
        """`distances` of other batches."""
        return Facts(self.model, batches, self.source, self.caller).distances

    @cached_property
    def shifts(self) -> dict[str, Shift]:
        """How far the batches lie from the held statistics, for every site that they reached."""
        eps = {site.name: site.eps for site in self.batch}
        return {
            name: Shift.between(self.held[name], seen.values, eps=eps[name])
            for name, seen in self.observed.items()
            if name in self.held
        }

    @cached_property
    def distances(self) -> dict[str, float]:
        """Each site's shift in one number (`net_distance`), where its statistics are numbers and were ever estimated."""
        far = {site.name: self._far(site, self.held[site.name]) for site in self.batch if site.name in self.shifts}
        return {n: far[n] for n in self.shifts if n in far and n not in self.new and isfinite(far[n])}

    @cached_property
    def settled(self) -> dict[str, float]:
        """`distances` of the first batches without what few updates left of mean 0 and variance 1, where that is nearer."""
        return without_it(self.model, self.batch, self.distances, lambda: self._redistanced(self.few))

    def _far(self, site: Site, held: Moments) -> float:
        return net_distance(held, self.observed[site.name], eps=site.eps)

    def has(self, fact: str) -> bool:
        """Whether `fact` can be measured with what was given."""
        if fact in ("file", "graph", "loop"):
            return getattr(self, fact) is not None
        if fact == "settings":
            return self.settings
        if fact == "parting":
            return self.folded is not None and self.batches is not None
        if fact == "ranks":
            return self.others is not None
        if fact == "optimizers":
            return bool(self.optimizers)
        if fact == "calls" and self.loop is not None:
            return True
        return price([fact]) == 0 or self.batches is not None

    @property
    def spent(self) -> int:
        """What the facts that were measured may have taken; the detective takes nothing where there is no shift to explain."""
        known = self._measured
        return sum(PASSES[fact] for fact in known if fact != "suspect" or worth_asking(self.distances))

    @property
    def _measured(self) -> set[str]:
        return PASSES.keys() & vars(self).keys()

    def affords(self, *facts: str) -> bool:
        """Whether `facts` are measured already, or what that takes is left of `passes`."""
        known = self._measured
        if "distances" in known and not worth_asking(self.distances):
            known.add("suspect")
        due = price(facts, known)
        return due == 0 or self.spent + due <= self.passes

    def can(self, *facts: str) -> bool:
        """Whether `facts` can be measured with what was given, and afforded."""
        return all(map(self.has, facts)) and self.affords(*facts)

    @cached_property
    def reestimate(self) -> Fix | None:
        """Estimates the broken sites anew, all at once; None without batches that can be read again."""
        return self.estimating(*(site.name for site in self.batch if site.name in self.broken))

    def estimating(self, *names: str) -> Fix | None:
        """Estimates these sites anew from the batches alone; None as for `reestimate`, or where none of them can hold any."""
        if self.batches is None or isinstance(self.batches, Iterator):
            return None
        able = [name for name in names if name in self.held]
        return reestimating(able, self._able(), self.caller, prior=0) if able else None

    @cached_property
    def recalibrate(self) -> Fix | None:
        """Recalibrates every site, keeping as much of the source as `prior="auto"` does; None as for `reestimate`."""
        if self.batches is None or isinstance(self.batches, Iterator) or not self.held:
            return None
        return reestimating(list(self.held), self._able(), self.caller, prior="auto", source=self.source)


def _is_stopped(site: Site) -> bool:
    affine = site.affine.values()
    return bool(affine) and not any(p.requires_grad for p in affine)
