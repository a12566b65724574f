"""What may move while a model is fine-tuned: statistics, affine, head, the rest. Presets by name, and a table of what is so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from torch import nn

from renorm.errors import NoBatchNorm, UnknownName, UsageError
from renorm.freeze import Freeze, held_by, hold_, holds_statistics
from renorm.sites import Site, find_sites, parameters_of, unwrap
from renorm.split import Split, split

Part = Literal["affine", "head", "rest"]
PARTS: tuple[Part, ...] = ("affine", "head", "rest")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """One rule for what moves in training.

    statistics  "moving": by each training batch, which also normalises; "source": held as they are; "target": held
                likewise, after `recalibrate_` gave them the target's (a policy sees no data, so the caller does that)
    trains      the parts that get gradients: "affine" (of every norm layer outside the head), "head", "rest"
    last        only the last norm layer with statistics moves and trains; all the others are held
    solves      `finetune_` takes no step: it holds the blend of source and target statistics that suits the labels best, and
                solves a new head on the features (a logistic regression)
    suits       when to take it, in a line
    """

    name: str
    statistics: Literal["moving", "source", "target"]
    trains: frozenset[Part]
    last: bool = False
    solves: bool = False
    suits: str = ""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.trains) - set(PARTS))
        if unknown:
            raise UnknownName("part of a model", unknown[0], PARTS)
        if self.statistics not in ("moving", "source", "target"):
            raise UnknownName("way of statistics", self.statistics, ("moving", "source", "target"))


def _preset(
    name: str, statistics: Literal["moving", "source", "target"], *trains: Part, last: bool = False, suits: str
) -> Policy:
    return Policy(name=name, statistics=statistics, trains=frozenset(trains), last=last, suits=suits)


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        policy.name: policy
        for policy in (
            _preset("all", "moving", *PARTS, suits="much data and large batches; what a plain script in train() does"),
            _preset(
                "frozen", "source", "head", "rest", suits="detection and small batches: the norm layers are constants"
            ),
            _preset("frozen-statistics", "source", *PARTS, suits="small batches, a target near the source"),
            _preset("recalibrate-then-freeze", "target", *PARTS, suits="small batches, a target far from the source"),
            _preset(
                "statistics-only", "moving", suits="unlabelled data in a training loop; `recalibrate_` needs no loop"
            ),
            _preset("affine-only", "moving", "affine", suits="the same classes under another sensor; tiny to store"),
            _preset(
                "affine-and-head",
                "moving",
                "affine",
                "head",
                suits="other classes, few parameters: what an adapter keeps",
            ),
            _preset(
                "last-only",
                "moving",
                "affine",
                "head",
                last=True,
                suits="another resolution (FixRes, Touvron et al. 2019)",
            ),
            _preset(
                "head-only", "source", "head", suits="few labels, a target near the source: a head on fixed features"
            ),
            Policy(
                name="few-labels",
                statistics="target",
                trains=frozenset({"head"}),
                solves=True,
                suits="one to ten labels per class: no step is taken, the head is solved",
            ),
        )
    }
)


def apply_policy_(
    model: nn.Module, policy: str | Policy, *, head: Literal["auto"] | str | Sequence[str] = "auto"
) -> Freeze:
    """Let only what `policy` names move in `model`, until the handle's `restore_()` or `unfreeze_(model)`.

    A policy takes away and never gives: a parameter that asks for no gradient before (a fixed position embedding) asks for
    none after. A norm layer inside the head belongs to the head. `head` is as in `split`.
    Raises UnknownName for a name that is no preset; UsageError where another policy stands, or nothing would train of what
    the policy trains; NoBatchNorm where it lives from statistics and there are none.
    """
    chosen = preset(policy)
    standing = held_by(model, _LABEL)
    if standing is not None:
        raise UsageError(
            f"policy {chosen.name!r} was asked for, but another one still stands at {standing!r}; "
            "restore that one first, or let go of all with unfreeze_(model)."
        )
    parts = split(model, head)
    sites = find_sites(model)
    outside = [site for site in sites if not parts.is_head(site.name.partition("@")[0])]
    statistical = [site for site in outside if site.tensors is not None]
    if not statistical and (chosen.last or not chosen.trains):
        raise NoBatchNorm(
            f"policy {chosen.name!r} moves the statistics of norm layers; {type(unwrap(model)).__name__} has none that "
            "hold any."
        )
    free = [statistical[-1]] if chosen.last else statistical
    moving = {site.module for site in free} if chosen.statistics == "moving" else set()
    affine = {id(p) for site in outside for p in site.affine.values()}
    last = {id(p) for p in free[-1].affine.values()} if chosen.last else affine

    def trains(name: str, parameter: nn.Parameter) -> bool:
        if parts.is_head(name):
            return "head" in chosen.trains
        if id(parameter) in affine:
            return "affine" in chosen.trains and id(parameter) in last
        return "rest" in chosen.trains

    parameters = parameters_of(model)
    stopped = {id(p) for name, p in parameters.items() if not trains(name, p)}
    if chosen.trains and not any(p.requires_grad for p in parameters.values() if id(p) not in stopped):
        _refuse_nothing(chosen, parts, [p for p in parameters.values() if id(p) not in stopped])
    return hold_(_LABEL, model, [site for site in statistical if site.module not in moving], stopped)


_LABEL = "apply_policy_"


def policies() -> Mapping[str, Policy]:
    """The presets by name; `policies()["frozen"].suits` says when to take that one."""
    return POLICIES


def preset(policy: str | Policy) -> Policy:
    """The policy of that name, or the policy itself. Raises UnknownName, with the nearest."""
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        raise UnknownName("policy", policy, POLICIES)
    return POLICIES[policy]


def presets_table() -> str:
    """The presets as a Markdown table."""
    lines = ["| policy | statistics | affine | head | the rest | suits |", "|---|---|---|---|---|---|"]
    for policy in POLICIES.values():
        cells = ["trained" if part in policy.trains else "fixed" for part in PARTS]
        statistics: str = {"moving": "moving", "source": "fixed", "target": "fixed, the target's"}[policy.statistics]
        if policy.solves:
            statistics, cells[1] = "fixed, a blend by the labels", "solved"
        if policy.last:
            statistics, cells[0] = "moving in the last, else fixed", "trained in the last, else fixed"
        lines.append(f"| `{policy.name}` | {statistics} | {' | '.join(cells)} | {policy.suits} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Row:
    """One thing in a model that could move: `part` is "statistics", "affine", "head" or "rest"; `why` says what decides."""

    name: str
    part: Literal["statistics", "affine", "head", "rest"]
    moves: bool
    why: str


class PolicyTable(tuple[Row, ...]):
    """What moves in a model when it is next trained: a row for the statistics of each site and one for each parameter."""

    __slots__ = ()

    def __str__(self) -> str:
        width = max((len(row.name) for row in self), default=0)
        return "\n".join(
            f"{row.name or '(itself)':<{width}}  {row.part:<10}  {'moves' if row.moves else 'fixed':<5}  {row.why}".rstrip()
            for row in self
        )

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """{part: how many of its rows move, and how many there are}."""
        parts = dict.fromkeys(row.part for row in self)
        return {
            part: (sum(r.moves for r in self if r.part == part), sum(r.part == part for r in self)) for part in parts
        }


def policy_table(model: nn.Module, *, head: Literal["auto"] | str | Sequence[str] = "auto") -> PolicyTable:
    """Per site and parameter, what moves once `train()` is called and an optimiser holds what asks for a gradient.

    Statistics come first at each site, then its parameters; what is not in a norm layer follows in registration order.
    Nothing is run or changed. `F.batch_norm` calls are no sites, and not listed.
    """
    parts = split(model, head)
    rows: list[Row] = []
    listed: set[int] = set()
    for site in find_sites(model):
        if site.kind == "batch" or site.tensors is not None:
            rows.append(Row(site.name, "statistics", *_statistics(site)))
        for key, parameter in site.affine.items():
            if id(parameter) not in listed:
                listed.add(id(parameter))
                own = site.name.partition("@")[0]
                part: Literal["head", "affine"] = "head" if parts.is_head(own) else "affine"
                rows.append(_row(f"{own}.{key}" if own else key, part, parameter))
    statistics = {id(t) for site in find_sites(model) for t in site.tensors or ()}  # Keras keeps these as parameters
    for name, parameter in parameters_of(model).items():
        if id(parameter) not in listed | statistics:
            rows.append(_row(name, "head" if parts.is_head(name) else "rest", parameter))
    return PolicyTable(rows)


def _row(name: str, part: Literal["affine", "head", "rest"], parameter: nn.Parameter) -> Row:
    return Row(name, part, parameter.requires_grad, "" if parameter.requires_grad else "requires_grad is False")


def _statistics(site: Site) -> tuple[bool, str]:
    if site.tensors is None:
        return False, "holds none: each batch normalises by its own, in evaluation too"
    if holds_statistics(site.module):
        return False, "frozen: train() does not reach it"
    if not site.tracks:
        momentum = hasattr(site.module, "momentum") and site.momentum == 0
        return (
            False,
            "momentum is 0, yet in training the batch normalises" if momentum else "the layer never moves them",
        )
    asks = any(p.requires_grad for p in site.affine.values())
    return True, "" if asks else "train() moves them, though its affine is fixed"


def _refuse_nothing(policy: Policy, parts: Split, wanted: Sequence[nn.Parameter]) -> None:
    what = " and ".join(part for part in PARTS if part in policy.trains)
    if wanted:
        why = f"none of its {len(wanted)} parameters there asks for a gradient; call requires_grad_(True) on them first"
    elif not parts.head and "head" in policy.trains:
        why = "no head was found; name it with head="
    else:
        why = "there are no such parameters (frozen copies of batch norm hold theirs as buffers)"
    raise UsageError(f"policy {policy.name!r} trains {what}, but {why}.")
