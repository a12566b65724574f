"""Which channel is where: labels that follow a tensor through views, copies and means, or are refused."""

from __future__ import annotations

import torch
from torch import Tensor

from renorm.graph import Layout, Operation, Place

__all__ = ["COPIES", "MEANS", "carried", "channels_of", "keeps_constants", "numbered", "shrunk", "spread"]

COPIES = ("clone", "contiguous", "_to_copy")
MEANS = ("mean", "avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d")


def keeps_constants(operation: Operation) -> bool:
    """Whether the mean of a constant is that constant: no zeros are counted in."""
    args = operation.args
    padded = args.get("padding", 0)
    zeros = any(padded) if isinstance(padded, list | tuple) else bool(padded)
    return args.get("divisor_override") is None and (not zeros or args.get("count_include_pad", True) is False)


def _axes(operation: Operation, rank: int) -> list[int]:
    """The dimensions that a mean is taken over."""
    if operation.name == "mean":
        dims = operation.args.get("dim")
        return list(range(rank)) if not dims else [d % rank for d in ([dims] if isinstance(dims, int) else dims)]
    return list(range(2, rank))


def shrunk(labels: Tensor, operation: Operation) -> Tensor | None:
    """The labels of what a copy or mean gives, from those of what it reads; None where it mixes channels."""
    size = operation.writes[0].layout.size
    if operation.name in COPIES:
        return labels
    axes = _axes(operation, labels.dim())
    one = labels
    for axis in axes:
        one = one.narrow(axis, 0, 1)
    if not bool((labels == one).all()):
        return None
    dropped = operation.name == "mean" and not operation.args.get("keepdim", False)
    for axis in sorted(axes, reverse=True) if dropped else ():
        one = one.squeeze(axis)
    return one.expand(size)


def spread(labels: Tensor, operation: Operation) -> Tensor | None:
    """The labels of what a mean reads, from those of what it gives; None where neighbours differ."""
    size = operation.args["self"].layout.size
    axes = _axes(operation, len(size))
    if operation.name == "mean" and not operation.args.get("keepdim", False):
        for axis in sorted(axes):
            labels = labels.unsqueeze(axis)
    one = labels
    for axis in axes:
        one = one.narrow(axis, 0, 1)
    return one.expand(size) if bool((labels == one).all()) else None


def numbered(channels: int, layout: Layout, axis: int) -> Tensor:
    """The channel number of every element of a tensor of this size."""
    shape = [1] * len(layout.size)
    shape[axis] = channels
    return torch.arange(channels, dtype=torch.int32).reshape(shape).expand(layout.size)


def carried(read: Place, written: Place, labels: Tensor, elements: int) -> Tensor | None:
    """`labels` of a tensor as it was read, for the same memory as it was written; −1 where it was not read."""
    if read.dtype != written.dtype:
        return None
    if read.layout == written.layout:
        return labels
    if any(stride == 0 and size > 1 for size, stride in zip(read.layout.size, read.layout.stride, strict=True)):
        return None
    memory = torch.full((elements,), -1, dtype=torch.int32)
    memory.as_strided(*read.layout).copy_(labels)
    return memory.as_strided(*written.layout)


def channels_of(labels: Tensor, axis: int) -> Tensor | None:
    """The label of each channel along `axis`, −1 where it has none; None where a channel has several."""
    axis %= labels.dim()
    # along an expanded dimension all are equal: one of them is enough to look at
    thin = [slice(None) if d == axis or stride else slice(0, 1) for d, stride in enumerate(labels.stride())]
    flat = labels[tuple(thin)].movedim(axis, 0).flatten(1)
    most = flat.amax(1)
    least = torch.where(flat < 0, most[:, None], flat).amin(1)
    return most if torch.equal(most, least) else None
