"""Optimiser groups that fit what may move: no decay on norm layers, rates by depth, the head apart; made, and mended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from renorm.errors import UsageError
from renorm.sites import find_sites, parameters_of, unwrap
from renorm.split import split


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    head_lr: float | None = None,
    depth_decay: float = 1.0,
    norm_lr: float | None = None,
    head: Literal["auto"] | str | Sequence[str] = "auto",
) -> list[dict[str, Any]]:
    """Groups for a torch optimiser that hold every parameter of `model` which asks for a gradient once, and no other.

    lr            of the last stage of features; the one `depth` stages before it has lr · depth_decay ** depth
    head_lr       of the head; None: lr
    norm_lr       of norm layers outside the head, before the decay with depth; None: lr
    weight_decay  of weights. Norm layers, biases and what the model names in `no_weight_decay()` (timm) have none

    Each group has a telling "name". Under a policy, call this after `apply_policy_`; after gradual unfreezing, again.
    Raises UsageError where nothing asks for a gradient, or a number makes no sense.
    """
    for what, value in {"lr": lr, "head_lr": head_lr, "norm_lr": norm_lr, "weight_decay": weight_decay}.items():
        if value is not None and not value >= 0:
            raise UsageError(f"{what} is a number of at least 0; got {value!r}.")
    if not 0 < depth_decay <= 1:
        raise UsageError(f"depth_decay is the factor from one stage to the one before, in (0, 1]; got {depth_decay!r}.")
    parts = split(model, head)
    norms = {id(p) for site in find_sites(model) for p in site.affine.values()}
    exempt = set(getattr(unwrap(model), "no_weight_decay", set)())
    groups: dict[tuple[int, str, bool], list[Tensor]] = {}
    for name, parameter in parameters_of(model).items():
        if parameter.requires_grad:
            stage, norm = parts.stage_of(name), id(parameter) in norms
            kind = "norm" if norm and not parts.is_head(name) else "weights"
            decays = not (norm or parameter.dim() <= 1 or name in exempt or name.rpartition(".")[2] in exempt)
            groups.setdefault((stage, kind, decays), []).append(parameter)
    if not groups:
        raise UsageError(
            "parameter_groups was asked for what trains, and no parameter of the model asks for a gradient."
        )
    last = len(parts.stages)
    found = []
    for (stage, kind, decays), parameters in sorted(
        groups.items(), key=lambda item: (item[0][0], item[0][1], -item[0][2])
    ):
        base = norm_lr if kind == "norm" and norm_lr is not None else lr
        rate = base * depth_decay ** (last - 1 - stage)
        if stage == last:
            rate = lr if head_lr is None else head_lr
        where = "head" if stage == last else f"stage {stage}"
        found.append(
            {
                "name": f"{where}, {kind if decays or kind == 'norm' else 'no decay'}",
                "params": parameters,
                "lr": rate,
                "weight_decay": weight_decay if decays else 0.0,
            }
        )
    return found


def check_groups(model: nn.Module, groups: Optimizer | Iterable[dict[str, Any]]) -> None:
    """Raise UsageError, with names, where a parameter that asks for a gradient is in no group, or one that does not is in one.

    The first never trains. The second moves all the same under momentum or weight decay, if it holds a gradient of before.
    """
    held = groups.param_groups if isinstance(groups, Optimizer) else groups
    inside = {id(p) for group in held for p in group["params"]}
    named = list(parameters_of(model).items())
    missing = [name for name, p in named if p.requires_grad and id(p) not in inside]
    fixed = [name for name, p in named if not p.requires_grad and id(p) in inside]
    if missing or fixed:
        said = [
            f"{len(names)} {what}, {names[0]!r} first"
            for names, what in ((missing, "that ask for a gradient are in no group"), (fixed, "that do not are in one"))
            if names
        ]
        raise UsageError(
            f"the optimiser does not fit the model: of its parameters {'; '.join(said)}. "
            "Make it anew, from parameter_groups(model, …)."
        )


@dataclass(frozen=True)
class Regrouped:
    """Groups that were changed. `restore_()` gives them the parameters and the decay they had; rates stay as they are."""

    held: tuple[tuple[Optimizer, tuple[tuple[dict[str, Any], dict[str, Any]], ...]], ...]

    @classmethod
    def before(cls, optimizers: Iterable[Optimizer]) -> Regrouped:
        """What the groups of `optimizers` hold now."""
        kept = ("params", "param_names", "weight_decay")

        def copied(group: dict[str, Any]) -> dict[str, Any]:
            return {k: list(group[k]) if k != "weight_decay" else group[k] for k in kept if k in group}

        return cls(tuple((o, tuple((group, copied(group)) for group in o.param_groups)) for o in optimizers))

    def restore_(self) -> None:
        """Let every group hold what it held; what was learnt of a parameter that is in none any more is forgotten."""
        for optimizer, groups in self.held:
            optimizer.param_groups[:] = [group for group, _ in groups]
            for group, had in groups:
                group.update({key: list(value) if isinstance(value, list) else value for key, value in had.items()})
            inside = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for known in [p for p in optimizer.state if isinstance(p, Tensor) and id(p) not in inside]:
                del optimizer.state[known]


def scheduled(groups: Iterable[dict[str, Any]]) -> bool:
    """Whether a scheduler counts these groups already, and would not know of one that is added."""
    return any("initial_lr" in group for group in groups)


def spare_(optimizers: Sequence[Optimizer], parameters: Iterable[Tensor]) -> Regrouped:
    """Take `parameters` out of every group with weight decay, into one beside it that has none and is the same otherwise.

    What the optimiser has learnt of them (momentum) stays. Schedulers made before would not know the new groups.
    """
    chosen = {id(p) for p in parameters}
    undo = Regrouped.before(optimizers)
    for optimizer in optimizers:
        for group in [g for g in optimizer.param_groups if g.get("weight_decay")]:
            out = [index for index, p in enumerate(group["params"]) if id(p) in chosen]
            stay = [index for index, p in enumerate(group["params"]) if id(p) not in chosen]
            if not stay:
                group["weight_decay"] = 0.0
            elif out:
                twin = group | {"weight_decay": 0.0} | _picked(group, out)
                if "name" in group:
                    twin["name"] = f"{group['name']}, no decay"
                group.update(_picked(group, stay))
                optimizer.param_groups.append(twin)
    return undo


def enrol_(optimizers: Sequence[Optimizer], parameters: Iterable[Tensor]) -> Regrouped:
    """Add those of `parameters` that are in no group to the first of `optimizers`, like its largest, without weight decay."""
    undo = Regrouped.before(optimizers)
    inside = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [p for p in parameters if id(p) not in inside]
    first = optimizers[0]
    largest = max(first.param_groups, key=lambda group: sum(p.numel() for p in group["params"]))
    options = {key: value for key, value in largest.items() if key not in ("params", "param_names", "name")}
    if "weight_decay" in options:
        options["weight_decay"] = 0.0
    named = {"param_names": [f"norm.{i}" for i in range(len(missing))]} if "param_names" in largest else {}
    first.param_groups.append({"params": missing, **options, **named})
    return undo


def _picked(group: dict[str, Any], places: Sequence[int]) -> dict[str, list[Any]]:
    return {key: [group[key][i] for i in places] for key in ("params", "param_names") if key in group}
