"""`renorm finetune MODEL DATA -o OUT`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from renorm.cli.base import option
from renorm.cli.training import Trains

if TYPE_CHECKING:
    from renorm.models import Model
    from renorm.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Finetune(Trains):
    """Train a pretrained model on labelled data, with its norm layers moving as they should.

    A list of classes other than the model's gives it a new head. Stop it at any step: with --run-folder the same command
    goes on from there to the same result.
    """

    name: ClassVar[str] = "finetune"
    family: ClassVar[str] = "regularisers"
    chooses: ClassVar[str] = "regularisers"
    example: ClassVar[str] = (
        "renorm finetune nets.py:resnet20 --checkpoint resnet20.safetensors photos/ --val test/ -o new.safetensors"
    )

    policy: str = option("auto", "what may move: auto, all, head-only, few-labels …", metavar="NAME")
    regularisers: str = option(
        "",
        "l2_sp, delta, bss, co_tuning, stochnorm, shrink; with commas between; their own options: --options.NAME.OPTION",
        metavar="NAMES",
    )
    options: Mapping[str, Any] = field(default_factory=dict)
    head: Literal["auto", "new", "keep"] = option("auto", "auto: new unless the label names are the model's")
    gradual: bool = option(False, "train the head first, then one stage after another")
    depth_decay: float = option(1.0, "the rate falls by this factor from stage to stage towards the input")

    target: str = option("", "unlabelled data of the domain that the model is for, trained beside DATA", metavar="DATA")
    joint: Literal["transferable", "per_domain"] = option("transferable", "how --target and DATA are told apart")

    def beside(self, model: Model, recipe: Recipe) -> Recipe:
        from renorm.cli.training import Reshuffled

        if not self.target:
            return recipe
        dataset = self.dataset(self.target, model)
        return replace(
            recipe, target=Reshuffled(dataset.batches, tuple(dataset.classes or ()) or None), joint=self.joint
        )

    def _regulariser(self, name: str) -> Any:
        """One with its options; a name that is unknown as it is, for `build` to refuse."""
        from renorm.regularisers.base import catalogue

        own = {key: tuple(v) if isinstance(v, list) else v for key, v in self.options.get(name, {}).items()}
        return catalogue()[name](**own) if name in catalogue() else name

    def recipe(self) -> Recipe:
        from renorm.calls import Caller
        from renorm.policy import preset
        from renorm.recipe import Recipe
        from renorm.regularisers.base import build

        return Recipe(
            policy=self.policy if self.policy == "auto" else preset(self.policy),
            regularisers=build(
                [self._regulariser(name) for each in self.regularisers.split(",") if (name := each.strip())]
            ),
            epochs=self.epochs,
            lr=self.lr,
            head=self.head,
            metric=self.metric,
            seed=self.seed,
            optimiser=self.optimiser,
            weight_decay=self.weight_decay,
            average=self.average,
            memory=self.memory,
            depth_decay=self.depth_decay,
            gradual=self.gradual,
            run=self.run_folder or None,
            save_every=self.save_every,
            caller=Caller(**self.calling()),
        )
