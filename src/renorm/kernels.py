"""Measure a tensor, then apply one scale and shift per channel: the operation that every layer is made of.

A layer states its rule for vectors of a channel's size, `centre, scale, bias = rule(mean, var, …)`; the exact gradient
follows. Forward and backward read the values about as often as `nn.BatchNorm2d` does, by torch's own kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from renorm.moments import image_means

Rule = Callable[..., tuple[Tensor, Tensor, Tensor | None]]


def normalised(x: Tensor, rule: Rule, *vectors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`(x − centre) · scale + bias` in the dtype of `x`, and the mean and biased variance of each channel of `x`.

    `centre, scale, bias = rule(mean, var, *vectors)`, a function of its arguments alone: it runs again in the backward pass.
    Gradients flow to x, also through its moments, and to the vectors; none flows through the moments that are returned,
    which are float64 for float64 values, else float32. Shapes: x (N, C, *), all of the rule's (C,).
    """
    if torch.compiler.is_compiling() or x.device.type not in ("cpu", "cuda"):
        return composed(x, rule, *vectors)  # a compiler fuses these by itself
    y, mean, var = _Normalised.apply(rule, x, *vectors)
    return y, mean, var


def composed(x: Tensor, rule: Rule, *vectors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`normalised` in plain operations: slower, and differentiable any number of times."""
    values = x.to(wide(x))
    var, mean = torch.var_mean(values, all_but_channels(x), correction=0)
    centre, scale, bias = rule(mean, var, *vectors)
    y = (values - channels(centre, x)) * channels(scale, x)
    if bias is not None:
        y = y + channels(bias, x)
    return y.to(x.dtype), mean.detach(), var.detach()


def by_constants(x: Tensor, centre: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """`(x − centre) · scale + bias` for vectors that need no gradient: half the passes backward, and x is not kept."""
    return cast(Tensor, _ByConstants.apply(x, centre, scale, bias))


def weighed(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, each position counted by its weight, which is held constant.

    Values of weight 0 count for nothing, even where they are not finite; the moments are 0 and 0 where all weights are 0.
    Shapes: x (N, C, *), weight (N, 1, *) → (C,), (C,).
    """
    dims = all_but_channels(x)
    total = weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)
    values = torch.where(weight > 0, x, 0.0).to(wide(x))
    mean = (values * weight).sum(dims) / total
    centred = values - channels(mean, x)
    return mean, (centred.square() * weight).sum(dims) / total


def by_image(x: Tensor) -> Tensor:
    """Every image's channels as channels of one image: (N, C, *) → (1, N·C, *), a view where `x` is contiguous."""
    return x.reshape(1, x.shape[0] * x.shape[1], *(x.shape[2:] or (1,)))


def from_images(y: Tensor, x: Tensor) -> Tensor:
    """`y`, made of `by_image(x)`, in the shape of `x` and, for images with channels last, in that layout."""
    y = y.view(x.shape)
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return y.contiguous(memory_format=torch.channels_last) if last else y


def affine_by_image(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`x · scale + shift` with a row of each for every image, in the dtype of `x`, by the kernel that suits its layout.

    Shapes: x (N, C, *), scale and shift (N, C) → (N, C, *).
    """
    if x.dim() > 2 and x.is_contiguous() and not torch.compiler.is_compiling():
        scale, shift = scale.flatten(), shift.flatten()
        return _scaled(by_image(x), torch.zeros_like(scale), scale, shift).view(x.shape)
    # in one pass where channels come last; batch norm's kernel would want a copy first
    rows = (*scale.shape, *[1] * (x.dim() - 2))
    return torch.addcmul(shift.view(rows), x, scale.view(rows)).to(x.dtype)


def pooled(mean: Tensor, var: Tensor, groups: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of each group of images, from those of the images, which hold equally many positions.

    Shapes: mean and var (N, C), groups (N,) in [0, number) → (number, C), (number, C) and the images of each group (number,).
    The moments of a group without images are 0.
    """
    images = torch.zeros(number, dtype=mean.dtype, device=mean.device)
    images = images.index_add(0, groups, torch.ones_like(groups, dtype=mean.dtype))
    share = images.clamp_min(1)[:, None]
    none = torch.zeros((number, mean.shape[1]), dtype=mean.dtype, device=mean.device)
    means = none.index_add(0, groups, mean) / share
    within = var + (mean - means[groups]).square()
    return means, none.index_add(0, groups, within) / share, images


def means_of_images(x: Tensor) -> Tensor:
    """Mean of every sample and channel over positions, without gradient: in bfloat16 to its digits, else as `image_means`.

    Shapes: x (N, C, *) → (N, C), at least float32.
    """
    x = x.detach()
    if x.dtype is torch.bfloat16 and x.device.type == "cpu" and x.dim() > 2 and x.is_contiguous():
        flat = x.flatten(2)  # a product with ones takes a twentieth of the time that the CPU's sum takes
        return (flat @ flat.new_ones(flat.shape[2])).float() / flat.shape[2]
    return image_means(x)


def wide(x: Tensor) -> torch.dtype:
    """The dtype to count in: float64 for float64 values, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def channels(vector: Tensor, x: Tensor) -> Tensor:
    """A vector (C,) in a shape that broadcasts along dimension 1 of `x`."""
    return vector.view(1, -1, *[1] * (x.dim() - 2))


def all_but_channels(x: Tensor) -> list[int]:
    """The dimensions of `x` (N, C, *) besides the second."""
    return [d for d in range(x.dim()) if d != 1]


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass, as gradient checkpointing does to make activations again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _Normalised(torch.autograd.Function):
    """`normalised`, by the kernels that batch norm is made of."""

    @staticmethod
    def forward(rule: Rule, x: Tensor, *vectors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        scratch = x.new_zeros((2, x.shape[1]), dtype=wide(x))  # its dtype is the one that the kernel answers in
        mean, var = torch.batch_norm_update_stats(x, scratch[0], scratch[1], 0.0)
        centre, scale, bias = rule(mean, var, *vectors)
        bias = torch.zeros_like(scale) if bias is None else bias
        return _affine(x, centre, scale, bias), mean, var

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.rule, x, *vectors = inputs
        _, mean, var = output
        ctx.mark_non_differentiable(mean, var)
        ctx.save_for_backward(x, mean, var, *vectors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, mean, var, *vectors = ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        if torch.is_grad_enabled():  # a second derivative is asked for, or torch.func asks
            return _by_composition(ctx.rule, grad, x, vectors, wanted)
        with torch.enable_grad():
            mean, var = mean.detach().requires_grad_(), var.detach().requires_grad_()
            leaves = [None if v is None else v.detach().requires_grad_(i in wanted) for i, v in enumerate(vectors)]
            centre, scale, bias = ctx.rule(mean, var, *leaves)
            centre, scale = centre.to(mean.dtype), scale.to(mean.dtype)
        total, slope = _sums(grad, x, centre.detach())
        asked = [mean, var, *(leaves[i] for i in wanted)]
        given = [(centre, -scale.detach() * total), (scale, slope)]
        given += [] if bias is None else [(bias, total.to(bias.dtype))]
        given = [(out, g) for out, g in given if out.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(asked)
        if given:
            found = torch.autograd.grad([o for o, _ in given], asked, [g for _, g in given], allow_unused=True)
        grads: list[Tensor | None] = [None] * len(vectors)
        for i, g in zip(wanted, found[2:], strict=True):
            grads[i] = g
        through = _through(x, grad, mean.detach(), centre.detach(), scale.detach(), *found[:2])
        return None, through, *grads


class _ByConstants(torch.autograd.Function):
    """`by_constants`."""

    @staticmethod
    def forward(x: Tensor, centre: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return _affine(x, centre, scale, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        return _affine(grad, torch.zeros_like(scale), scale, torch.zeros_like(scale)), None, None, None


def _affine(x: Tensor, centre: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """`(x − centre) · scale + bias` in one pass."""
    kind = wide(x)
    return _scaled(x, centre.to(kind), scale.to(kind), bias.to(kind))


def _scaled(x: Tensor, centre: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The kernel of a batch norm with a variance of 1 and no eps, which `F.batch_norm` refuses in some versions of torch."""
    ones, cudnn = torch.ones_like(centre), torch.backends.cudnn.enabled
    return torch.batch_norm(x, scale, bias, centre, ones, False, 0.0, 0.0, cudnn)


def _sums(grad: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over all but channels of `grad` and of `grad · (x − centre)`, in one pass."""
    ones = torch.ones_like(centre)
    # given twice: on the processor the kernel reads the running statistics here, on a GPU those saved by the forward
    _, slope, total = torch.ops.aten.native_batch_norm_backward(
        grad, x, ones, centre, ones, centre, ones, False, 0.0, [False, True, True]
    )
    return total, slope


def _through(
    x: Tensor, grad: Tensor, mean: Tensor, centre: Tensor, scale: Tensor, of_mean: Tensor | None, of_var: Tensor | None
) -> Tensor:
    """The gradient of x: through the values, and through the mean and variance, which every value has a part in."""
    if of_mean is None and of_var is None:
        return _affine(grad, torch.zeros_like(scale), scale, torch.zeros_like(scale))
    count = x.numel() // x.shape[1]
    offset = torch.zeros_like(mean) if of_mean is None else of_mean / count
    slope = torch.zeros_like(mean) if of_var is None else of_var * (2 / count)
    around = torch.where(torch.isfinite(mean), mean, centre)  # nothing flows to moments that are not finite
    rest = _affine(x, around, slope, offset)
    if x.dtype in (torch.float32, torch.float64):
        return rest.addcmul_(grad, channels(scale, x))
    return rest.add_(_affine(grad, torch.zeros_like(scale), scale, torch.zeros_like(scale)))  # scale keeps its digits


def _by_composition(
    rule: Rule, grad: Tensor, x: Tensor, vectors: list[Tensor | None], wanted: list[int]
) -> tuple[Tensor | None, ...]:
    def of(x: Tensor, *moving: Tensor) -> Tensor:
        given = list(vectors)
        for i, vector in zip(wanted, moving, strict=True):
            given[i] = vector
        return composed(x, rule, *given)[0]

    moving = [v for i in wanted if (v := vectors[i]) is not None]
    of_x, *found = torch.func.vjp(of, x, *moving)[1](grad)
    grads: list[Tensor | None] = [None] * len(vectors)
    for i, g in zip(wanted, found, strict=True):
        grads[i] = g
    return None, of_x, *grads
