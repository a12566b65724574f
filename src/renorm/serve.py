"""Serve many adapters at once: a batch whose samples belong to different domains, in one forward of one base."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn

from renorm.adapters import head_of, load_adapter_
from renorm.calls import Caller, Output, Result, read
from renorm.errors import BatchError, UnknownName, UsageError
from renorm.kernels import affine_by_image
from renorm.layers.per_domain import Domains
from renorm.sites import Site, device_of, find_sites, unwrap, walk

FEW_NUMBERS = 1 << 22  # of gathered head weights; above it each domain's part of the batch is multiplied by itself
AGREE = 1e-5  # of the largest value: how far a fast way may be from the layer itself on the probe


def serve_adapters(
    model: nn.Module, adapters: Mapping[str, str | os.PathLike[str]], *, output: Output | None = None
) -> Served:
    """A module that answers each sample as the model with its domain's adapter does: `served(x, domains=[name, …])`.

    adapters  {name of a domain: file of `save_adapter`}, all for this base
    output    which leaf of the model's output is the logits, as in `evaluate`; asked only where class counts differ

    `model` itself is not touched, and there is nothing to restore: its weights are shared, its norm layers and head are not.
    At each norm site every sample gets the scale and shift of its domain; the head is applied by domain.
    Raises UsageError without adapters, for adapters with other heads than the first, and for layers that cannot tell samples
    apart: batch norms that hold no statistics, or several sets of them; CheckpointError for a file that is no adapter of
    this base.
    """
    if not adapters:
        raise UsageError("serve_adapters was given no adapters; pass {name of a domain: file}.")
    head = head_of(next(iter(adapters.values())))
    work = _copy(unwrap(model), head).eval()
    states: dict[str, list[dict[str, Tensor]]] = {site.name: [] for site in _outside(work, head)}
    heads: list[list[nn.Module]] = []
    outputs: list[int | None] = []
    for domain, path in adapters.items():
        adapter = load_adapter_(work, path)
        if adapter.head != head:
            raise UsageError(
                f"the adapter of {domain!r} has its head at {adapter.head}, that of {next(iter(adapters))!r} at {head}; "
                "serve those with one head together."
            )
        for site in _outside(work, head):
            states[site.name].append(_state(site.module))
        heads.append([deepcopy(work.get_submodule(name)) for name in head])
        outputs.append(adapter.outputs)
        adapter.restore_()
    current = Domains()
    for site in _outside(work, head):
        work = _replaced(work, site.module, _per_sample(site, states[site.name], current))
    for name, *each in zip(head, *heads, strict=True):
        work = _replaced(work, work.get_submodule(name), _Heads(each, outputs, current))
    classes = dict(zip(adapters, outputs, strict=True))
    return Served(work, classes, current, Caller(output=output), across=_across(heads[0]))


class Served(nn.Module):
    """What `serve_adapters` gives; in evaluation always.

    classes   {name of a domain: how many outputs its head has, None where that cannot be told}
    """

    def __init__(
        self, model: nn.Module, classes: Mapping[str, int | None], current: Domains, caller: Caller, *, across: int
    ) -> None:
        super().__init__()
        self.model = model
        self.classes: dict[str, int | None] = dict(classes)
        self._current = current
        self._caller = caller
        self._across = across
        self.train(False)

    @property
    def domains(self) -> tuple[str, ...]:
        """The names that a sample's domain may have."""
        return tuple(self.classes)

    def forward(self, *args: Any, domains: Sequence[str] | Tensor, **kwargs: Any) -> Any:
        """The model's output; where domains differ in classes a list, for each sample the logits of its own classes.

        domains   the name of each sample's domain, or as a tensor (N,) the places of these names in `.domains`, as `ids` gives
        Raises BatchError for an empty batch or another number of domains than samples, UnknownName for a domain that is not
        served, UsageError where classes differ and nothing says which part of the output is the logits.
        """
        ids = domains if isinstance(domains, Tensor) else self.ids(domains)
        samples = read(args[0] if args else kwargs).samples
        if samples != len(ids) or not samples:
            raise BatchError(
                f"a batch of {samples} samples came with {len(ids)} domains; give at least one sample, and for each the name "
                "of its domain."
            )
        self._current.ids = ids
        output = self.model(*args, **kwargs)
        counts = list(self.classes.values())
        if len(set(counts)) == 1:
            return output
        found = Result(output, self._caller.find(output), None, samples)
        logits = self._caller.logits(found, asked="serving domains that differ in classes")
        across = self._across - 1 if self._across > 0 else self._across
        return [each.narrow(across, 0, counts[i] or 0) for each, i in zip(logits, ids.tolist(), strict=True)]

    def ids(self, domains: Sequence[str]) -> Tensor:
        """The places of these names in `.domains`, where the model is. Raises UnknownName for one that is not served."""
        places = {name: place for place, name in enumerate(self.classes)}
        unknown = [name for name in domains if name not in places]
        if unknown:
            raise UnknownName("domain", str(unknown[0]), self.domains)
        return torch.tensor([places[name] for name in domains], dtype=torch.long, device=device_of(self.model))

    def train(self, mode: bool = True) -> Served:
        """Nothing: what is served is evaluated."""
        return super().train(False)


class _PerSample(nn.Module):
    """A norm layer whose every sample has the tensors of its own domain; what it holds has a row for each."""

    def __init__(self, name: str, rows: Mapping[str, Tensor], current: Domains) -> None:
        super().__init__()
        self.name = name
        self.current = current
        self.keys = tuple(rows)
        for key, tensor in rows.items():
            self.register_buffer(f"rows_{key.replace('.', '_')}", tensor)

    def rows(self) -> dict[str, Tensor]:
        """What is held, a row for each domain."""
        return {key: getattr(self, f"rows_{key.replace('.', '_')}") for key in self.keys}

    def of_each(self, x: Tensor) -> Tensor:
        """The domain of each sample of `x`. Raises BatchError where its first dimension does not hold the samples."""
        ids = cast(Tensor, self.current.ids)
        if x.shape[0] != len(ids):
            raise BatchError(
                f"{self.name!r} was given a tensor of shape {tuple(x.shape)} for a batch of {len(ids)} samples: which row is "
                "of which sample cannot be told, so this model's adapters have to be served one domain at a time."
            )
        return ids


class _Affine(_PerSample):
    """A layer that is, in evaluation, one scale and shift per channel after what all domains share."""

    def __init__(self, site: Site, inner: nn.Module, scale: Tensor, shift: Tensor, current: Domains) -> None:
        super().__init__(site.name, {"scale": scale, "shift": shift}, current)
        self.inner = inner  # normalises a sample by itself; nothing for batch norm
        self.act = getattr(site.module, "act", None)
        self.axis = site.axis

    def forward(self, x: Tensor) -> Tensor:
        ids = self.of_each(x)
        scale, shift = (rows[ids] for rows in self.rows().values())
        x = self.inner(x)
        if self.axis == 1:
            y = affine_by_image(x, scale, shift)
        else:
            form = (len(ids), *[1] * (x.dim() - scale.dim()), *scale.shape[1:])
            y = torch.addcmul(shift.view(form), x, scale.view(form)).to(x.dtype)
        return y if self.act is None else cast(Tensor, self.act(y))


class _Mapped(_PerSample):
    """Any norm layer, mapped over the samples with the tensors of each: slower, and asks nothing of it."""

    def __init__(self, site: Site, rows: Mapping[str, Tensor], current: Domains) -> None:
        super().__init__(site.name, rows, current)
        self.norm = deepcopy(site.module)

    def forward(self, x: Tensor) -> Tensor:
        ids = self.of_each(x)
        own = {key: rows[ids] for key, rows in self.rows().items()}

        def one(sample: Tensor, tensors: dict[str, Tensor]) -> Tensor:
            y: Tensor = torch.func.functional_call(self.norm, tensors, (sample[None],))
            return y[0]

        return torch.func.vmap(one)(x, own)


class _Heads(nn.Module):
    """The heads of all domains; where they differ in outputs the missing ones are −inf, until `Served` leaves them out."""

    weight: Tensor
    bias: Tensor

    def __init__(self, heads: Sequence[nn.Module], outputs: Sequence[int | None], current: Domains) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.current = current
        self.most = max((count or 0 for count in outputs), default=0)
        self.differ = len(set(outputs)) > 1
        self.across = _across(heads)
        linear = [head for head in heads if type(head) is nn.Linear]
        self.linear: bool = len(linear) == len(heads)
        if self.linear:
            self.register_buffer("weight", torch.stack([self._filled(h.weight.detach(), 0.0) for h in linear]))
            biases = [h.weight.new_zeros(len(h.weight)) if h.bias is None else h.bias.detach() for h in linear]
            self.register_buffer("bias", torch.stack([self._filled(b, -torch.inf) for b in biases]))

    def _filled(self, tensor: Tensor, value: float, dim: int = 0) -> Tensor:
        """With as many outputs as the head that has most."""
        missing = self.most - tensor.shape[dim]
        if not self.differ or missing <= 0:
            return tensor
        form = list(tensor.shape)
        form[dim] = missing
        return torch.cat([tensor, tensor.new_full(form, value)], dim)

    def forward(self, x: Tensor) -> Tensor:
        ids = cast(Tensor, self.current.ids)
        if self.linear and (torch.compiler.is_compiling() or self.weight[0].numel() * len(ids) <= FEW_NUMBERS):
            rows = x.reshape(len(ids), -1, x.shape[-1])
            y = rows @ self.weight[ids].transpose(1, 2).to(x.dtype) + self.bias[ids][:, None].to(x.dtype)
            return y.view(*x.shape[:-1], -1)
        parts = {place: ids == place for place in torch.unique(ids).tolist()}
        made = {place: self._filled(self.heads[place](x[own]), -torch.inf, self.across) for place, own in parts.items()}
        y = next(iter(made.values()))
        y = y.new_empty((len(ids), *y.shape[1:]))
        for place, own in parts.items():
            y[own] = made[place]
        return y


def _across(heads: Sequence[nn.Module]) -> int:
    """The dimension of a head's output that holds the classes: 1 after a convolution, else the last."""
    last = [m for m in heads[0].modules() if m._parameters] if heads else []
    return 1 if last and isinstance(last[-1], nn.Conv1d | nn.Conv2d | nn.Conv3d) else -1


def _copy(model: nn.Module, head: Sequence[str]) -> nn.Module:
    """A model of its own modules, norm layers and head, that shares every other tensor."""
    norms = [site.module for site in find_sites(model)]
    heads = [module for name, module in walk(model) if name in head]
    own = {id(t) for module in (*norms, *heads) for t in (*module.parameters(), *module.buffers())}
    shared = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in own}
    return deepcopy(model, cast(Any, shared))


def _outside(model: nn.Module, head: Sequence[str]) -> list[Site]:
    """The norm layers that are not part of the head. Raises UsageError for one that cannot serve several domains."""
    found = [s for s in find_sites(model) if not any(s.name == n or s.name.startswith(f"{n}.") for n in head)]
    for site in found:
        several = site.slot is not None
        if several or (site.kind == "batch" and site.tensors is None):
            why = "several sets of statistics already" if several else "no statistics, so that samples would mix"
            raise UsageError(
                f"the layer at {site.name!r} holds {why}; adapters of this model cannot be served in one batch."
            )
    return found


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Copies of what a norm layer holds, without its count of batches."""
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {key: t.detach().clone() for key, t in held.items() if t.dim()}


def _replaced(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """`root` with `new` wherever `old` stood; `new` itself where `old` is the root."""
    for _, parent in list(walk(root)):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new
    return new if root is old else root


def _per_sample(site: Site, rows: Sequence[Mapping[str, Tensor]], current: Domains) -> nn.Module:
    """The layer for all domains: the fast way where a probe shows that it is the same, else the general one."""
    stacked = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    general = _Mapped(site, stacked, current)
    fast = _fast(site, stacked, current)
    return fast if fast is not None and _alike(fast, general, site, len(rows)) else general


def _fast(site: Site, rows: Mapping[str, Tensor], current: Domains) -> _Affine | None:
    """The layer as a scale and shift; None where what it holds does not look like that."""
    module = site.module
    if any(key not in ("act", "drop") for key, _ in module.named_children()):
        return None
    known = {"weight", "bias", "running_mean", "running_var"}
    if not set(rows) <= known or (site.kind != "batch" and "weight" not in rows):
        return None
    if site.kind == "batch":
        mean, var = rows["running_mean"].double(), rows["running_var"].double()
        scale = torch.rsqrt(var + site.eps) * rows.get("weight", torch.ones_like(mean))
        shift = rows.get("bias", torch.zeros_like(mean)) - mean * scale
        kind = rows["running_mean"].dtype
        return _Affine(site, nn.Identity(), scale.to(kind), shift.to(kind), current)
    inner = deepcopy(module)
    if isinstance(getattr(inner, "act", None), nn.Module):
        cast(Any, inner).act = nn.Identity()
    for key, value in (("weight", 1.0), ("bias", 0.0)):
        if key in rows:
            getattr(inner, key).data.fill_(value)
    weight = rows["weight"]
    return _Affine(site, inner, weight, rows.get("bias", torch.zeros_like(weight)), current)


def _alike(fast: nn.Module, general: nn.Module, site: Site, domains: int) -> bool:
    """Whether both give the same for values in some shape that the layer takes."""
    generator = torch.Generator().manual_seed(0)
    held = next(iter(cast(_PerSample, fast).rows().values()))
    cast(_PerSample, fast).current.ids = torch.arange(domains, device=held.device)
    form = held.shape[1:]
    for places in ((3, 3), (), (3,), (2, 2, 2)):
        shape = (*form, *places) if site.axis == 1 else (*places, *form)
        x = torch.randn(domains, *shape, generator=generator).to(held)
        try:
            with torch.no_grad():
                wanted, got = general(x), fast(x)
        except (ValueError, RuntimeError, IndexError):
            continue  # another rank
        return bool((got - wanted).abs().max() <= AGREE * (1 + wanted.abs().max()))
    return False
