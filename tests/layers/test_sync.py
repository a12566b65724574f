"""Sync: two processes with batches of different size are one process with both."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from renorm.surgery import convert_
from tests.layers.catalogue import images, lived

SIZES = (5, 3)


def parts() -> list[Tensor]:
    return list(images(sum(SIZES), 4, 3, 2, dtype=torch.float64).split(SIZES))


def score(y: Tensor, offset: int) -> Tensor:
    return (y * torch.linspace(-1, 1, 8 * 24, dtype=y.dtype)[offset * 24 : offset * 24 + y.numel()].view(y.shape)).sum()


def work(rank: int, meeting: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(meeting, 2), rank=rank, world_size=2)
    layer, x = lived("sync", dtype=torch.float64, act="relu"), parts()[rank].requires_grad_()
    y = layer(x)
    score(y, rank * SIZES[0]).backward()
    alone = lived("sync", dtype=torch.float64)
    alone(torch.ones(1, 4, 1, 1, dtype=torch.float64) * rank)  # one value here, two in all
    kept = {"y": y.detach(), "x": x.grad, "of_weight": layer.weight.grad, "alone": alone.running_mean}
    torch.save({**kept, **{k: v for k, v in layer.state_dict().items()}}, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_are_one_with_both_batches(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path / "meeting"), str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    layer, x = lived("batch", dtype=torch.float64, act="relu"), torch.cat(parts()).requires_grad_()
    y = layer(x)
    score(y, 0).backward()
    torch.testing.assert_close(torch.cat([f["y"] for f in found]), y.detach())
    torch.testing.assert_close(torch.cat([f["x"] for f in found]), x.grad)
    torch.testing.assert_close(found[0]["of_weight"] + found[1]["of_weight"], layer.weight.grad)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(found[0][key], found[1][key])
        torch.testing.assert_close(found[0][key], getattr(layer, key))
    other = lived("batch", dtype=torch.float64)
    other(torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1).expand(2, 4, 1, 1))
    torch.testing.assert_close(found[0]["alone"], other.running_mean)


def test_torchs_sync_goes_both_ways_without_losing_an_activation() -> None:
    timm = pytest.importorskip("timm.layers")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), timm.BatchNormAct2d(4), nn.SyncBatchNorm(4)).eval()
    x = images(4, 3, 6, 6)
    wanted = model(x)
    first = copy.deepcopy(model)
    convert_(model, "sync")
    assert isinstance(model[1].act, nn.ReLU)
    torch.testing.assert_close(model(x), wanted)
    convert_(model, "batch")
    assert [type(m).__name__ for m in model[1:]] == ["BatchNorm", "BatchNorm"]
    torch.testing.assert_close(model.train()(x), first.train()(x))
    torch.testing.assert_close(nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()(x), model(x))  # ours stay
