"""What is wrong with a model's norm layers, and on this data: gather facts, run the rules."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import starmap
from math import inf
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from renorm.accuracy import Accuracy
from renorm.calls import Caller, Forward, Output
from renorm.checkpoints import read_weights
from renorm.columns import Columns
from renorm.costs import price
from renorm.errors import UsageError
from renorm.faces import Faces
from renorm.facts import Facts
from renorm.kind import Kind
from renorm.loop import optimizers_in
from renorm.mend import Undoable
from renorm.provenance import plain_names
from renorm.rules.base import Finding, Rule, catalogue, worst_first
from renorm.said import listed, say
from renorm.shift import Shift
from renorm.sites import Site
from renorm.stored import Contents, contents_of, read_contents, skeleton

if TYPE_CHECKING:
    from renorm.profile import Profile

__all__ = ["Diagnosis", "Mending", "diagnose", "diagnose_file", "mend_"]


File = str | os.PathLike[str] | Mapping[str, Tensor]  # a checkpoint, or its tensors by name


@dataclass(frozen=True, repr=False)
class Diagnosis(Faces):
    """What the rules found; without data, what the model alone shows.

    findings   worst first; empty where nothing is wrong
    shifts     per site, how far the data lie from the statistics it holds
    distances  per site, `shifts` in one number: source sd, sampling error taken off; worst first; without sites whose
               statistics were never estimated
    unvisited  batch norm sites that no batch reached
    sites      every norm layer of the model, of any kind
    samples    how many samples were looked at; 0 without data
    kind       what kind of shift it is and how sure that is; None without data, with inputs that are plainly wrong, or where
               nothing can be told
    estimate   the share of right answers, estimated without labels, with an interval; None without data, with columns that
               are plainly wrong, or where nothing can be told
    notes      what else should be known, as how a file was read
    skipped    the rules that were not asked, for they take more `passes` than were allowed
    """

    findings: tuple[Finding, ...]
    shifts: Mapping[str, Shift]
    distances: Mapping[str, float]
    unvisited: tuple[str, ...]
    sites: tuple[Site, ...]
    samples: int
    kind: Kind | None = None
    estimate: Accuracy | None = None
    notes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    @property
    def worst(self) -> Finding | None:
        """The worst finding, or None."""
        return self.findings[0] if self.findings else None

    @property
    def healthy(self) -> bool:
        """Whether there is neither an error nor a warning."""
        return all(finding.severity == "info" for finding in self.findings)

    def __str__(self) -> str:
        if not self.findings:
            return "nothing wrong was found"
        return "\n".join(map(str, self.findings))

    __repr__ = __str__


def diagnose(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    source: Profile | None = None,
    *,
    checkpoint: File | None = None,
    columns: Columns | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    domains: Sequence[Hashable] | None = None,
    ranks: Sequence[File] | Literal["group"] | None = None,
    folded: nn.Module | None = None,
    passes: float | None = None,
    forward: Forward | None = None,
    output: Output | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
) -> Diagnosis:
    """Everything the doctor's rules find wrong, worst first; the model is the same afterwards, bit for bit.

    `checkpoint` is the file that the model was loaded from, or its tensors by name, for the rules that compare the two;
    `optimizer` the one that is to train it, or several, for the rules about its groups (`watch` sees the loop itself);
    `columns` are those of the table it was trained on, which a file written by renorm tells by itself.
    `ranks` are the checkpoints that other ranks of the same run saved; or "group", asked on every rank of a running one.
    `folded` is what a tool made of the model by folding its batch norms away: does it answer the same?
    `domains` names the domain (camera, hospital) of each sample, in the order of the batches, for the rule on mixtures.
    Without `batches` only the rules that need none run. A model without batch norm is healthy. The cheapest rules run
    first. One pass over the batches serves most; second looks run the first of them again, and a shift that may come of
    wrong preprocessing is looked into with up to 32 runs more. `passes` is the most that may be spent, in passes over the
    batches; the rules that would take more are told in `skipped`.
    A batch that the model cannot run is left out and told in `notes`; where it can run none, the first failure is raised.
    A scripted or traced part is looked at as far as its tensors tell, and a model that is scripted itself by its weights
    alone; `notes` say so. Raises BatchError for batches that cannot be used, CheckpointError for a file that cannot be read,
    UsageError for `passes` below 0.
    """
    caller = Caller(forward=forward, output=output, device=device, autocast=autocast, channels_last=channels_last)
    if passes is not None and not passes >= 0:
        raise UsageError(f"passes is the most passes over the batches that may be spent, 0 or more; got {passes!r}.")
    if isinstance(model, torch.jit.ScriptModule):
        return _outside(model, ranks)
    most = inf if passes is None else passes
    state, recorded = _weights(checkpoint)
    facts = Facts(
        *(model, batches, source, caller, state, optimizers_in(optimizer)),
        columns=columns or recorded,
        domains=domains,
        others=_others(ranks),
        folded=folded,
        passes=most,
    )
    return _judged(facts)


def diagnose_file(path: str | os.PathLike[str], *, ranks: Sequence[File] | None = None) -> Diagnosis:
    """What the rules on state find in a checkpoint, an ONNX model or a `.pt2` program alone, without the model's code.

    `ranks` are the files that other ranks of the same run saved. Nothing in a file is run or unpickled. No finding has a fix:
    there is no model to mend.
    Raises UsageError for another suffix, CheckpointError for a file that cannot be read, MissingExtra for ONNX without onnx.
    """
    return _without_code(read_contents(path), ranks)


def _outside(model: torch.jit.ScriptModule, ranks: Sequence[File] | Literal["group"] | None) -> Diagnosis:
    found = _without_code(contents_of(model.state_dict()), None if ranks == "group" else ranks)
    why = say(
        "the model itself is scripted or traced: nothing can be watched inside, and its weights alone were looked at"
    )
    return replace(found, notes=(why, *found.notes))


def _without_code(contents: Contents, ranks: Sequence[File] | None) -> Diagnosis:
    graph = contents.norms if contents.graph else None
    file = None if contents.graph else contents.state
    found = _judged(
        Facts(skeleton(contents.norms), file=file, graph=graph, settings=contents.graph, others=_others(ranks))
    )
    return replace(found, findings=tuple(replace(f, fix_=None) for f in found.findings), notes=contents.notes)


def _judged(facts: Facts) -> Diagnosis:
    findings: list[Finding] = []
    skipped: list[str] = []
    # the cheapest first, whatever a rule would like to know besides; the estimates stand among them by what they cost
    rules = sorted(catalogue().values(), key=lambda rule: price((*rule.needs, *rule.wants)))
    dear = [rule for rule in rules if price((*rule.needs, *rule.wants)) > price(["look"])]
    for rule in [rule for rule in rules if rule not in dear]:
        _ask(rule, facts, findings, skipped)
    looks = facts.can("look")
    # what wrong columns look like says nothing
    wrong = facts.can("mistakes") and any(mistake.sure for mistake in facts.mistakes)
    found, estimated = (facts.kind, facts.accuracy) if looks and not wrong else (None, None)
    for rule in dear:
        _ask(rule, facts, findings, skipped)
    if facts.can("suspect") and facts.suspect is not None:
        found = None  # it is neither of the shifts that statistics or labels could mend
    left = [*skipped, *([] if looks or facts.batches is None else [ESTIMATE])]
    seen = facts.can("observed")
    return Diagnosis(
        findings=worst_first(findings),
        shifts=facts.shifts if seen else {},
        distances=dict(sorted(facts.distances.items(), key=lambda item: -item[1])) if seen else {},
        unvisited=tuple(n for n in facts.observed.unvisited if n in {site.name for site in facts.batch})
        if seen
        else (),
        sites=facts.sites,
        samples=facts.observed.samples if seen else 0,
        notes=(
            *_scripted(facts.model),
            *_over(left, facts.passes),
            *starmap(_left_out, facts.failed.items() if seen else ()),
        ),
        skipped=tuple(skipped),
        kind=found,
        estimate=estimated,
    )


ESTIMATE = say("the estimate of accuracy")


def _ask(rule: type[Rule], facts: Facts, findings: list[Finding], skipped: list[str]) -> None:
    if not all(map(facts.has, rule.needs)):
        return
    if facts.affords(*rule.needs):
        findings += rule().check(facts)
    else:
        skipped.append(rule.id)


def _over(left: list[str], passes: float) -> tuple[str, ...]:
    if not left:
        return ()
    return (
        say(
            "not asked, for that takes more than {passes:g} passes over the data: {what}",
            passes=passes,
            what=listed(left),
        ),
    )


def _left_out(index: int, error: Exception) -> str:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return say("batch {index} was left out, for the model could not run it: {reason}", index=index, reason=reason)


def _scripted(model: nn.Module) -> tuple[str, ...]:
    names = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    outer = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    if not outer:
        return ()
    what = listed(outer)
    return (say("scripted or traced, so that nothing can be watched inside: {what}", what=what),)


@dataclass(frozen=True)
class Mending:
    """What `mend_` did: the findings that have a fix, all applied; `restore_()` undoes them, the last first."""

    mended: tuple[Finding, ...]
    undos: tuple[Undoable, ...]

    def restore_(self) -> None:
        """Give the model back as it was, bit for bit. Raises OpenChange where a later change still stands."""
        for undo in reversed(self.undos):
            undo.restore_()


def mend_(model: nn.Module, findings: Iterable[Finding]) -> Mending:
    """Apply the fix of every finding that has one, worst first, each once; when one fails, all are undone and it raises."""
    mended = tuple(finding for finding in findings if finding.fix_ is not None)
    fixes = {id(finding.fix_): finding.fix_ for finding in mended if finding.fix_ is not None}
    undos: list[Undoable] = []
    try:
        for fix_ in fixes.values():
            undos.append(fix_(model))
    except BaseException:
        Mending(mended, tuple(undos)).restore_()
        raise
    return Mending(mended, tuple(undos))


def _others(ranks: Sequence[File] | Literal["group"] | None) -> list[dict[str, Tensor]] | Literal["group"] | None:
    if ranks is None or ranks == "group":
        return ranks
    if isinstance(ranks, str):
        raise UsageError(f'ranks is a list of checkpoints, or "group"; got {ranks!r}.')
    return [tensors for file in ranks if (tensors := _weights(file)[0]) is not None]


def _weights(checkpoint: File | None) -> tuple[dict[str, Tensor] | None, Columns | None]:
    """The tensors of a checkpoint by plain name, and the columns of the table that it was trained on."""
    if checkpoint is None:
        return None, None
    if isinstance(checkpoint, Mapping):
        return {plain: checkpoint[name] for plain, name in plain_names(checkpoint).items()}, None
    found = read_weights(checkpoint)
    return found.state, Columns.recorded(found.provenance)
