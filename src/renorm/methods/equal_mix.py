"""Compare target and source at the same class mix, so that other shares of classes are not taken for another domain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from renorm.calls import Caller, nonempty, read, several_passes
from renorm.errors import UsageError
from renorm.methods.base import Estimate, Method
from renorm.moments import TINY, Moments
from renorm.observe import measure, visiting
from renorm.profile import Profile, class_logits
from renorm.said import say
from renorm.shift import Shift
from renorm.sites import Site
from renorm.state import evaluating, preserving
from renorm.trust import trust

# Digits by rows (recurrent, three seeds) and ResNet-20: mixes that fed on themselves lay at -0.04 to 0.00, true ones of one and
# three classes at 0.05 to 0.42 (`renorm bench architectures`, `recalibrate`).
SURER = 0.025
GROWTH = 1.2  # of a change against the least before it: 1.4 to 2.4 where mixes fed on themselves


@dataclass(frozen=True, kw_only=True)
class EqualMix(Method):
    """Every site holds what the target's moments would be if its classes were mixed as the source's.

    passes    how often each search reads the batches at the most, the first time running them twice; a mix that does not
              settle steadily is searched once more, and both are compared in one pass
    settled   stop once the class mix changed by less than this between two passes (sum over classes, 0 to 2)
    doubt     how much the source's own class mix counts in that estimate, as a share of the images; 0 believes the predictions,
              and is best where few classes are there, but runs away where the model mistakes most images for one class
    widest    the largest ratio of standard deviations, target to source, that a channel is believed, either way
    images    target images that weigh as much as the doubt about their moments
    surer     how much surer the model must be with a mix that did not settle steadily than with the source's own, on the
              samples where the two disagree (the evidence of `trust`, -1 to 1)

    A found share of a class is believed as far as the profile can vouch for it (`Profile.belief`): a class with few images, or
    a source of which nearly all is one class, would else seem to explain whatever makes the model unsure.

    What is presumed of the mix moves the statistics, these the predictions, and those the mix. Where samples tell little of
    their class it feeds on itself: under fog a recurrent reader of all ten digits came to see but two. So where a later pass
    changes the mix by a fifth more than an earlier one, what follows is compared with a model at the source's own mix. If
    classes are missing indeed, that one turns sure answers into doubtful ones; if it is no less sure, the mix is not believed.

    Needs `source=`. Each pass normalises every site by the moments found so far, so that what is measured downstream is what
    will be seen there; it then re-estimates the class mix from all predictions (Saerens, Latinne and Decaestecker 2002).
    Memory: one row of class probabilities per image. On one process: give it all the batches.
    """

    name: ClassVar[str] = "equal_mix"
    cites: ClassVar[str] = (
        "@article{saerens2002adjusting, title={Adjusting the outputs of a classifier to new a priori probabilities: a simple "
        "procedure}, author={Saerens, Marco and Latinne, Patrice and Decaestecker, Christine}, journal={Neural Computation}, "
        "volume={14}, number={1}, pages={21--41}, year={2002}}"
    )

    passes: int = 6
    settled: float = 0.02
    doubt: float = 0.1
    widest: float = 30.0
    images: float = 8.0
    surer: float = SURER

    def __post_init__(self) -> None:
        if self.passes < 1 or self.passes != int(self.passes):
            raise UsageError(f"passes is how often the batches are read, 1 or more; got {self.passes!r}.")
        if min(self.settled, self.doubt, self.images) < 0:
            raise UsageError(
                f"settled, doubt and images are 0 or more; got {self.settled!r}, {self.doubt!r} and {self.images!r}."
            )
        if not -1 <= self.surer <= 1:
            raise UsageError(f"surer is a relative difference of log odds, -1 to 1; got {self.surer!r}.")
        if not self.widest >= 1:
            raise UsageError(f"widest is a ratio of standard deviations, 1 or more; got {self.widest!r}.")

    def estimate(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        sites: list[Site],
        caller: Caller,
        source: Profile | None = None,
    ) -> Estimate:
        if source is None:
            raise UsageError(
                "the method 'equal_mix' compares the target with a profile of the source; make one with "
                "renorm.profile(model, source_batches) and pass it as source=, or use method='pooled'."
            )
        several_passes(batches, asked="the method 'equal_mix'")
        source.check(model)
        found = self._searched(model, batches, sites, caller, _Search(self, source, sites))
        notes, passes = found.notes(), found.passes
        if found.grew:
            still = self._searched(model, batches, sites, caller, _Search(self, source, sites, still=True))
            evidence = _evidence(model, batches, caller, still, found)
            passes += still.passes + 1
            if evidence <= self.surer:
                notes, found = (*found.uneven(), self._unbelieved(found, evidence)), still
        moments, weights = found.result()
        return Estimate(
            moments=moments,
            target=found.earlier,
            weights=weights,
            samples=found.samples,
            batches=found.batches,
            unvisited=tuple(site.name for site in sites if site.name not in moments),
            passes=passes,
            notes=notes,
        )

    def _searched(
        self, model: nn.Module, batches: Iterable[Any], sites: list[Site], caller: Caller, search: _Search
    ) -> _Search:
        with preserving(model), evaluating(model), visiting(model, search.sites, search.visit):
            search.hold_(search.held)
            while search.passes < self.passes and (search.passes < 2 or search.change >= self.settled):
                search.read(model, batches, caller)
        return search

    def _unbelieved(self, found: _Search, evidence: float) -> str:
        return say(
            "the class mix that was found (up to {share:.0%} of one class) did not settle, and with it the model is hardly "
            "surer ({evidence:+.3f}, {least:g} was asked for) than at the source's own mix, which is kept: the samples "
            "say too little of their class. If classes are missing, check with labels.",
            share=float(found.mix.max()),
            evidence=evidence,
            least=self.surer,
        )


def _evidence(model: nn.Module, batches: Iterable[Any], caller: Caller, still: _Search, found: _Search) -> float:
    """How much surer the model is with `found` than with `still` where they disagree; 1 where they never do."""
    rows: tuple[list[Tensor], list[Tensor]] = [], []
    held = still.result()[0], found.result()[0]
    with preserving(model), evaluating(model):
        for index, batch in nonempty(batches, asked="the method 'equal_mix'"):  # both on one batch: loaders shuffle
            for moments, logits in zip(held, rows, strict=True):
                found.hold_(moments)
                result = caller.run(model, batch, index=index)
                logits.append(class_logits(caller.logits(result, asked="the method 'equal_mix'"), result.samples))
    verdict = trust(torch.cat(rows[0]), torch.cat(rows[1]), source=found.source)
    return verdict.evidence if verdict.disagreement else 1.0


def equal_mix(target: Moments, source_there: Moments, source_home: Moments, *, eps: float, widest: float) -> Moments:
    """The target's moments at the source's own class mix: the shift found at equal mix, applied to the source at home.

    With t, t² the target's mean and variance, (μπ, vπ) the source's at the target's class mix and (μ0, v0) at its own, the
    domains differ per channel by x → a x + b with a² = t²/vπ, so that the mean is `t + a (μ0 − μπ)` and the variance `a² v0`.
    The class offset is scaled by a: unscaled, low contrast and fog come out wrong. `eps` is the layer's, added to both
    variances of the ratio; a stays within 1/widest and widest.

    Shapes: all (C,).
    """
    ratio = (target.var + eps) / (source_there.var + eps)
    scale2 = ratio.clamp(widest**-2, widest**2)
    mean = target.mean + scale2.sqrt() * (source_home.mean - source_there.mean)
    return Moments(target.count, mean, scale2 * source_home.var)


def class_mix(
    probabilities: Tensor,
    prior: Tensor,
    *,
    doubt: float = 0.0,
    rounds: int = 100,
    enough: float = 1e-4,
    belief: Tensor | None = None,
) -> Tensor:
    """The likeliest class mix of samples with these probabilities under a model whose classes are mixed as `prior`.

    Expectation maximisation (Saerens et al. 2002, eq. 2.7), from the prior, until the sum of changes is below `enough`.
    `doubt` adds that many images of the prior's mix per image given: the mode under a Dirichlet prior. `belief` is the power
    to which a class's share may differ from the prior's in every round: 1 as found, 0 not at all.
    Shapes: probabilities (N, K), prior, belief and result (K,), prior and result summing to one.
    """
    prior = prior.clamp_min(1e-3 / len(prior))  # a class that no profiled image had may be here all the same
    mix = start = prior / prior.sum()
    for _ in range(rounds):
        found = responsibilities(probabilities, mix, prior).mean(0)
        if belief is not None:
            found = start * (found / start).pow(belief)
            found = found / found.sum()
        before, mix = mix, (found + doubt * start) / (1 + doubt)
        if float((mix - before).abs().sum()) < enough:
            break
    return mix


def responsibilities(probabilities: Tensor, mix: Tensor, prior: Tensor) -> Tensor:
    """Class probabilities under the mix `mix` of a model trained under `prior` (Bayes). Shapes: (N, K), (K,), (K,) → (N, K)."""
    weighted = probabilities * (mix / prior.clamp_min(1e-3 / len(prior)))
    return weighted / weighted.sum(1, keepdim=True).clamp_min(TINY)


class _Search:
    """The state between batches and passes: moments measured, and the classes presumed to be in them.

    A pass replaces the moments of the pass before it batch by batch, so that every batch meets moments of as many images,
    and the first ones count no more than the last. `still`: the class mix stays the source's. `grew` says whether a later pass
    changed the mix by more than an earlier one.
    """

    def __init__(self, method: EqualMix, source: Profile, sites: list[Site], *, still: bool = False) -> None:
        self.source, self.sites = source, [site for site in sites if site.name in source.held]
        self.held = source.held
        self.passes = self.samples = self.batches = 0
        self.change = float("inf")
        self.grew = False
        self._least = float("inf")
        self.earlier: dict[str, Moments] = {}
        self._method, self._still = method, still
        self._home = source.at(source.prior)
        self.mix = source.prior
        self._seen: dict[str, Moments] = {}
        self._now: dict[str, Moments] = {}
        self._there = self._home
        self._images = self._kept = 0.0
        self._watching = False

    def read(self, model: nn.Module, batches: Iterable[Any], caller: Caller) -> None:
        """One pass over the batches; afterwards `earlier` holds what it measured, and the class mix is found anew."""
        classes, images, count = torch.zeros_like(self.mix), 0, 0
        predicted: list[Tensor] = []
        for index, batch in nonempty(batches, asked="the method 'equal_mix'"):
            samples, presumed = self._presume(model, batch, caller, index)
            self._kept = max(0, self.samples - images - samples) / max(1, self.samples)
            kept = self._kept * self.samples
            self._images = kept + images + samples
            self._there = self.source.at((kept * self.mix + classes + samples * presumed) / self._images)
            probabilities = self._probabilities(model, batch, caller, index)
            self._commit()
            sure = responsibilities(probabilities, self.mix, self.source.prior) if self.passes else probabilities
            classes, images, count = classes + sure.sum(0), images + samples, count + 1
            predicted.append(probabilities.float())
        prior, belief = self.source.prior, self.source.belief
        mix = prior
        if not self._still:
            mix = class_mix(torch.cat(predicted).double(), prior, doubt=self._method.doubt, belief=belief)
        self.change = float((mix - self.mix).abs().sum())
        self.grew = self.grew or self.change > max(GROWTH * self._least, self._method.settled)
        self._least = min(self._least, self.change)
        self.mix, self.earlier, self._seen = mix, self._seen, {}
        self.samples, self.batches, self.passes = images, count, self.passes + 1

    def visit(self, site: Site, x: Tensor) -> None:
        """Measure, and let the site normalise by the blend that follows from all that was measured."""
        if not self._watching or not x.numel():
            return
        name = site.name
        values = measure(x, axis=site.axis).values.to("cpu")
        self._now[name] = total = self._now[name].merge(values) if name in self._now else values
        if name in self._seen:
            total = total.merge(self._seen[name])
        if self._kept and name in self.earlier:
            total = total.merge(_counted(self.earlier[name], self._kept))
        site.normalise_by_(self._blend(site, total, self._there[name], self._images)[0])

    def hold_(self, moments: Mapping[str, Moments]) -> None:
        """Let the model hold these; between forwards its source's, since a fused layer may read them before they are lent."""
        for site in self.sites:
            if site.name in moments:
                site.normalise_by_(moments[site.name])

    def result(self) -> tuple[dict[str, Moments], dict[str, float]]:
        """What every visited site should hold, and the source's share in it."""
        there = self.source.at(self.mix)
        found = {
            site.name: self._blend(site, self.earlier[site.name], there[site.name], self.samples)
            for site in self.sites
            if site.name in self.earlier
        }
        return {n: moments for n, (moments, _) in found.items()}, {n: weight for n, (_, weight) in found.items()}

    def notes(self) -> tuple[str, ...]:
        return (*self.uneven(), *([self._unsettled()] if self.change >= self._method.settled else []))

    def uneven(self) -> tuple[str, ...]:
        """A note on a source in which other class mixes are hardly believed."""
        if not self.source.is_uneven:
            return ()
        return (
            say(
                "the source's classes are mixed so unevenly (evenness {evenness:.2f} of 1) that other shares of them are "
                "hardly believed: where the target's differ much, check with labels.",
                evenness=self.source.evenness,
            ),
        )

    def _unsettled(self) -> str:
        return say(
            "the class mix still changed by {change:.3f} in the last of {passes} passes, {settled:g} was asked for: few "
            "images, or predictions that say little about the class.",
            change=self.change,
            passes=self.passes,
            settled=self._method.settled,
        )

    def _presume(self, model: nn.Module, batch: Any, caller: Caller, index: int) -> tuple[int, Tensor]:
        """How many samples a batch has and which classes: in the first pass half what the source model sees in it."""
        if self.passes or self._still:
            return read(batch).samples, self.mix
        seen = self._probabilities(model, batch, caller, index, watching=False)
        if seen.shape[1] != len(self.mix):
            raise UsageError(
                f"the profile has {len(self.mix)} classes and the model gives logits of {seen.shape[1]}; "
                "make a profile of this model: renorm.profile(model, source_batches)."
            )
        return len(seen), 0.5 * seen.mean(0) + 0.5 * self.source.prior

    def _probabilities(
        self, model: nn.Module, batch: Any, caller: Caller, index: int, *, watching: bool = True
    ) -> Tensor:
        self._watching = watching
        result = caller.run(model, batch, index=index)
        if watching:
            self.hold_(self.held)
        return class_logits(caller.logits(result, asked="the method 'equal_mix'"), result.samples).softmax(1)

    def _commit(self) -> None:
        for name, values in self._now.items():
            self._seen[name] = self._seen[name].merge(values) if name in self._seen else values
        self._now = {}

    def _blend(self, site: Site, target: Moments, there: Moments, images: float) -> tuple[Moments, float]:
        held = self.source.held[site.name]
        home = equal_mix(target, there, self._home[site.name], eps=site.eps, widest=self._method.widest)
        moved = Shift.between(held, home, eps=site.eps).moved
        weight = 1 - moved / (self.source.gap(site.name) + moved) * images / (images + self._method.images)
        return held.blend(home, source_weight=weight, cross_term=False), weight


def _counted(moments: Moments, share: float) -> Moments:
    return Moments(moments.count * share, moments.mean, moments.var)
