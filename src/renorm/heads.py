"""A new head for other classes in place of the old one, and the old one back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from renorm.errors import UsageError
from renorm.sites import unwrap, walk
from renorm.split import Split


@dataclass(frozen=True)
class NewHead:
    """What `new_head_` put in place: the names of the new layers, and what stood there."""

    names: tuple[str, ...]
    old: tuple[nn.Module, ...]
    _kept: tuple[tuple[Any, str, Any], ...]

    def restore_(self) -> None:
        """Put the old layers and what the model said of its classes back, the same objects."""
        for owner, key, value in reversed(self._kept):
            if isinstance(owner, nn.Module) and isinstance(value, nn.Module):
                owner._modules[key] = value
            else:
                setattr(owner, key, value)


def new_head_(model: nn.Module, parts: Split, outputs: int, *, names: Sequence[str] | None = None) -> NewHead:
    """Put freshly initialised layers with so many `outputs` where the head's last layers stood; the rest stays.

    What the model says of its classes follows: `num_classes`, transformers' `config.num_labels`, and with `names` the label
    names in `pretrained_cfg`. Weights are drawn from torch's global generator.
    Raises UsageError where no head is found, or its last layer is neither linear nor a convolution.
    """
    inner = unwrap(model)
    modules = dict(walk(inner))
    if not parts.head:
        raise UsageError(
            f"a new head was asked for, and none is found in {type(inner).__name__}; name it with parts=renorm.split(model, "
            'head="…"), or keep the outputs with head="keep".'
        )
    last = [_last(modules, name) for name in parts.head]
    made = [_with_outputs(modules[name], outputs, name) for name in last]
    kept: list[tuple[Any, str, Any]] = []
    for name, layer in zip(last, made, strict=True):
        parent, _, key = name.rpartition(".")
        kept.append((modules[parent], key, modules[name]))
        modules[parent]._modules[key] = layer
    for owner, attribute, value in _told(inner, outputs, names):
        kept.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, value)
    return NewHead(tuple(last), tuple(modules[name] for name in last), tuple(kept))


def outputs_of(model: nn.Module, parts: Split) -> int | None:
    """How many outputs the head's last layer has; None where that cannot be told from it."""
    modules = dict(walk(unwrap(model)))
    if not parts.head:
        return None
    layer = modules[_last(modules, parts.head[0])]
    found = getattr(layer, "out_features", getattr(layer, "out_channels", None))
    return found if isinstance(found, int) else None


def last_layer(model: nn.Module, parts: Split) -> str | None:
    """The name of the one layer that gives the outputs; None where there is no head, or several."""
    return _last(dict(walk(unwrap(model))), parts.head[0]) if len(parts.head) == 1 else None


def _last(modules: dict[str, nn.Module], name: str) -> str:
    """The last layer with weights of its own at or below `name`."""
    below = [n for n in modules if n == name or n.startswith(f"{name}.")]
    return [n for n in below if modules[n]._parameters][-1]


def _with_outputs(layer: nn.Module, outputs: int, name: str) -> nn.Module:
    weight = next(iter(layer._parameters.values()))
    assert weight is not None  # `_last` gave a layer with weights
    like: dict[str, Any] = {"bias": getattr(layer, "bias", None) is not None}
    like |= {"device": weight.device, "dtype": weight.dtype}
    if isinstance(layer, nn.Linear):
        made: nn.Module = nn.Linear(layer.in_features, outputs, **like)
    elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups == 1:
        form: Any = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        made = type(layer)(layer.in_channels, outputs, *form, **like)
    else:
        raise UsageError(
            f"a new head of {outputs} outputs was asked for, but {name!r} is a {type(layer).__name__}; put a linear layer "
            'there yourself and give head="keep".'
        )
    return made.train(layer.training)


def _told(model: nn.Module, outputs: int, names: Sequence[str] | None) -> list[tuple[Any, str, Any]]:
    """Where the model says how many classes it has, and what it is to say from now on."""
    found: list[tuple[Any, str, Any]] = []
    if isinstance(getattr(model, "num_classes", None), int):
        found.append((model, "num_classes", outputs))
    if isinstance(getattr(getattr(model, "config", None), "num_labels", None), int):
        found.append((model.config, "num_labels", outputs))
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict):
        said = {**config, "num_classes": outputs} | ({"label_names": tuple(names)} if names else {})
        if not names:
            said.pop("label_names", None)
        found.append((model, "pretrained_cfg", said))
    return found
