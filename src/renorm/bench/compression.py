"""Suite `compression`: how much of what rounding, pruning, averaging and merging cost comes back by one call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import torch.nn.utils.prune as pruning
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from renorm.bench import compression_table, digits
from renorm.bench.base import Cell, Row, Suite, Value, vary
from renorm.bench.beds import BEDS, Bed, Labelled, error
from renorm.bench.corruptions import CLEAN
from renorm.errors import require
from renorm.fold import fold
from renorm.recalibrate import recalibrate_
from renorm.repair import repair_
from renorm.sites import find_sites

__all__ = ["Compression"]

Undoable = Any  # an Adaptation or a Repaired: both have restore_()
Way = Callable[[nn.Module, list[nn.Module], list[Tensor]], Undoable]

WAYS: dict[str, Way] = {
    "prior_0": lambda model, sources, images: recalibrate_(model, images, prior=0),
    "auto": lambda model, sources, images: recalibrate_(model, images),
    "mean": lambda model, sources, images: repair_(model, sources, images, match="mean"),
    "repaired": lambda model, sources, images: repair_(model, sources, images),
}
WITHOUT_NORMS = ("mean", "repaired")

SIZES = {  # calibrating and measured images at most
    ("resnet20", "quick"): (256, 400),
    ("resnet20", "full"): (4000, 4000),
    ("mobilenet_vww", "quick"): (256, 200),
    ("mobilenet_vww", "full"): (400, 200),  # there are no more photographs
}
TUNED = {
    "quick": (800, 2),
    "full": (2000, 20),
}  # source images and epochs of each copy that is averaged


class Compression(Suite):
    """ResNet-20 on CIFAR-10 and MobileNet on photographs: rounded, pruned, and (ResNet-20) fine-tuned copies averaged."""

    name: ClassVar[str] = "compression"
    revision: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = tuple(dict.fromkeys(file for bed in BEDS.values() for file in bed.needs))

    def cells(self) -> Iterator[Cell]:
        for seed in range(self.seeds):  # outermost, so that an interrupted run has whole grids
            for bed in BEDS:
                for point in GRIDS[self.size]:
                    yield Cell.of(bed=bed, **point, seed=seed)
            for bed in ("digits", "resnet20") if self.size == "quick" else ("digits", *BEDS):
                yield Cell.of(bed=bed, how="averaged", amount=2, images=64, form="both", seed=seed)

    def run_cell(self, cell: Cell) -> Mapping[str, float]:
        seed = cell["seed"]
        if cell["bed"] == "digits":
            return _merged_digits(seed, cell["images"])
        bed = BEDS[cell["bed"]](self.data, *SIZES[cell["bed"], self.size])
        held_out = bed.held_out(CLEAN, seed=seed)
        images = bed.pool(CLEAN, seed=seed).first(cell["images"]).unlabelled()
        if cell["how"] == "averaged":
            copies, iterates = _copies(bed, seed, *TUNED[self.size])
            values = _prefixed("two copies", _errors(_average(copies), copies, images, held_out))
            values |= _prefixed("iterates", _errors(_average(iterates), iterates[-1:], images, held_out))
            bare = [fold(each, images[0][:2]).model for each in copies]
            return values | _prefixed("two copies, folded", _errors(_average(bare), bare, images, held_out))
        source = bed.model()
        made = fold(source, images[0][:2]).model if cell["form"] == "folded" else source
        return _errors(
            COMPRESSIONS[cell["how"]](copy.deepcopy(made), cell["amount"]),
            [source],
            images,
            held_out,
        )

    def table(self, rows: Sequence[Row]) -> str:
        return compression_table.table(rows)


def _rounded(model: nn.Module, bits: int, *, per_channel: bool) -> nn.Module:
    """Every weight on a symmetric grid of `bits` bits between its largest values, by torchao's arithmetic; no data."""
    quant = require(
        "torchao.quantization.quant_primitives",
        extra="bench",
        purpose="rounding weights",
    )
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight.detach()
            block = (1, *weight.shape[1:]) if per_channel else tuple(weight.shape)
            scale, zero = quant.choose_qparams_affine(
                weight,
                quant.MappingType.SYMMETRIC,
                block,
                torch.int8,
                least,
                most,
                eps=1e-12,
            )
            packed = quant.quantize_affine(weight, block, scale, zero, torch.int8, least, most)
            module.weight.data.copy_(quant.dequantize_affine(packed, block, scale, zero, torch.int8, least, most))
    return model


def _pruned(model: nn.Module, share: float) -> nn.Module:
    """The smallest weights of all convolutions together set to zero."""
    chosen = [(module, "weight") for module in model.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():  # a masked weight that has a gradient could not be copied
        pruning.global_unstructured(chosen, pruning.L1Unstructured, amount=share)
    return model


COMPRESSIONS: dict[str, Callable[[nn.Module, Any], nn.Module]] = {
    "bits": lambda model, bits: _rounded(model, bits, per_channel=True),
    "bits, one grid a layer": lambda model, bits: _rounded(model, bits, per_channel=False),
    "sparsity": _pruned,
}
ROUNDED: dict[str, Value] = {"how": "bits", "amount": 4, "images": 64, "form": "norms"}
_OTHERS: tuple[dict[str, Value], ...] = (
    {**ROUNDED, "form": "folded"},
    {**ROUNDED, "how": "bits, one grid a layer", "amount": 5},
    {**ROUNDED, "how": "sparsity", "amount": 0.7},
)
FOLDED, ONE_GRID, PRUNED = _OTHERS
GRIDS: dict[str, list[dict[str, Value]]] = {
    "quick": [*vary(ROUNDED, amount=(3,), images=(16,)), *vary(FOLDED, amount=(3,)), PRUNED],
    "full": [
        *vary(ROUNDED, amount=(8, 6, 5, 3), images=(16, 256)),
        *vary(FOLDED, amount=(8, 6, 5, 3)),
        *vary(ONE_GRID, amount=(8, 6, 4)),
        *vary(PRUNED, amount=(0.3, 0.5, 0.6, 0.8)),
    ],
}


def _errors(model: nn.Module, sources: list[nn.Module], images: list[Tensor], measured: Labelled) -> dict[str, float]:
    """The error of the sources (their mean), of the model, and of the model after each way, undone each time."""
    before = [error(source, measured) for source in sources]
    values = {"source": sum(before) / len(before), "compressed": error(model, measured)}
    has_norms = any(site.kind == "batch" for site in find_sites(model))
    for name in WAYS if has_norms else WITHOUT_NORMS:
        undo = WAYS[name](model, sources, images)
        values[name] = error(model, measured)
        undo.restore_()
    return values


def _prefixed(case: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{case}: {way}": value for way, value in values.items()}


# ── weights averaged ──


def _average(models: Sequence[nn.Module]) -> nn.Module:
    """As torch averages: the parameters; buffers are those of the last."""
    average = AveragedModel(models[0])
    for model in models:
        average.update_parameters(model)
    return average.module.eval()


RATE, BATCH, EVERY = (
    0.05,
    32,
    5,
)  # SGD that starts and ends low; an iterate is kept every few steps of the last epoch


def _copies(bed: Bed, seed: int, images: int, epochs: int) -> tuple[list[nn.Module], list[nn.Module]]:
    """Two copies of the network, fine-tuned on source images in different orders, and iterates of the second's last epoch."""
    source = bed.source(seed=seed).first(images)
    made = [_tuned(bed.model(), source, 2 * seed + number, epochs) for number in (0, 1)]
    return [each[-1] for each in made], made[1]


def _tuned(model: nn.Module, data: Labelled, seed: int, epochs: int) -> list[nn.Module]:
    """The network in the last epoch, every few steps, and at its end."""
    order = torch.Generator().manual_seed(seed)
    steps = len(data.labels) // BATCH
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps * epochs)
    kept: list[nn.Module] = []
    model = model.train().to(memory_format=torch.channels_last)
    for epoch in range(epochs):
        for step, rows in enumerate(_shuffled(len(data.labels), order)[:steps]):
            mirrored = torch.rand(len(rows), 1, 1, 1, generator=order) < 0.5
            inputs = torch.where(mirrored, data.inputs[rows].flip(-1), data.inputs[rows])
            optimizer.zero_grad()
            logits = model(inputs.contiguous(memory_format=torch.channels_last))
            torch.autograd.backward(F.cross_entropy(logits, data.labels[rows]))
            optimizer.step()
            schedule.step()
            if epoch == epochs - 1 and (step + 1) % EVERY == 0:
                kept.append(copy.deepcopy(model).eval())
    return [*kept, model.eval()]


def _shuffled(count: int, order: torch.Generator) -> list[Tensor]:
    return list(torch.split(torch.randperm(count, generator=order), BATCH))


# ── two networks from different starts ──


def _merged_digits(seed: int, images: int) -> dict[str, float]:
    """Two digit networks trained from different random weights, channels of the second put in the order of the first's."""
    train, rest = digits.load()
    first, second = (_last(digits.training(train, seed=2 * seed + number)) for number in (0, 1))
    _reorder_(second, first, train.images[:256])
    calibrating, measured = (
        [rest.images[:images]],
        Labelled(rest.images[images:], rest.labels[images:]),
    )
    bare = [fold(each, calibrating[0]).model for each in (first, second)]
    return {
        **_prefixed(
            "two starts",
            _errors(_average([first, second]), [first, second], calibrating, measured),
        ),
        **_prefixed("two starts, folded", _errors(_average(bare), bare, calibrating, measured)),
    }


def _last(networks: Iterator[nn.Sequential]) -> nn.Sequential:
    for network in networks:
        found = network
    return found


def _reorder_(model: nn.Sequential, like: nn.Sequential, images: Tensor) -> None:
    """Give each convolution's channels the order in which they correlate best with the other's (Li et al. 2015)."""
    from scipy.optimize import linear_sum_assignment

    layers = [each for each in model if isinstance(each, nn.Conv2d | nn.Linear)]
    norms = [site.module for site in find_sites(model)]
    ends = [index for index, each in enumerate(model) if isinstance(each, nn.ReLU)]
    for layer, norm, behind, end in zip(layers, norms, layers[1:], ends, strict=False):
        with torch.no_grad():
            ours, theirs = (each[: end + 1](images).movedim(1, 0).flatten(1) for each in (model, like))
            alike = torch.corrcoef(torch.cat([theirs, ours]))[: len(theirs), len(theirs) :].nan_to_num()
        _, order = linear_sum_assignment(-alike.numpy())
        for tensor in (layer.weight, *norm.state_dict().values()):
            if tensor.dim():
                tensor.data.copy_(tensor.data[order].clone())
        behind.weight.data.copy_(behind.weight.data[:, order].clone())
