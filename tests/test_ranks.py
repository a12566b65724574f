"""ranks and BN204: statistics that differ between ranks are found in files and in a group, pooled, and given back."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from renorm.doctor import Diagnosis, diagnose, diagnose_file
from renorm.errors import UsageError
from renorm.ranks import of_files
from renorm.rules.base import Finding
from renorm.sites import find_sites
from tests.contracts.photograph import differences, photograph


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    seen(model, seed=0)
    return model.eval()


def seen(model: nn.Module, *, seed: int, offset: float = 0.0, updates: int = 60) -> nn.Module:
    """The model after it saw its own share of the data in training."""
    generator = torch.Generator().manual_seed(seed)
    model.train()
    with torch.no_grad():
        for _ in range(updates):
            model(torch.randn(32, 3, 8, 8, generator=generator) + offset)
    return model.eval()


def disagreements(diagnosis: Diagnosis) -> list[Finding]:
    return [finding for finding in diagnosis.findings if finding.rule == "BN204"]


def states(*offsets: float) -> list[dict[str, Tensor]]:
    return [seen(network(), seed=9 + k, offset=offset).state_dict() for k, offset in enumerate(offsets)]


def test_a_rank_with_other_data_is_found_and_the_pool_written_and_taken_back() -> None:
    model = network()
    before = photograph(model)
    others = states(0.0, 1.5)
    found = disagreements(diagnose(model, ranks=others))
    assert [f.site for f in found] == ["1"]
    assert {f.severity for f in found} == {"warning"}
    assert "number 2" in found[0].message
    assert differences(before, photograph(model)) == []
    assert found[0].fix_ is not None
    undo = found[0].fix_(model)
    means = np.stack([s["1.running_mean"].numpy() for s in (network().state_dict(), *others)]).astype(np.float64)
    variances = np.stack([s["1.running_var"].numpy() for s in (network().state_dict(), *others)]).astype(np.float64)
    np.testing.assert_allclose(model[1].running_mean.numpy(), means.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model[1].running_var.numpy(), variances.mean(0) + means.var(0), rtol=1e-5)
    assert disagreements(diagnose(model)) == []
    undo.restore_()
    assert differences(before, photograph(model)) == []


def test_the_worst_distance_is_what_a_slow_twin_says() -> None:
    model, (other,) = network(), states(1.5)
    (found, *_) = disagreements(diagnose(model, ranks=[other]))
    held = [{k: v.double().numpy() for k, v in s.items() if v.is_floating_point()} for s in (model.state_dict(), other)]
    means, variances = ([s[f"{found.site}.{key}"] for s in held] for key in ("running_mean", "running_var"))
    mean = np.mean(means, 0)
    var = np.mean(variances, 0) + np.var(means, 0) + 1e-5
    distances = [
        np.mean(np.sqrt((m - mean) ** 2 + (np.sqrt(v + 1e-5) - np.sqrt(var)) ** 2) / np.sqrt(var))
        for m, v in zip(means, variances, strict=True)
    ]
    assert found.value == pytest.approx(max(distances), rel=1e-9)


def test_ranks_that_saw_the_same_data_agree() -> None:
    model = network()
    assert disagreements(diagnose(model, ranks=states(0.0, 0.0, 0.0))) == []
    assert disagreements(diagnose(model, ranks=[model.state_dict()])) == []
    assert disagreements(diagnose(model, ranks=[])) == []
    bare = {n: t for n, t in states(2.0)[0].items() if "running" not in n}
    assert disagreements(diagnose(model, ranks=[bare])) == []  # a file without statistics disagrees with nobody
    sick = copy.deepcopy(states(0.0)[0])
    sick["1.running_var"][0] = float("nan")
    assert [f.site for f in disagreements(diagnose(model, ranks=[sick]))] == []


def test_the_same_file_counts_once() -> None:
    model, (other,) = network(), states(1.5)
    wrapped = {f"module.{name}": tensor for name, tensor in other.items()}
    once = disagreements(diagnose(model, ranks=[other]))
    again = disagreements(diagnose(model, ranks=[other, model.state_dict(), wrapped]))
    assert [f.value for f in once] == [f.value for f in again]


def test_files_alone_are_compared(tmp_path: Path) -> None:
    for rank, state in enumerate(states(0.0, 1.5)):
        torch.save(state, tmp_path / f"rank{rank}.pt")
    found = disagreements(diagnose_file(tmp_path / "rank0.pt", ranks=[tmp_path / "rank1.pt"]))
    assert [f.site for f in found] == ["1"]
    assert all(f.fix_ is None for f in found)
    assert disagreements(diagnose_file(tmp_path / "rank0.pt", ranks=[tmp_path / "rank0.pt"])) == []


def test_what_are_no_ranks_is_refused() -> None:
    other = {name: torch.zeros(9) for name in network().state_dict()}
    with pytest.raises(UsageError, match="has 9 channels at '1' where the model has 6"):
        of_files(find_sites(network()), [other])
    with pytest.raises(UsageError, match="there is no group of several"):
        diagnose(network(), ranks="group")
    with pytest.raises(UsageError, match="ranks is a list of checkpoints"):
        diagnose(network(), ranks="rank0.pt")  # type: ignore[arg-type]


def _on_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = seen(network(), seed=rank, offset=1.5 * rank)
    found = disagreements(diagnose(model, ranks="group"))
    assert found[0].fix_ is not None
    found[0].fix_(model)
    result: Any = {"found": [(f.site, f.value) for f in found], "state": model.state_dict()}
    result["left"] = len(disagreements(diagnose(model, ranks="group")))
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.slow
def test_two_running_ranks_find_and_mend_it_together(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_on_a_rank, args=(str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one["found"] == two["found"]
    assert [site for site, _ in one["found"]] == ["1"]
    assert one["left"] == two["left"] == 0
    for name, tensor in one["state"].items():
        if "running" in name:
            assert torch.equal(tensor, two["state"][name])
