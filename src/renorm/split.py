"""Features and head: which modules make the last step to the outputs, and in which stages the rest is built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import nn

from renorm.errors import UnknownName, UsageError
from renorm.sites import find_sites, parameters_of, unwrap, walk

STAGES = 4  # fewer than these are taken apart further: a stem and three stages is what the nets of all libraries have


@dataclass(frozen=True)
class Split:
    """The parts of a model by dotted module name, from its input to its output.

    head    the modules that make logits of features; empty where there is none
    stages  the rest, in registration order: of each stage the modules it consists of
    """

    head: tuple[str, ...]
    stages: tuple[tuple[str, ...], ...]

    def stage_of(self, name: str) -> int:
        """The stage in which a parameter or module of this name stands; `len(stages)` is the head.

        What a module holds beside its stages, as a position embedding, counts to the first stage of that module.
        """
        if _within(name, self.head):
            return len(self.stages)
        around = name
        while True:
            for number, stage in enumerate(self.stages):
                if _within(name, stage) or any(_within(part, [around]) for part in stage):
                    return number
            if not around:
                return 0
            around = around.rpartition(".")[0]

    def is_head(self, name: str) -> bool:
        """Whether a parameter or module of this name belongs to the head."""
        return _within(name, self.head)


def split(model: nn.Module, head: Literal["auto"] | str | Sequence[str] = "auto") -> Split:
    """`model` in stages of features and a head, told by names alone: nothing is run and nothing changes.

    head   the head's module names; "auto" asks, in this order: timm's `default_cfg["classifier"]`; transformers' base
           model, beside which all else is head; the usual names (fc, classifier, head, heads, …: of these the last layer
           that has parameters, and likewise for auxiliary heads); the last linear layer

    Stages are the children that hold parameters, in the order they were registered. While there are fewer than four, the
    largest is taken apart, and a list of a transformer's layers always; a norm layer alone, or a weight tied to an earlier
    one, belongs to the stage before it. In a model that runs in another order than it was registered the stages are in the
    wrong order too. Of several outputs (detection) name the heads yourself.
    Raises UnknownName for a head that is no module of the model, UsageError for one without parameters.
    """
    inner = unwrap(model)
    modules = dict(walk(inner))
    names = _find_head(inner, modules) if head == "auto" else [head] if isinstance(head, str) else list(head)
    for name in names:
        if name not in modules:
            raise UnknownName("module for the head", name, [known for known in modules if known])
        if not _size(modules[name]):
            raise UsageError(f"the head was said to be {name!r}, a {type(modules[name]).__name__} without parameters.")
    return Split(tuple(names), _stages(modules, names))


# the last layer of one of these is the head; of two that a model has, the earlier in this list
_NAMES = ("fc", "classifier", "heads", "head", "last_linear", "logits", "output", "predictor", "probs")
_LINEAR = ("Linear", "LazyLinear", "Dense", "NonDynamicallyQuantizableLinear")  # Dense: Keras


def _find_head(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    config = getattr(model, "default_cfg", None) or getattr(model, "pretrained_cfg", None)
    named = config.get("classifier") if isinstance(config, dict) else None
    if named is not None:
        timm = [named] if isinstance(named, str) else list(named)
        return [name for name in timm if name in modules and _size(modules[name])]
    base = getattr(model, "base_model_prefix", None)
    of_transformers = bool(base) and hasattr(model, "config")
    if of_transformers and getattr(model, str(base), None) is not None:
        return [name for name, child in model.named_children() if name != base and _size(child)]
    children = [name for name in modules if name and "." not in name]
    usual = next(
        (_last_layer(name, modules) for name in _NAMES if name in children and _last_layer(name, modules)), None
    )
    if usual is None and of_transformers:  # the base model itself
        return []
    if usual is None:
        linear = [name for name, module in modules.items() if type(module).__name__ in _LINEAR and _size(module)]
        usual = linear[-1] if linear else None
    if usual is None:
        return []
    auxiliary = [_last_layer(name, modules) for name in children if name.lower().startswith("aux")]
    return [usual, *(name for name in auxiliary if name)]


def _last_layer(name: str, modules: dict[str, nn.Module]) -> str | None:
    """The last module at or below `name` that has weights of its own and is no norm layer."""
    norms = {site.module for site in find_sites(modules[name])}
    own = [
        found
        for found in modules
        if _within(found, [name]) and modules[found] not in norms and any(True for _ in _own(modules[found]))
    ]
    return own[-1] if own else None


def _stages(modules: dict[str, nn.Module], head: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    root = modules[""]
    parts = list(_parts("", modules, head)) or ([""] if _size(root) and "" not in head else [])
    while len(_joined(parts, modules, head)) < STAGES:
        for part in sorted(parts, key=lambda name: -_size(modules[name])):
            inner = list(_parts(part, modules, head)) if part else []
            if inner:
                at = parts.index(part)
                parts[at : at + 1] = inner
                break
        else:
            break
    # a number is an element of a list: one layer, whatever lists it is made of
    while stacked := next(
        (n for n in parts if n and not n.rpartition(".")[2].isdigit() and _is_stacked(modules[n])), None
    ):
        at = parts.index(stacked)
        parts[at : at + 1] = _parts(stacked, modules, head)
    return tuple(tuple(stage) for stage in _joined(parts, modules, head))


def _is_stacked(module: nn.Module) -> bool:
    """Whether this is, or holds as a child, a list of transformer layers: of modules within which there is a layer norm."""
    norms = {site.module for site in find_sites(module) if site.kind in ("layer", "rms")}
    for stack in (module, *module.children()):
        layers = [c for c in stack.children() if c not in norms and not norms.isdisjoint(c.modules())]
        if isinstance(stack, nn.ModuleList) and len(layers) > 1:
            return True
    return False


def _parts(name: str, modules: dict[str, nn.Module], head: Sequence[str]) -> Iterator[str]:
    """The children of a module that hold parameters outside the head."""
    depth = name.count(".") + 1 if name else 0
    norms = {site.module for site in find_sites(modules[name])}
    if modules[name] in norms:
        return
    for found, module in modules.items():
        child = found and found.count(".") == depth and (not name or _within(found, [name]))
        if child and not _within(found, head) and _outside(found, module, head):
            yield found


def _outside(name: str, module: nn.Module, head: Sequence[str]) -> bool:
    """Whether a module holds parameters that are not the head's."""
    return any(not _within(f"{name}.{inner}", head) for inner in parameters_of(module))


def _joined(parts: Sequence[str], modules: dict[str, nn.Module], head: Sequence[str]) -> list[list[str]]:
    """The parts as stages: a part of nothing but norm layers, head and weights of before goes with the one before it."""
    stages: list[list[str]] = []
    known: set[int] = set()
    for part in parts:
        module = modules[part]
        beside = known | {id(p) for site in find_sites(module) for p in site.affine.values()}
        held = parameters_of(module)
        if stages and all(id(p) in beside or _within(f"{part}.{name}", head) for name, p in held.items()):
            stages[-1].append(part)
        else:
            stages.append([part])
        known |= {id(p) for p in held.values()}
    return stages


def _within(name: str, parts: Sequence[str]) -> bool:
    return any(name == part or not part or name.startswith(f"{part}.") for part in parts)


def _size(module: nn.Module) -> int:
    lazy = nn.UninitializedParameter
    return sum(1 if isinstance(p, lazy) else p.numel() for p in module.parameters())


def _own(module: nn.Module) -> Iterator[Any]:
    # Keras holds a layer's parameters in a module of their own
    held = cast(Any, module)._parameters or getattr(module, "_torch_params", {})
    return (p for p in held.values() if p is not None)
