"""Layers that stand where a batch norm stood, one per file: `from renorm.layers import Shrink` finds the class in its file."""

from typing import Any

BESIDES = (
    "renorm.layers.batch.BNLayer",
    "renorm.layers.per_domain.WithDomains",
    "renorm.layers.recurrent.gru.BNGRU",
    "renorm.layers.recurrent.lstm.BNLSTM",
)  # offered here, and no member by itself


def __getattr__(name: str) -> Any:
    from importlib import import_module

    from renorm.layers.base import catalogue

    for layer in catalogue().values():
        if layer.__name__ == name:
            return layer
    for module, _, other in (full.rpartition(".") for full in BESIDES):
        if other == name:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
