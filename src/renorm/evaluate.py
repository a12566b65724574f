"""A metric on labelled batches, with the interval that says how far to believe it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.calls import Caller, Forward, Output, nonempty
from renorm.errors import BatchError, UnknownName, UsageError
from renorm.faces import Faces
from renorm.sites import unwrap
from renorm.state import evaluating, preserving

Metric = str | Callable[[Any, Any], float | Tensor]
Groups = str | Iterable[Any] | Callable[[Any], Any]
LOWER_IS_BETTER = ("nll", "ece", "mse", "mae")
CLASSES = 1000  # of more of them a table of all pairs is no help
BOOTSTRAP = 200  # resamples: the interval's own error is then about a tenth of its width


@dataclass(frozen=True, kw_only=True)
class Score(Faces):
    """What a model scored: the metric's `value` with a 95 % `interval`, over `count` samples.

    `nll` (nats) and `ece` (15 bins) are those of the softmax of the logits, NaN where the labels are not class indices.
    `groups` holds the score of every group of the samples, the worst value first; empty where none were given.
    `confusion` counts samples by their label (rows) and the answer (columns); None where labels are no class indices, or of
    more than 1,000 classes.
    """

    value: float
    interval: tuple[float, float]
    count: int
    nll: float
    ece: float
    metric: str
    groups: Mapping[str, Score] = field(default_factory=dict[str, "Score"])
    confusion: Tensor | None = field(default=None, repr=False, compare=False)


class Outputs(NamedTuple):
    """Everything a model said on labelled or unlabelled batches, on the CPU: `logits` (N, K, *) and `labels` (N, *) or None."""

    logits: Tensor
    labels: Tensor | None


def evaluate(
    model: nn.Module,
    labelled: Iterable[Any],
    metric: Metric = "accuracy",
    *,
    groups: Groups | None = None,
    forward: Forward | None = None,
    output: Output | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
) -> Score:
    """Score `model`, in evaluation, on all of `labelled` at once: no average of batch averages. The model stays as it was.

    `metric` is "accuracy", "balanced_accuracy", "top5", "f1", "auroc", "nll", "ece", "mse" or "mae", or a function of all
    outputs and all labels that returns one number (tensors are concatenated, other outputs come as lists of batches).
    The interval is Wilson's for a share of right answers, Student's for a mean over samples, and a seeded bootstrap over
    samples for anything else; NaN where a function's outputs cannot be resampled.
    `groups` says which group (hospital, camera, patient) a sample is of: one name per sample in the order in which they are
    read; or how to find a batch's, as the key under which they ride in it or a function of it. Every group is scored too,
    worst first; a function's lowest value counts as its worst.
    Raises BatchError for missing labels or labels outside the model's classes, UnknownName for another metric, UsageError
    for groups that do not fit the samples.
    """
    caller = Caller(forward=forward, output=output, device=device, autocast=autocast, channels_last=channels_last)
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)
    if isinstance(metric, str) and metric not in METRICS:
        raise UnknownName("metric", metric, METRICS)
    outputs: list[Any] = []
    labels: list[Any] = []
    named: list[str] = []
    count = 0
    with preserving(model), evaluating(model):
        for index, batch in nonempty(labelled, asked="evaluate"):
            now, batch = _groups_of(batch, groups)
            result = caller.run(model, batch, index=index)
            if result.labels is None:
                raise BatchError(
                    f"evaluate needs labels, but batch {index} has none; pass (inputs, labels), or a dict with 'labels'."
                )
            by_name = isinstance(metric, str)
            part = (
                caller.logits(result, asked=f"the metric {name!r}")
                if by_name or result.logits is not None
                else result.output
            )
            outputs.append(part.detach().cpu() if isinstance(part, Tensor) else part)
            labels.append(result.labels.detach().cpu() if isinstance(result.labels, Tensor) else result.labels)
            named += now
            count += result.samples
    joined, truth = _joined(outputs), _joined(labels)
    score = replace(_score(metric, name, joined, truth, count), confusion=_confusion(joined, truth))
    if groups is None:
        return score
    if not (isinstance(groups, str) or callable(groups)):
        named = [str(each) for each in (groups.tolist() if isinstance(groups, Tensor) else groups)]
    return replace(score, groups=_by_group(metric, name, joined, truth, count, named))


def _score(metric: Metric, name: str, outputs: Any, labels: Any, count: int) -> Score:
    classes = _is_classification(outputs, labels)
    if classes:
        _refuse_unknown_labels(outputs, labels)
    nll, ece = (float(METRICS[m](outputs, labels)) for m in ("nll", "ece")) if classes else (math.nan, math.nan)
    compute = METRICS[metric] if isinstance(metric, str) else metric
    scores = _per_sample(metric, outputs, labels) if classes or metric in ("mse", "mae") else None
    if isinstance(metric, str) and not classes and metric not in ("mse", "mae"):
        raise UsageError(
            f"the metric {metric!r} needs logits (N, classes, *) and class labels (N, *); found {_shape(outputs)} and "
            f"{_shape(labels)}. Pass a function of (outputs, labels) instead."
        )
    value = float(compute(outputs, labels))
    interval = _interval(scores) if scores is not None else _bootstrap(compute, outputs, labels)
    return Score(value=value, interval=interval, count=count, nll=nll, ece=ece, metric=name)


def _confusion(outputs: Any, labels: Any) -> Tensor | None:
    if not _is_classification(outputs, labels) or outputs.shape[1] > CLASSES:
        return None
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(outputs.argmax(1), labels.long(), num_classes=outputs.shape[1])


def _groups_of(batch: Any, groups: Groups | None) -> tuple[list[str], Any]:
    """The names of the groups of a batch's samples, where they are to be found in it, and the batch without them."""
    if isinstance(groups, str):
        if not isinstance(batch, Mapping) or groups not in batch:
            held = f"entries {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else "no named entries"
            raise UsageError(
                f"groups={groups!r} names an entry of each batch, but a {type(batch).__name__} with {held} came. Give dicts "
                "with that entry, one name per sample, or a function of the batch."
            )
        found, batch = batch[groups], {key: value for key, value in batch.items() if key != groups}
    elif callable(groups):
        found = groups(batch)
    else:
        return [], batch
    return [str(each) for each in (found.tolist() if isinstance(found, Tensor) else found)], batch


def _by_group(metric: Metric, name: str, outputs: Any, labels: Any, count: int, groups: list[str]) -> dict[str, Score]:
    tensors = isinstance(outputs, Tensor) and isinstance(labels, Tensor)
    if not tensors or not len(outputs) == len(labels) == count == len(groups):
        found = (
            f"{len(outputs)} rows of outputs and {len(labels)} labels" if tensors else "outputs that are no one tensor"
        )
        raise UsageError(
            f"groups= needs one name and one row of outputs and labels per sample; got {len(groups)} names for {count} "
            f"samples with {found}."
        )
    rows: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    scores = {
        group: _score(metric, name, outputs[chosen], labels[chosen], len(chosen)) for group, chosen in rows.items()
    }
    sign = -1 if metric in LOWER_IS_BETTER else 1
    # a value that is not a number cannot be compared, so it is looked at first
    worst = sorted(scores, key=lambda group: (not math.isnan(scores[group].value), sign * scores[group].value, group))
    return {group: scores[group] for group in worst}


def collect(model: nn.Module, batches: Iterable[Any], *, caller: Caller, asked: str) -> Outputs:
    """The model's logits, in evaluation, on all batches, with labels where every batch has them; the model stays."""
    logits: list[Tensor] = []
    labels: list[Any] = []
    with preserving(model), evaluating(model):
        for index, batch in nonempty(batches, asked=asked):
            result = caller.run(unwrap(model), batch, index=index)
            logits.append(caller.logits(result, asked=asked).detach().float().cpu())
            labels.append(result.labels)
    labelled = all(isinstance(part, Tensor) for part in labels)
    return Outputs(torch.cat(logits), torch.cat([part.cpu() for part in labels]) if labelled else None)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


def _nll(logits: Tensor, labels: Tensor) -> float:
    return float(F.cross_entropy(logits.double(), labels.long()))


def _torchmetric(name: str, **options: Any) -> Callable[[Tensor, Tensor], float]:
    def compute(logits: Tensor, labels: Tensor) -> float:
        from torchmetrics.functional import classification

        function = getattr(classification, name)
        return float(function(logits.float().softmax(1), labels.long(), num_classes=logits.shape[1], **options))

    return compute


def _auroc(logits: Tensor, labels: Tensor) -> float:
    """Mean over the classes that some samples are of and others not; NaN where there is none, as in a group of one class."""
    from torchmetrics.functional.classification import multiclass_auroc

    count = torch.bincount(labels.flatten(), minlength=logits.shape[1])
    known = (count > 0) & (count < labels.numel())
    if not bool(known.any()):
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the classes that are left out here
        each = multiclass_auroc(logits.float().softmax(1), labels.long(), num_classes=logits.shape[1], average="none")
    return float(torch.as_tensor(each)[known].mean())


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": _accuracy,
    "balanced_accuracy": _torchmetric("multiclass_accuracy", average="macro"),
    "top5": lambda logits, labels: float(
        (logits.topk(min(5, logits.shape[1]), 1).indices == labels.unsqueeze(1)).any(1).double().mean()
    ),
    "f1": _torchmetric("multiclass_f1_score", average="macro"),
    "auroc": _auroc,
    "nll": _nll,
    "ece": _torchmetric("multiclass_calibration_error", n_bins=15),
    "mse": lambda outputs, labels: float(F.mse_loss(outputs.double().reshape(labels.shape), labels.double())),
    "mae": lambda outputs, labels: float(F.l1_loss(outputs.double().reshape(labels.shape), labels.double())),
}


def _per_sample(metric: Metric, outputs: Tensor, labels: Tensor) -> Tensor | None:
    """Each sample's own score (N,) for a metric that is their mean; None for one that is not."""
    if metric == "accuracy":
        scores = (outputs.argmax(1) == labels).double()
    elif metric == "top5":
        scores = (outputs.topk(min(5, outputs.shape[1]), 1).indices == labels.unsqueeze(1)).any(1).double()
    elif metric == "nll":
        scores = F.cross_entropy(outputs.double(), labels.long(), reduction="none")
    elif metric in ("mse", "mae"):
        gap = (outputs.double().reshape(labels.shape) - labels.double()).abs()
        scores = gap.square() if metric == "mse" else gap
    else:
        return None
    return scores.flatten(1).mean(1) if scores.dim() > 1 else scores


def _interval(scores: Tensor) -> tuple[float, float]:
    from scipy import stats

    n, mean = len(scores), float(scores.mean())
    if bool(((scores == 0) | (scores == 1)).all()):
        low, high = stats.binomtest(int(scores.sum()), n).proportion_ci(0.95, method="wilson")
        return float(low), float(high)
    if n < 2:
        return math.nan, math.nan
    half = float(stats.t.ppf(0.975, n - 1)) * float(scores.std()) / math.sqrt(n)
    return mean - half, mean + half


def _bootstrap(compute: Callable[[Any, Any], float | Tensor], outputs: Any, labels: Any) -> tuple[float, float]:
    if (
        not (isinstance(outputs, Tensor) and isinstance(labels, Tensor))
        or len(outputs) != len(labels)
        or len(outputs) < 2
    ):
        return math.nan, math.nan
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(BOOTSTRAP):
        rows = torch.randint(len(outputs), (len(outputs),), generator=generator)
        draws.append(float(compute(outputs[rows], labels[rows])))
    low, high = (
        torch.tensor(draws, dtype=torch.float64).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    )
    return low, high


def _joined(parts: list[Any]) -> Any:
    if not all(isinstance(part, Tensor) for part in parts):
        return parts
    same = {part.shape[1:] for part in parts}
    return torch.cat([part if part.dim() else part[None] for part in parts]) if len(same) == 1 else parts


def _is_classification(outputs: Any, labels: Any) -> bool:
    return (
        isinstance(outputs, Tensor)
        and isinstance(labels, Tensor)
        and outputs.is_floating_point()
        and not labels.is_floating_point()
        and outputs.dim() >= 2
        and outputs.shape[1] > 1
        and outputs.shape[:1] + outputs.shape[2:] == labels.shape
    )


def _refuse_unknown_labels(outputs: Tensor, labels: Tensor) -> None:
    low, high, classes = int(labels.min()), int(labels.max()), outputs.shape[1]
    if low < 0 or high >= classes:
        raise BatchError(
            f"the labels run from {low} to {high}, but the model has {classes} classes (0 to {classes - 1}); "
            "check that the data's classes are the model's, in its order."
        )


def _shape(value: Any) -> str:
    return (
        f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"a {type(value).__name__}"
    )
