"""Batch norm with statistics and affine parameters for each domain, chosen sample by sample."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.errors import BatchError, UnknownName, UsageError
from renorm.kernels import by_image, from_images, normalised, pooled, recomputing
from renorm.layers.base import BatchNormTensors, Tracking

Ids = Tensor | Sequence[int] | Sequence[str]  # a lone name is that of all samples


class Extra(nn.Module):
    """Holds a layer's tensors beyond torch's, so that their keys begin with `extra.`: a row for every set but the first."""

    mean: Tensor
    var: Tensor
    tracked: Tensor
    weight: nn.Parameter | None
    bias: nn.Parameter | None


class Sets(Tracking):
    """A batch norm with several sets of statistics, and of affine parameters unless these are shared.

    The first set stands under torch's own keys, the others, a row each, under `extra.*`. A checkpoint of a plain batch norm
    loads into all of them. Sites see one place a set, `name@set`. All sets of a mixed batch are normalised in one pass.
    """

    shares_affine: ClassVar[bool] = False
    needs_two_values: ClassVar[bool] = (
        False  # of a set, not of the batch: one with a single value is normalised by what it holds
    )

    def __init__(self, num_features: int, sets: Sequence[str], **common: Any) -> None:
        super().__init__(num_features, **common)
        self._sets = list(sets)
        self.on_slot: Callable[[str, Tensor], None] | None = None
        self.current: Domains | None = None
        self.extra: Extra = Extra()
        rows = len(sets) - 1
        self.extra.register_buffer("mean", self.running_mean.repeat(rows, 1))
        self.extra.register_buffer("var", self.running_var.repeat(rows, 1))
        self.extra.register_buffer("tracked", self.num_batches_tracked.repeat(rows))
        for name in ("weight", "bias"):
            own = None if self.shares_affine else getattr(self, name)
            self.extra.register_parameter(name, None if own is None else nn.Parameter(own.detach().repeat(rows, 1)))

    def slots(self) -> Sequence[str]:
        """The names of the sets."""
        return tuple(self._sets)

    def slot_statistics(self, slot: str) -> tuple[Tensor, Tensor]:
        """Running mean and variance of a set, as views."""
        row = self._sets.index(slot)
        if row == 0:
            return self.running_mean, self.running_var
        return self.extra.mean[row - 1], self.extra.var[row - 1]

    def take_(self, held: BatchNormTensors) -> None:
        super().take_(held)
        with torch.no_grad():
            for part, tensor in self._parts():
                source = getattr(self, OWN.get(part, part))
                if source is None:
                    setattr(self.extra, part, None)
                else:
                    tensor.copy_(source)
                    tensor.requires_grad_(source.requires_grad)

    def forward(self, x: Tensor, ids: Ids | None = None) -> Tensor:
        values = self._first(x)
        return self._finished(self._normalised(values, ids))

    @abstractmethod
    def _default(self, x: Tensor) -> Tensor:
        """The set that each image is normalised by where nobody says it. Shapes: x (N, C, *) → (N,)."""

    def _groups(self, x: Tensor, ids: Ids | None) -> Tensor:
        if ids is None and self.current is not None:
            ids = self.current.ids
        return self._default(x) if ids is None else self._checked(ids, x)

    def _checked(self, ids: Ids, x: Tensor) -> Tensor:
        ids = [ids] * x.shape[0] if isinstance(ids, str) else ids
        groups = ids if isinstance(ids, Tensor) else torch.tensor([self._row(name) for name in ids])
        if groups.shape != x.shape[:1] or groups.is_floating_point() or groups.dtype == torch.bool:
            raise BatchError(
                f"{self.where} was given ids of shape {tuple(groups.shape)} and type {groups.dtype} for {x.shape[0]} samples; "
                "it needs one whole number, or one name, per sample."
            )
        if not torch.compiler.is_compiling() and groups.numel():
            least, most = int(groups.min()), int(groups.max())
            if least < 0 or most >= len(self._sets):
                raise BatchError(
                    f"{self.where} was given the id {least if least < 0 else most}; it has {len(self._sets)} sets, "
                    f"numbered from 0: {', '.join(self._sets)}."
                )
        return groups.to(device=x.device, dtype=torch.long)

    def _normalised(self, x: Tensor, ids: Ids | None = None) -> Tensor:
        groups = self._groups(x, ids)
        return self._by_batches(x, groups) if self.training else self._by_sets(x, groups)

    def _by_sets(self, x: Tensor, groups: Tensor) -> Tensor:
        if self.on_slot is not None:
            for row, slot in enumerate(self._sets):
                part = x[groups == row]
                if part.numel():
                    self.on_slot(slot, part)
        mean, var = self._all("running_mean"), self._all("running_var")
        weight, bias = self._affine(mean, var)

        def each(rows: Tensor | None) -> Tensor | None:
            return None if rows is None else rows[groups].flatten()

        y = F.batch_norm(by_image(x), each(mean), each(var), each(weight), each(bias), False, 0.0, self.eps)
        return from_images(y, x)

    def _by_batches(self, x: Tensor, groups: Tensor) -> Tensor:
        shape, sets = x.shape[:2], len(self._sets)
        held_mean, held_var = self._all("running_mean").clone(), self._all("running_var").clone()

        def moments(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return pooled(mean.view(shape), var.view(shape), groups, sets)

        def rule(
            mean: Tensor, var: Tensor, held_mean: Tensor, held_var: Tensor, weight: Tensor | None, bias: Tensor | None
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            mean, var, images = moments(mean, var)
            usable = (images[:, None] * positions > 1) & torch.isfinite(mean + var)
            mean = torch.where(usable, mean, held_mean.to(mean.dtype))
            var = torch.where(usable, var, held_var.to(var.dtype))
            weight, bias = self._modified(mean, var, weight), bias
            scale = self._scale(var, weight)
            return mean[groups].flatten(), scale[groups].flatten(), None if bias is None else bias[groups].flatten()

        images = by_image(x)
        positions = images[0, 0].numel()
        weight, bias = self._stacked("weight"), self._stacked("bias")
        y, mean, var = normalised(images, rule, held_mean, held_var, weight, bias)
        self._track_sets(*moments(mean, var), positions)
        return from_images(y, x)

    def _modified(self, mean: Tensor, var: Tensor, weight: Tensor | None) -> Tensor | None:
        """The weight to apply where sets are normalised by these moments. Shapes: all (sets, C)."""
        return weight

    def _affine(self, mean: Tensor, var: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return self._modified(mean, var, self._stacked("weight")), self._stacked("bias")

    def _all(self, name: str) -> Tensor:
        """A statistic of all sets, a row each."""
        return torch.cat([getattr(self, name)[None], getattr(self.extra, name.removeprefix("running_"))]).detach()

    def _stacked(self, name: str) -> Tensor | None:
        own: Tensor | None = getattr(self, name)
        if own is None:
            return None
        if self.shares_affine:
            return own.expand(len(self._sets), -1)
        return torch.cat([own[None], getattr(self.extra, name)])

    def _track_sets(self, mean: Tensor, var: Tensor, images: Tensor, positions: int) -> None:
        """Move each set towards its part of the batch. Shapes: mean and var (sets, C), images (sets,)."""
        if not self.track_running_stats or recomputing():
            return
        with torch.no_grad():
            count = images * positions
            unbiased = var * (count / (count - 1).clamp_min(1))[:, None]
            finite = torch.isfinite(mean.sum(1) + unbiased.sum(1))
            ok = finite & (count > 1)
            tracked = torch.cat([self.num_batches_tracked[None], self.extra.tracked]) + ok
            self.skipped.add_((~finite).any())
            factor = 1 / tracked.clamp_min(1)[:, None] if self.momentum is None else self.momentum
            for name, new in (("running_mean", mean), ("running_var", unbiased)):
                held = self._all(name)
                moved = torch.where(ok[:, None], held + factor * (new.to(held.dtype) - held), held)
                getattr(self, name).copy_(moved[0])
                getattr(self.extra, name.removeprefix("running_")).copy_(moved[1:])
            self.num_batches_tracked.copy_(tracked[0])
            self.extra.tracked.copy_(tracked[1:])

    def _parts(self) -> list[tuple[str, Tensor]]:
        return [*self.extra.named_buffers(), *self.extra.named_parameters()]

    def _row(self, domain: str | int) -> int:
        names = self._sets
        if isinstance(domain, int) and 0 <= domain < len(names):
            return domain
        if domain not in names:
            raise UnknownName(f"set of {self.where}", str(domain), names)
        return names.index(str(domain))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if not any(key.startswith(f"{prefix}extra.") for key in state_dict):
            rows = len(self._sets) - 1
            for name, tensor in self._parts():
                source = state_dict.get(prefix + OWN.get(name, name))
                if source is None and name == "tracked":
                    source = (
                        self.num_batches_tracked
                    )  # written before torch counted batches, and torch asks for no count
                if source is not None:
                    state_dict[f"{prefix}extra.{name}"] = source.detach().expand(rows, *tensor.shape[1:]).clone()
        super()._load_from_state_dict(state_dict, prefix, *rest)


class PerDomain(Sets):
    """Every sample is normalised as its own domain is: `layer(x, ids)` with ids (N,), numbers or names of domains.

    In training a domain's part of the batch is normalised by its own moments, by its own affine parameters, and moves its own
    statistics; a mixed batch takes one pass. A domain with one value per channel is normalised by the statistics it holds.
    With one domain, or within a model that `WithDomains` wraps, `ids` may be left out.

    `add_`, `drop_`, `domain` and `set_` make, forget, save and write one domain.
    Raises UsageError for domains that are no number above 0 and no distinct names; on a call BatchError for ids that do not
    match the batch or are out of range, and UnknownName for a name that no domain has.

    DSBN: Chang et al. 2019, with ids per sample instead of per batch.
    """

    name: ClassVar[str] = "per_domain"
    cites: ClassVar[str] = (
        "@inproceedings{chang2019dsbn, title={Domain-Specific Batch Normalization for Unsupervised Domain Adaptation}, "
        "author={Chang, Woong-Gi and You, Tackgeun and Seo, Seonguk and Kwak, Suha and Han, Bohyung}, booktitle={CVPR}, "
        "year={2019}}"
    )

    def __init__(self, num_features: int, *, domains: int | Sequence[str] = 1, **common: Any) -> None:
        names = [str(i) for i in range(domains)] if isinstance(domains, int) else [str(name) for name in domains]
        if not names or len(set(names)) < len(names):
            raise UsageError(f"domains is their number, 1 or more, or a list of distinct names; got {domains!r}.")
        super().__init__(num_features, names, **common)

    @property
    def domains(self) -> tuple[str, ...]:
        """The names of the domains."""
        return tuple(self._sets)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, domains={list(self._sets)}"

    def add_(self, name: str, *, like: str | int = 0) -> None:
        """Make a domain that starts as a copy of `like`; optimizers must be told of the new parameters.

        Raises UsageError where a domain has this name already.
        """
        if name in self._sets:
            raise UsageError(f"{self.where} has a domain {name!r} already; drop it first, or choose another name.")
        copied = self.domain(like)
        rows = {part: torch.cat([tensor.detach(), copied[part][None]]) for part, tensor in self._parts()}
        self._sets.append(str(name))
        self._write_rows(rows)

    def drop_(self, name: str | int) -> None:
        """Forget a domain.

        Raises UsageError for the first, which stands under torch's own keys, or the only one.
        """
        row = self._row(name)
        if row == 0:
            raise UsageError(
                f"{self.where} keeps its first domain, {self._sets[0]!r}, under torch's own names, and cannot drop it; "
                "write another domain's tensors to it with `set_`, then drop that one."
            )
        rows = {part: torch.cat([tensor.detach()[: row - 1], tensor.detach()[row:]]) for part, tensor in self._parts()}
        del self._sets[row]
        self._write_rows(rows)

    def plain(self, domain: str | int | None = None) -> BatchNormTensors:
        """The batch norm that one domain has; with several it must be named."""
        if domain is None and len(self._sets) > 1:
            raise UsageError(
                f"{self.where} holds {len(self._sets)} domains ({', '.join(self._sets)}), and one batch norm was asked for; "
                "say which it is to be with domain=."
            )
        if domain is None or not self._row(domain):
            return super().plain()
        held = self.domain(domain)
        affine = [nn.Parameter(held[part]) if part in held else None for part in ("weight", "bias")]
        return BatchNormTensors(held["mean"], held["var"], held["tracked"], *affine)

    def domain(self, name: str | int) -> dict[str, Tensor]:
        """Copies of one domain's tensors: mean, var and tracked, weight and bias unless there are none."""
        row = self._row(name)
        if row:
            return {part: tensor.detach()[row - 1].clone() for part, tensor in self._parts()}
        return {part: getattr(self, OWN.get(part, part)).detach().clone() for part, _ in self._parts()}

    def set_(self, name: str | int, tensors: Mapping[str, Tensor]) -> None:
        """Write what `domain` gave, to this domain."""
        row = self._row(name)
        with torch.no_grad():
            for part, tensor in self._parts():
                (tensor[row - 1] if row else getattr(self, OWN.get(part, part))).copy_(tensors[part])

    def _write_rows(self, rows: Mapping[str, Tensor]) -> None:
        for part, tensor in self._parts():
            if isinstance(tensor, nn.Parameter):
                setattr(self.extra, part, nn.Parameter(rows[part], requires_grad=tensor.requires_grad))
            else:
                setattr(self.extra, part, rows[part])

    def _default(self, x: Tensor) -> Tensor:
        if len(self._sets) > 1:
            raise UsageError(
                f"{self.where} has {len(self._sets)} domains and was not told which sample is of which: call it with ids, "
                "or wrap the model in `renorm.layers.WithDomains`."
            )
        return torch.zeros(x.shape[0], dtype=torch.long, device=x.device)


OWN = {"mean": "running_mean", "var": "running_var", "tracked": "num_batches_tracked"}


class Domains:
    """The domains of the samples of the batch that is under way, shared by the layers of a model.

    Written before every forward and never cleared: gradient checkpointing reads it again in the backward pass.
    """

    def __init__(self) -> None:
        self.ids: Ids | None = None


class WithDomains(nn.Module):
    """`model` with one argument more, `domains`: the domain of each sample, as its layers take `ids`.

    Raises UsageError where the model holds no layer with several sets of statistics.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._current = Domains()
        layers = [module for module in model.modules() if isinstance(module, Sets)]
        if not layers:
            raise UsageError(
                f"{type(model).__name__} holds no layer to tell domains to; "
                'make some with `convert_(model, to="per_domain", domains=…)`.'
            )
        for layer in layers:
            layer.current = self._current

    def forward(self, *args: Any, domains: Ids | None = None, **kwargs: Any) -> Any:
        self._current.ids = domains
        return self.model(*args, **kwargs)
