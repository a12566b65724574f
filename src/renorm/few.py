"""A few labels: how much of the target the statistics should hold, and a head solved on what the features then are."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from renorm.calls import Caller
from renorm.errors import BatchError, UsageError
from renorm.heads import last_layer
from renorm.moments import source_share
from renorm.observe import observe
from renorm.sites import Site, find_sites, unwrap, walk
from renorm.split import Split
from renorm.state import evaluating

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)  # of the target's moments
STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # scikit-learn's C on features of unit variance
MIDDLE = 0.1  # the strength by which shares are compared
FOLDS = 5
STEPS = 300  # of L-BFGS at most

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Solved:
    """What was chosen: the target's `share` in the statistics, a new head's `strength`, and the `loss` that decided.

    share     None where no layer holds statistics
    strength  None where the head was kept
    loss      nats per sample: cross-validated with a new head, of the model's own answers with the old one; None where a
              class has a single sample, so that nothing could be compared
    """

    share: float | None
    strength: float | None
    loss: float | None


def solve_(
    model: nn.Module, batches: Iterable[Any], parts: Split, *, new: bool, seed: int = 0, caller: Caller | None = None
) -> Solved:
    """Give `model` the blend of source and target statistics that fits the labels best and, if `new`, a head solved for it.

    The blend is one number for all layers, as in stage 1 of LCCS (Zhang et al. 2022, eq. 5); the head a multinomial logistic
    regression on the features, whose strength is chosen likewise. Where a class has a single sample the blend is that of
    `recalibrate_(prior="auto")`.
    Raises UsageError where the head is no linear layer on one vector per sample, BatchError for labels that are no class
    indices. Nothing is undone on failure: `finetune_` does that.
    """
    caller = caller or Caller()
    batches = list(batches)
    place = last_layer(model, parts)
    head = None if place is None else dict(walk(unwrap(model)))[place]
    if head is None or (new and not isinstance(head, nn.Linear)):
        raise UsageError(
            "a head can be solved only where it is one linear layer, and this model's is not; give another policy, such as "
            '"head-only".'
        )
    sites = [
        site
        for site in find_sites(model)
        if site.kind == "batch" and site.tensors is not None and not parts.is_head(site.name.partition("@")[0])
    ]
    source = {site.name: held for site in sites if (held := site.statistics()) is not None}
    under = vars(caller)
    seen = observe(model, batches, under="batch", include=[s.name for s in sites], **under) if sites else {}

    def hold(share: float) -> tuple[Array, NDArray[np.int64], float]:
        for site in sites:
            if site.name in seen:
                site.write_(source[site.name].blend(seen[site.name].values, source_weight=1 - share, geometric=True))
        return _features(model, batches, head, caller)

    shares: Sequence[float] = SHARES if sites else (1.0,)
    features, labels, _ = hold(shares[-1])
    least = int(np.bincount(labels)[np.unique(labels)].min())
    if least < 2 and new:
        share = _certain(sites, seen) if sites else 1.0
        features, labels, _ = hold(share)
        _fit_(head, features, labels, MIDDLE)
        return Solved(share if sites else None, MIDDLE, None)
    losses = {}
    for share in shares:
        features, labels, own = hold(share)
        losses[share] = _validated(features, labels, MIDDLE, seed) if new else own
    share = min(losses, key=lambda each: losses[each])
    features, labels, _ = hold(share)
    if not new:
        return Solved(share if sites else None, None, losses[share])
    strengths = {strength: _validated(features, labels, strength, seed) for strength in STRENGTHS}
    strength = min(strengths, key=lambda each: strengths[each])
    _fit_(head, features, labels, strength)
    return Solved(share if sites else None, strength, strengths[strength])


@torch.no_grad()
def _features(
    model: nn.Module, batches: Sequence[Any], head: nn.Module, caller: Caller
) -> tuple[Array, NDArray[np.int64], float]:
    """What goes into the head (N, D), the labels (N,), and the mean loss of the model's own answers."""
    found: list[Tensor] = []
    labels: list[Tensor] = []
    loss = 0.0
    handle = head.register_forward_hook(lambda module, args, output: found.append(args[0].detach()))
    try:
        with evaluating(model):
            for index, batch in enumerate(batches):
                result = caller.run(model, batch, index=index)
                truth = result.labels
                if not isinstance(truth, Tensor) or truth.is_floating_point() or truth.dim() != 1:
                    raise BatchError(
                        f"a head is solved for class indices, one per sample, and batch {index} has other labels; give another "
                        'policy, such as "head-only".'
                    )
                logits = caller.logits(result, asked="solving a head").float().cpu()
                truth = truth.long().cpu()
                if int(truth.max()) < logits.shape[1]:
                    loss += float(F.cross_entropy(logits, truth, reduction="sum"))
                labels.append(truth)
    finally:
        handle.remove()
    features = torch.cat(found).double().cpu()
    if features.dim() != 2 or len(features) != sum(map(len, labels)):
        raise UsageError(
            f"a head can be solved only on one vector per sample; this head was given {tuple(found[0].shape)}. Give "
            'another policy, such as "head-only".'
        )
    return features.numpy(), torch.cat(labels).numpy(), loss / len(features)


def _certain(sites: Sequence[Site], seen: Any) -> float:
    """The target's share by how sure its moments are, as `recalibrate_` has it."""
    errors = []
    for site in sites:
        held = site.statistics()
        if held is not None and site.name in seen:
            errors.append(float(seen[site.name].standard_error(held.var + site.eps).square().mean()))
    return 1 - source_share(sum(errors) / len(errors)) if errors else 0.0


def _scaled(features: Array) -> tuple[Array, Array, Array]:
    """Features of unit variance, and the mean and deviation that were taken out; a constant one stays 0."""
    mean, deviation = features.mean(0), features.std(0)
    deviation = np.where(deviation > 1e-6 * (1 + np.abs(mean)), deviation, np.inf)
    return (features - mean) / deviation, mean, deviation


def _regression(strength: float, *, bias: bool = True) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=STEPS, fit_intercept=bias)


def _validated(features: Array, labels: NDArray[np.int64], strength: float, seed: int) -> float:
    """The mean loss of samples that the regression did not see."""
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    values = _scaled(features)[0]
    if values.shape[1] > values.shape[0]:  # no more directions than samples: the solution lies in their span
        left, size, _ = np.linalg.svd(values, full_matrices=False)
        values = left * size
    folds = min(FOLDS, int(np.bincount(labels)[np.unique(labels)].min()))
    parts = StratifiedKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a regression that has not quite settled is compared all the same
        chances = cross_val_predict(_regression(strength), values, labels, cv=parts, method="predict_proba")
    right = chances[np.arange(len(labels)), np.searchsorted(np.unique(labels), labels)]
    return float(-np.log(np.clip(right, 1e-12, None)).mean())


def _fit_(layer: nn.Module, features: Array, labels: NDArray[np.int64], strength: float) -> None:
    """Let the linear layer be the regression on all samples."""
    assert isinstance(layer, nn.Linear)  # `solve_` has looked
    values, mean, deviation = _scaled(features)
    if layer.bias is None:
        values, mean = features / deviation, np.zeros_like(mean)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = _regression(strength, bias=layer.bias is not None).fit(values, labels)
    weight, bias = fitted.coef_, np.broadcast_to(fitted.intercept_, len(fitted.coef_))
    if len(weight) == 1:  # two classes: the log odds of the second
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / deviation
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        if layer.bias is not None:
            layer.bias.copy_(torch.from_numpy(bias - weight @ mean))
