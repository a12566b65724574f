"""`renorm pretrain MODEL DATA -o OUT`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from renorm.cli.base import option
from renorm.cli.training import Trains

if TYPE_CHECKING:
    from renorm.datasets.base import Dataset
    from renorm.models import Model
    from renorm.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Pretrain(Trains):
    """Train a model from scratch on labelled data, by the loop that fine-tunes.

    Everything trains, statistics move with each batch and are re-estimated on all data at the end. The weights that the
    model comes with are where it starts: give it none for random ones.
    """

    name: ClassVar[str] = "pretrain"
    example: ClassVar[str] = "renorm pretrain timm:resnet18 photos/ --val test/ --epochs 50 -o resnet18.safetensors"

    epochs: int = option(20, "how often all data are seen")

    def prepared(self) -> tuple[Model, Dataset]:
        """The model, built for the classes of the data where its factory takes their number."""
        from renorm.errors import UsageError

        model, dataset = super().prepared()
        if self.num_classes is None and dataset.classes is not None:
            try:
                model = replace(self, num_classes=len(dataset.classes)).opened()
            except UsageError:  # a factory that takes no number of classes: its outputs must fit as they are
                return model, dataset
        return model, dataset

    def recipe(self) -> Recipe:
        from renorm.calls import Caller
        from renorm.recipe import Recipe

        return Recipe(
            policy="all",
            epochs=self.epochs,
            lr=self.lr,
            head="keep",
            metric=self.metric,
            seed=self.seed,
            optimiser=self.optimiser,
            weight_decay=self.weight_decay,
            average=self.average,
            memory=self.memory,
            run=self.run_folder or None,
            save_every=self.save_every,
            caller=Caller(**self.calling()),
        )
