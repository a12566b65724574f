"""What most commands are about: a model, data that it runs on, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from renorm.cli.base import Command, argument, option
from renorm.errors import DataError, UsageError
from renorm.said import say

if TYPE_CHECKING:
    from renorm.columns import Columns
    from renorm.datasets.base import Dataset
    from renorm.models import Model

ROWS = 512  # rows of a table by which its columns are judged
MODEL = "timm:NAME, torchvision:NAME, hf:ORG/NAME, file.py:factory or package.module:factory"
DATA = "an image folder, .npz, .npy, .csv, .parquet, .tar shards, hf:NAME, or digits"


@dataclass(frozen=True, kw_only=True)
class OnModel(Command):
    """A command that opens a model and runs it on data.

    Tables in which a column is plainly wrong are refused; where `tells` is true, it is only noted.
    """

    tells: ClassVar[bool] = False

    model: str = argument(MODEL)
    checkpoint: str = option("", "weights to load: .safetensors, or a .pt of weights alone", metavar="FILE")
    pretrained: bool = option(False, "fetch the published weights of a timm, torchvision or hf model")
    num_classes: int | None = option(None, "build the model with so many outputs")
    batch_size: int = option(64, "samples in a batch")
    limit: int | None = option(None, "read at most so many samples, drawn at random")
    split: str = option(
        "", "part of the data: images_NAME in a .npz, a subfolder, or a split of the hub", metavar="NAME"
    )
    labels: str = option("labels", "the array or column that holds the labels", metavar="NAME")
    group: str = option("", "the column (hospital, camera) by which samples are grouped", metavar="COLUMN")
    inputs: str = option("", "the column that is the input: texts, or paths of images", metavar="COLUMN")
    columns: Literal["check", "as-is"] = option(
        "check", "as-is: take a table's columns as they stand, whatever the model was trained on"
    )
    seed: int = option(0, "of the random order in which the data are read")
    device: str = option("", "where to run, such as cpu or cuda (default: where the model is)", metavar="NAME")
    precision: Literal["float32", "bf16"] = option("float32", "bf16 is faster, and less exact")
    channels_last: bool = option(False, "lay images out with channels last: often faster on convolutions")

    def opened(self) -> Model:
        """The model, with its checkpoint."""
        from renorm.models import open_model

        return open_model(
            self.model,
            checkpoint=self.checkpoint or None,
            num_classes=self.num_classes,
            pretrained=self.pretrained,
        )

    def dataset(self, spec: str, model: Model, *, in_order: bool = False) -> Dataset:
        """The data called `spec`, prepared for `model`; in the random order of the seed, or as they stand."""
        from renorm.datasets.load import load_data

        found = load_data(
            spec,
            preprocessing=model.preprocessing,
            batch_size=self.batch_size,
            labels=self.labels,
            limit=self.limit,
            split=self.split,
            seed=None if in_order else self.seed,
            classes=model.classes,
            inputs=self.inputs,
            group=self.group,
            tokenize=model.tokenize,
            columns=self.known(model),
        )
        return self._looked_at(found, model)

    def known(self, model: Model) -> Columns | None:
        """The columns of the table that the model was trained on, where its checkpoint tells and they are to count."""
        from renorm.columns import Columns

        loaded = model.checkpoint if self.columns == "check" else None
        return Columns.recorded(loaded.provenance) if loaded else None

    def _looked_at(self, dataset: Dataset, model: Model) -> Dataset:
        """The data set, with notes on its columns. Raises DataError where one of them is plainly wrong."""
        from renorm.calls import Caller
        from renorm.facts import Facts
        from renorm.units import FEWEST

        if self.columns == "as-is" or dataset.columns is None or dataset.count < FEWEST or self.name == "doctor":
            return dataset
        first = islice(dataset.batches, -(-ROWS // self.batch_size))
        facts = Facts(model.module, first, caller=Caller(**self.calling()), columns=self.known(model))
        sure = [mistake.said for mistake in facts.mistakes if mistake.sure]
        if sure and not self.tells:
            raise DataError(
                f"{dataset.spec}: columns do not hold what they held when the model was trained.\n  "
                + "\n  ".join(sure)
                + "\nCorrect them: what is estimated on them would hide the mistake. --columns as-is takes them as they are."
            )
        told = tuple(say("look at {column}", column=mistake.said) for mistake in facts.mistakes)
        return replace(dataset, notes=dataset.notes + told)

    def origin_of(
        self, model: Model, dataset: Dataset | None, *, fingerprinted: str | None = None
    ) -> Mapping[str, Any]:
        """`origin` with the fingerprints of what was opened; `fingerprinted` is the model's where it was taken before."""
        from renorm.provenance import fingerprint

        if not self.keeps:  # to read a large model again costs seconds
            return {}
        return self.origin(
            model=fingerprinted or fingerprint(model.module),
            data=dataset.fingerprint if dataset else None,
            checkpoint=model.checkpoint.sha256 if model.checkpoint else None,
        )

    def calling(self) -> dict[str, Any]:
        """How to run the model, as every verb takes it."""
        import torch

        return {
            "device": self.device or None,
            "autocast": torch.bfloat16 if self.precision == "bf16" else None,
            "channels_last": self.channels_last,
        }


@dataclass(frozen=True, kw_only=True)
class OnExample(OnModel):
    """A command that needs one batch to run the model on, of data or of random numbers."""

    data: str = argument(f"{DATA}; without it random numbers are the example", required=False)
    input: str = option("", "the size of one sample where there are no data, such as 3x224x224", metavar="SIZE")

    def batch(self, model: Model) -> Any:
        """The first batch of the data, four samples at most; without data two samples of noise of the model's input size.

        Raises UsageError where neither data nor the model nor --input says what a sample looks like.
        """
        import torch

        if self.data:
            batch = next(iter(self.dataset(self.data, model).batches))
            return batch[0][:4] if isinstance(batch, list | tuple) else batch[:4]
        if self.input:
            size = self.input.lower().split("x")
            if not all(part.isdigit() and int(part) for part in size):
                raise UsageError(f"--input is the size of one sample, such as 3x224x224; got {self.input}.")
            shape = tuple(map(int, size))
        elif model.preprocessing is not None:
            shape = model.preprocessing.input_size
        else:
            raise UsageError(
                f"renorm {self.name} runs the model on an example, and {self.model} does not say what its input looks like; "
                "give DATA, or --input with the size of one sample, such as 3x224x224."
            )
        return torch.randn(2, *shape, generator=torch.Generator().manual_seed(self.seed))


def recorded(model: Model, dataset: Dataset | None) -> dict[str, Any]:
    """What a checkpoint should remember of the columns of a table: those of `dataset`, which the model fits now.

    Without data, those that the model came with; nothing for other data.
    """
    from renorm.columns import Columns

    if dataset is None:
        before = (model.checkpoint.provenance if model.checkpoint else None) or {}
        return {name: before[name] for name in ("columns",) if name in before}
    if dataset.columns is None:
        return {}
    return {"columns": Columns.measure(dataset.batches, dataset.columns or None).plain()}


def notes(*opened: Model | Dataset | None) -> tuple[str, ...]:
    """What was said while opening: how pixels became input, what was loaded or left out; the same thing once."""
    from renorm.models import Model

    table = any(not isinstance(each, Model) and each is not None and each.columns is not None for each in opened)
    told = [
        say("{name}: {note}", name=each.spec, note=note)
        for each in opened
        if each is not None
        for note in (each.doubts if table and isinstance(each, Model) else each.notes)  # a table has no pixels
    ]
    return tuple(dict.fromkeys(told))
