"""Fine-tuning as others do it: a script as people write it, and Lightning's own recipe for transfer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from renorm.bench.beds import Labelled
from renorm.errors import require
from renorm.heads import new_head_
from renorm.sites import find_sites
from renorm.split import split

__all__ = ["backbone_finetuning", "plain"]

RATE = 1e-3  # Adam's default, as scripts leave it


def plain(model: nn.Module, train: Labelled, *, classes: int, epochs: int, batch: int, seed: int, still: bool) -> None:
    """A script as people write it: a new head, Adam, train(); with `still` its batch norms in eval."""
    torch.manual_seed(seed)
    new_head_(model, split(model), classes)
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    for _ in range(epochs):
        model.train()
        for site in find_sites(model) if still else ():
            site.module.eval()
        for rows in torch.split(torch.randperm(len(train.labels)), batch):
            if len(rows) > 1:
                optimiser.zero_grad()
                loss = F.cross_entropy(model(train.inputs[rows]), train.labels[rows])
                torch.autograd.backward(loss)
                optimiser.step()
    model.eval()


def backbone_finetuning(model: nn.Module, train: Labelled, *, classes: int, epochs: int, batch: int, seed: int) -> None:
    """Lightning's `BackboneFinetuning`: the head first, from a third of the epochs on the backbone at rising rates.

    Its own defaults otherwise: batch norms train while the backbone is frozen, the rate doubles each epoch from a tenth.

    Raises:
        MissingExtra: lightning is not installed.
    """
    lightning = require("lightning.pytorch", extra="test", purpose="comparing with Lightning")
    callbacks = require("lightning.pytorch.callbacks", extra="test", purpose="comparing with Lightning")
    torch.manual_seed(seed)
    new_head_(model, split(model), classes)
    place, device = split(model).head[0], train.inputs.device

    class Tuned(lightning.LightningModule):  # type: ignore[misc, name-defined]
        """The model taken apart as the callback wants it: `backbone`, with nothing where the head stood, and `head`."""

        def __init__(self) -> None:
            super().__init__()
            self.head = model.get_submodule(place)
            model.set_submodule(place, nn.Identity())
            self.backbone = model

        def training_step(self, given: list[Tensor], _: int) -> Tensor:
            inputs, labels = given
            return F.cross_entropy(self.head(self.backbone(inputs)), labels)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.head.parameters(), lr=RATE)

    tuned = Tuned()
    loader = DataLoader(TensorDataset(*train), batch_size=batch, shuffle=True, drop_last=len(train.labels) % batch == 1)
    with _quiet():
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu" if device.type == "cpu" else "gpu",
            devices=1,
            callbacks=[callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=max(1, epochs // 3))],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(tuned, loader)
    model.set_submodule(place, tuned.head)
    model.to(device).eval()  # the trainer brings it back to the processor


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's advice on workers and hardware."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
