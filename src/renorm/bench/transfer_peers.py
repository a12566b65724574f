"""Fine-tuning as others do it: a script as people write it, and Lightning's own recipe for transfer."""

from __future__ import annotations

import logging
import random
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

__all__ = ["backbone_finetuning", "fine_tune", "plain"]

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


def fine_tune(model: nn.Module, train: Labelled, *, classes: int, epochs: int, batch: int, seed: int) -> None:
    """fastai's `fine_tune`: one epoch for the head, then all layers at rates that differ by depth, each by one cycle.

    Its own defaults otherwise; what it would validate on is one batch of the training data, and decides nothing.

    Raises:
        MissingExtra: fastai is not installed.
    """
    with _quiet():
        learner = require("fastai.learner", extra="fastai", purpose="comparing with fastai")
        loaders = require("fastai.data.all", extra="fastai", purpose="comparing with fastai")
        require("fastai.callback.schedule", extra="fastai", purpose="comparing with fastai")  # gives learners fine_tune
    torch.manual_seed(seed)
    random.seed(seed)  # by which its loaders shuffle
    names = new_head_(model, split(model), classes).names
    head = {id(p) for name in names for p in model.get_submodule(name).parameters()}

    def groups(net: nn.Module) -> list[list[nn.Parameter]]:
        return [[p for p in net.parameters() if (id(p) in head) is last] for last in (False, True)]

    data, device = TensorDataset(*train), train.inputs.device
    # no worker processes: the tensors lie in memory, on a GPU perhaps
    fed = loaders.DataLoader(data, bs=batch, shuffle=True, num_workers=0, drop_last=len(train.labels) % batch == 1)
    looked = loaders.DataLoader(TensorDataset(*train.first(batch)), bs=batch, num_workers=0)
    tuned = learner.Learner(
        loaders.DataLoaders(fed, looked, device=device), model, loss_func=F.cross_entropy, splitter=groups
    )
    with _quiet(), tuned.no_bar(), tuned.no_logging():
        tuned.fine_tune(epochs - 1)
    model.to(device).eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's advice on workers and hardware, and without anybody's warnings."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
