"""The processes of one run: how they exchange tensors, and what each one's batch norms hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from renorm.errors import UsageError
from renorm.moments import Moments, as_float64
from renorm.sites import Site

__all__ = ["exchange", "meeting_place", "of_files", "of_group", "world"]

Statistics = dict[str, Moments]


def world() -> int:
    """How many processes run together; 1 without torch.distributed."""
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def meeting_place() -> torch.device:
    """Where this process group exchanges tensors."""
    if torch.distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def exchange(mine: Tensor) -> list[Tensor]:
    """The tensor that each rank passed, in their order; every rank calls this, with tensors of one shape and type."""
    mine = mine.to(meeting_place()).contiguous()
    ranks = [torch.empty_like(mine) for _ in range(world())]
    torch.distributed.all_gather(ranks, mine)
    return ranks


def of_group(sites: Sequence[Site]) -> list[Statistics]:
    """What the batch norms of each rank hold, in the order of the ranks; every rank calls this, with the same model.

    Raises UsageError without a group of several processes.
    """
    if world() < 2:
        raise UsageError(
            'ranks="group" compares what the processes of a torch.distributed group hold, and there is no group of several. '
            "Call it on every rank of a run, or give the ranks' checkpoints."
        )
    held = {site.name: tensors for site in sites if (tensors := site.tensors) is not None}
    flat = torch.cat([torch.zeros(1), *(as_float64(t.detach()).cpu() for pair in held.values() for t in pair)]).double()
    found = []
    for rank in exchange(flat):
        parts = iter(torch.split(rank.cpu()[1:], [t.numel() for pair in held.values() for t in pair]))
        found.append({name: Moments(1.0, next(parts), next(parts)) for name in held})
    return found


def of_files(sites: Sequence[Site], files: Sequence[Mapping[str, Tensor]]) -> list[Statistics]:
    """What the batch norms of `sites` hold, and then those in the files of other ranks; what is the same counts once.

    Raises UsageError for a file of another model.
    """
    own = {
        s.name: Moments(1.0, *map(as_float64, _cpu(s.tensors)))
        for s in sites
        if s.tensors is not None and s.slot is None
    }
    found = [own]
    for number, file in enumerate(files):
        held = dict(_in_file(own, file, number))
        if not any(_same(held, other) for other in found):
            found.append(held)
    return found


def _in_file(own: Statistics, file: Mapping[str, Tensor], number: int) -> Iterator[tuple[str, Moments]]:
    for name, moments in own.items():
        mean, var = (file.get(f"{name}.{key}".lstrip(".")) for key in ("running_mean", "running_var"))
        if mean is None or var is None:
            continue  # BN201 is about files without statistics
        if mean.shape != moments.mean.shape or var.shape != moments.var.shape:
            raise UsageError(
                f"the checkpoints of ranks are of one model, and file {number + 1} has {mean.numel()} channels at "
                f"{name or 'the model itself'!r} where the model has {moments.mean.numel()}. Give those of one run."
            )
        yield name, Moments(1.0, *map(as_float64, _cpu((mean, var))))


def _cpu(tensors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    mean, var = (t.detach().cpu().clone() for t in tensors)
    return mean, var


def _same(one: Statistics, other: Statistics) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[n].mean, other[n].mean) and torch.equal(one[n].var, other[n].var) for n in one
    )
