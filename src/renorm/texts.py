"""How texts become a model's input: by the tokenizer that the model brings along, whose every batch is looked at first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from renorm.errors import DataError, ModelError
from renorm.sites import unwrap

__all__ = ["Tokenize", "tokenizer_of"]

Tokenize = Callable[[list[str]], dict[str, Tensor]]

MASKS = ("attention_mask", "mask")
SHOWN = 40  # characters of a text in a message


def tokenizer_of(module: nn.Module, tokenize: Any = None) -> Tokenize | None:
    """What turns texts into the inputs of `module`: `tokenize`, or the module's own method of that name; None without either.

    It takes a list of texts and gives a mapping of tensors by the names of `forward`'s arguments, one row for each text; a
    `mask` or `attention_mask` in it says which places are words. What it gives is checked, batch by batch:

    Raises on a call ModelError for something else than such a mapping, and for numbers of words that the model's embedding
    does not have; DataError for texts in which the tokenizer finds no word.
    """
    made = tokenize if tokenize is not None else getattr(unwrap(module), "tokenize", None)
    if not callable(made):
        return None
    words = _vocabulary(module)

    def checked(texts: list[str]) -> dict[str, Tensor]:
        found = made(texts)
        _refuse_other_forms(found, texts)
        _refuse_wordless(found, texts)
        ids = found.get("input_ids", next(iter(found.values())))
        if (
            words is not None
            and not ids.is_floating_point()
            and ids.numel()
            and not 0 <= int(ids.min()) <= int(ids.max()) < words
        ):
            raise ModelError(
                f"the tokenizer numbers words from {int(ids.min())} to {int(ids.max())}, and the model's embedding has "
                f"{words}, from 0 on: they are of two vocabularies. Give the tokenizer that the weights were trained with."
            )
        return dict(found)

    return checked


def _vocabulary(module: nn.Module) -> int | None:
    """How many words the model's embedding has; None where it is not plain which embedding that is."""
    held = unwrap(module)
    given = getattr(held, "get_input_embeddings", None)
    if callable(given):
        size = getattr(given(), "num_embeddings", None)
        return None if size is None else int(size)
    found = [each for each in held.modules() if isinstance(each, nn.Embedding | nn.EmbeddingBag)]
    return found[0].num_embeddings if len(found) == 1 else None


def _refuse_other_forms(found: Any, texts: list[str]) -> None:
    held = list(found.values()) if isinstance(found, Mapping) else []
    if not held or not all(isinstance(each, Tensor) and each.dim() and len(each) == len(texts) for each in held):
        shapes = [tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__ for each in held]
        raise ModelError(
            f"the model's tokenizer was given {len(texts)} texts and made {type(found).__name__} {shapes or ''} of them; it "
            "should give a mapping of tensors, by the names of forward's arguments, with one row for each text."
        )


def _refuse_wordless(found: Mapping[str, Tensor], texts: list[str]) -> None:
    """Rows of padding alone, which would make of a mean over words a division by zero."""
    mask = next((found[name] for name in MASKS if name in found), None)
    ids = next(iter(found.values()))
    present = ids.new_ones(ids.shape, dtype=torch.bool) if mask is None else mask != 0
    empty = (~present.flatten(1).any(1)).nonzero().flatten() if present.dim() > 1 else present.new_zeros(0)
    if len(empty):
        first = texts[int(empty[0])]
        shown = first if len(first) <= SHOWN else first[:SHOWN] + "…"
        raise DataError(
            f"in {len(empty)} of {len(texts)} texts, {shown!r} first, the model's tokenizer finds no word. Leave these "
            "rows away, or give texts in the language of its vocabulary."
        )
