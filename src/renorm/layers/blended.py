"""Batch norm that counts what it holds as a fixed share of the moments, or as a fixed number of images."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from renorm.errors import UsageError
from renorm.kernels import normalised
from renorm.layers.base import Mixing, finite_or, mixed


class Blended(Mixing):
    """In training as in evaluation, normalises by `w` of the statistics it holds and `1 − w` of the batch's moments.

    w = `source_weight`, or `prior / (prior + N)` where `prior` is given: what is held then counts as that many images beside
    the N of the batch. The means mix and the variances mix. Statistics move in training, as batch norm's do, and never in
    evaluation; w = 1 is `Frozen` with moving statistics, w = 0 batch norm that always normalises by the batch.

    Raises UsageError for a weight outside [0, 1], a negative prior, or both at once.

    Schneider et al. 2020, eq. 4.
    """

    name: ClassVar[str] = "blended"
    cites: ClassVar[str] = (
        "@inproceedings{schneider2020covariate, title={Improving robustness against common corruptions by covariate shift "
        "adaptation}, author={Schneider, Steffen and Rusak, Evgenia and Eck, Luisa and Bringmann, Oliver and Brendel, Wieland "
        "and Bethge, Matthias}, booktitle={NeurIPS}, year={2020}}"
    )
    keeps: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ("source_weight", "prior")

    def __init__(
        self, num_features: int, *, source_weight: float | None = None, prior: float | None = None, **common: Any
    ) -> None:
        super().__init__(num_features, **common)
        if source_weight is not None and prior is not None:
            raise UsageError("Blended takes a source_weight or a prior, which decides the weight itself; got both.")
        if source_weight is None and prior is None:
            source_weight = 0.5
        if source_weight is not None and not 0 <= source_weight <= 1:
            raise UsageError(f"source_weight is the share of what the layer holds, in [0, 1]; got {source_weight!r}.")
        if prior is not None and not prior >= 0:
            raise UsageError(f"prior is the number of images that what the layer holds counts as; got {prior!r}.")
        self.source_weight: float | None = source_weight
        self.prior: float | None = prior

    def _normalised(self, x: Tensor) -> Tensor:
        held = self._held(x)
        share = self._source_share(x.shape[0])

        def rule(
            mean: Tensor, var: Tensor, held_mean: Tensor, held_var: Tensor, weight: Tensor | None, bias: Tensor | None
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            mean, var = finite_or(mean, var, held_mean, held_var)
            mean, var = mixed(mean, var, held_mean, held_var, share)
            return mean, self._scale(var, weight), bias

        y, mean, var = normalised(x, rule, held.mean, held.var, self.weight, self.bias)
        if self.training:
            self._track_values(x, mean, var)
        return y

    def _source_share(self, images: int) -> float:
        if self.prior is not None:
            return self.prior / (self.prior + images)
        assert self.source_weight is not None
        return self.source_weight
