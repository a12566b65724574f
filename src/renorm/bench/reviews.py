"""Reviews of goods: networks for texts trained on two kinds of goods, and what becomes of them on two others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from renorm.bench.signals import through_adapter
from renorm.errors import require
from renorm.finetune import finetune_
from renorm.layers.batch import BatchNorm
from renorm.layers.recurrent.lstm import BNLSTM
from renorm.profile import Profile, profile
from renorm.recalibrate import recalibrate_

__all__ = ["FILE", "NETWORKS", "SOURCES", "TARGETS", "adapted", "known", "reviews", "ways_of"]

FILE = "amazon_reviews4.csv.gz"
SOURCES, TARGETS = ("books", "dvd"), ("electronics", "kitchen")
TRAINED, MEASURED, LABELLED = 1500, 500, 64  # reviews of each kind
WORDS, LONGEST, WIDTH = 3000, 60, 32
NETWORKS = ("cnn", "bilstm", "transformer")
WAYS = ("source", "plain", "auto", "profile", "check")


def ways_of(network: str) -> tuple[str, ...]:
    """What can be done without labels where there is batch norm; with 64 labels, the norm layers alone trained, for all."""
    return (*(WAYS if network != "transformer" else WAYS[:1]), "affine")


class _Reader(nn.Module):
    """Texts of known words to two scores; place 0 is padding, 1 a word that is not known."""

    def __init__(self, numbers: Mapping[str, int], analyse: Any) -> None:
        super().__init__()
        self._numbers, self._analyse = dict(numbers), analyse
        self.embedding: nn.Embedding = nn.Embedding(WORDS + 2, WIDTH, padding_idx=0)

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Numbers of the first words of each text, and which places are words."""
        rows = [[self._numbers.get(word, -1) + 2 for word in self._analyse(text)[:LONGEST]] for text in texts]
        ids = torch.zeros(len(texts), LONGEST, dtype=torch.long)
        for row, found in zip(ids, rows, strict=True):
            row[: len(found)] = torch.tensor(found, dtype=torch.long)
        return {"input_ids": ids, "mask": ids > 0}


class Convolutional(_Reader):
    """Convolution over words, a batch norm that padding does not move, and the largest answer of each channel."""

    def __init__(self, numbers: Mapping[str, int], analyse: Any) -> None:
        super().__init__(numbers, analyse)
        self.convolution: nn.Conv1d = nn.Conv1d(WIDTH, 64, 5, padding=2, bias=False)
        self.norm: BatchNorm = BatchNorm(64)
        self.head: nn.Linear = nn.Linear(64, 2)

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        x = self.convolution(self.embedding(input_ids).transpose(1, 2))
        x = self.norm(x, mask=mask).relu() * mask[:, None]
        logits: Tensor = self.head(F.dropout(x.amax(2), 0.3, self.training))
        return logits


class Recurrent(_Reader):
    """An LSTM from both ends, with batch norm at every step."""

    def __init__(self, numbers: Mapping[str, int], analyse: Any) -> None:
        super().__init__(numbers, analyse)
        self.rnn: BNLSTM = BNLSTM(WIDTH, 32, steps=LONGEST, batch_first=True, bidirectional=True)
        self.head: nn.Linear = nn.Linear(64, 2)

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        output = self.rnn(self.embedding(input_ids), lengths=mask.sum(1))[0]
        logits: Tensor = self.head((output * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        return logits


class Transformer(_Reader):
    """A small BERT of transformers, of random weights: layer norm, no batch norm."""

    def __init__(self, numbers: Mapping[str, int], analyse: Any) -> None:
        super().__init__(numbers, analyse)
        transformers = require("transformers", extra="text", purpose="the transformer of the suite architectures")
        del self.embedding
        config = transformers.BertConfig(
            vocab_size=WORDS + 2,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=2 * WIDTH,
            max_position_embeddings=LONGEST,
        )
        self.bert: nn.Module = transformers.BertForSequenceClassification(config)

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.bert(input_ids=input_ids, attention_mask=mask.long()).logits
        return logits


KINDS: Mapping[str, type[_Reader]] = {"cnn": Convolutional, "bilstm": Recurrent, "transformer": Transformer}
Batches = list[tuple[dict[str, Tensor], Tensor]]


@lru_cache(maxsize=2)
def _table(data: Path) -> Mapping[str, tuple[list[str], Any]]:
    pandas = require("pandas", extra="tables", purpose=f"reading {FILE}")
    rows = pandas.read_csv(data / FILE)
    return {
        name: (part["text"].astype(str).tolist(), part["label"].to_numpy()) for name, part in rows.groupby("domain")
    }


@lru_cache(maxsize=4)
def reviews(data: Path, network: str, seed: int) -> tuple[nn.Module, Batches, dict[str, Batches]]:
    """A network trained on books and films; batches of those, and of the goods that it never saw."""
    text = require("sklearn.feature_extraction.text", extra="text", purpose="the vocabulary of a text network")
    table, rng = _table(data), np.random.default_rng(seed)
    chosen = {
        name: rng.permutation(len(table[name][0]))[: TRAINED if name in SOURCES else MEASURED + LABELLED]
        for name in (*SOURCES, *TARGETS)
    }
    texts = {name: [table[name][0][k] for k in rows] for name, rows in chosen.items()}
    counted = text.CountVectorizer(max_features=WORDS).fit([each for name in SOURCES for each in texts[name]])
    torch.manual_seed(seed)
    model = KINDS[network](counted.vocabulary_, counted.build_analyzer())
    parts = {
        name: (model.tokenize(texts[name]), torch.from_numpy(table[name][1][rows].astype(np.int64)))
        for name, rows in chosen.items()
    }
    source = _joined([parts[name] for name in SOURCES], seed)
    return _fitted(model, source, seed), _batched(*source), {name: _batched(*parts[name]) for name in TARGETS}


@lru_cache(maxsize=1)
def known(data: Path, network: str, seed: int) -> Profile:
    """What the owner of the books and films tells once of a network trained on them."""
    model, source, _ = reviews(data, network, seed)
    return profile(model, source)


def adapted(way: str, model: nn.Module, source: Callable[[], Profile], target: Batches) -> Mapping[str, float]:
    """A copy of `model` after `way`; its accuracy in per cent on the target's reviews; the first 64 may have labels."""
    base, model = model, deepcopy(model)
    more: dict[str, float] = {}
    labelled, rest = target[:1], target[1:]
    unlabelled = [inputs for inputs, _ in rest]
    accepted = True
    if way in ("plain", "auto"):
        recalibrate_(model, unlabelled, prior=0 if way == "plain" else "auto")
    elif way in ("profile", "check"):
        check = unlabelled if way == "check" else None
        accepted = recalibrate_(model, unlabelled, source=source(), check=check).accepted
    elif way == "affine":
        with torch.random.fork_rng(devices=[]):
            finetune_(model, labelled, policy="affine-only", epochs=5, head="keep")
        more = through_adapter(model, base, **unlabelled[0])
    else:
        assert way == "source", way
    model.eval()
    with torch.no_grad():
        right = [(model(**inputs).argmax(1) == labels).double() for inputs, labels in rest]
    return {
        "accuracy": 100 * float(torch.cat(right).mean()),
        "accepted": float(accepted),
        **more,
        "samples": sum(map(len, right)),
    }


def _joined(parts: list[tuple[dict[str, Tensor], Tensor]], seed: int) -> tuple[dict[str, Tensor], Tensor]:
    order = torch.randperm(sum(len(labels) for _, labels in parts), generator=Generator().manual_seed(seed))
    inputs = {name: torch.cat([part[name] for part, _ in parts])[order] for name in parts[0][0]}
    return inputs, torch.cat([labels for _, labels in parts])[order]


def _batched(inputs: dict[str, Tensor], labels: Tensor, size: int = LABELLED) -> Batches:
    rows = torch.split(torch.arange(len(labels)), size)
    return [({name: part[each] for name, part in inputs.items()}, labels[each]) for each in rows]


def _fitted(model: nn.Module, source: tuple[dict[str, Tensor], Tensor], seed: int) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    shuffle = Generator().manual_seed(seed)
    inputs, labels = source
    for _ in range(4):
        for rows in torch.split(torch.randperm(len(labels), generator=shuffle), 64):
            optimizer.zero_grad()
            logits = model(**{name: part[rows] for name, part in inputs.items()})
            torch.autograd.backward(F.cross_entropy(logits, labels[rows]))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model.eval()
