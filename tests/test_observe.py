"""observe: exact for any split, weighted by samples, the same under autocast, any memory layout and any number of ranks."""

from __future__ import annotations

import functools
import os
import socket
import sys
import warnings
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from renorm.errors import BatchError, UsageError
from renorm.moments import Observed
from renorm.observe import _one_pass, measure, observe
from tests import animals, zoo
from tests.reference import moments as twin

seeds = st.integers(0, 2**31)


def agree(got: Observed, wanted: Observed, tolerance: float) -> None:
    """Counts equal; means and standard deviations within `tolerance` standard deviations."""
    for a, b in zip(got, wanted, strict=True):
        assert a.count == b.count
        sd = b.sd.clamp_min(1e-12)
        torch.testing.assert_close(a.mean / sd, b.mean / sd, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(a.sd / sd, b.sd / sd, rtol=tolerance, atol=tolerance)


def split(x: Tensor, cuts: list[int]) -> list[Tensor]:
    return [part for part in torch.tensor_split(x, sorted(cuts)) if len(part)]


# ── measuring ──


@pytest.mark.parametrize("how", ["exact", "quick", "as on a GPU"])
@pytest.mark.parametrize("mean", [0.0, 1.0, 30.0, -2e4])
@pytest.mark.parametrize("shape", [(9, 3), (9, 3, 50), (4, 3, 20, 20), (3, 3, 5, 6, 7), (1, 3, 40), (5, 3, 1, 1)])
def test_measuring_equals_its_twin(shape: tuple[int, ...], mean: float, how: str) -> None:
    x = (torch.randn(shape, dtype=torch.float64) + mean).to(torch.float32)
    reference, space = x.double().numpy(), tuple(range(2, len(shape)))
    got = _one_pass(x, space) if how == "as on a GPU" and space else measure(x, exact=how == "exact")
    tolerance = 1e-6 if how == "exact" else 1e-5
    for moments, wanted in ((got.values, twin.of(reference)), (got.images, twin.of_images(reference))):
        assert moments.count == wanted.count
        np.testing.assert_allclose(moments.mean, wanted.mean, atol=tolerance)
        np.testing.assert_allclose(moments.sd, np.sqrt(wanted.var), atol=tolerance)


def test_a_large_offset_of_one_image_alone_does_not_spoil_the_others() -> None:
    x = torch.randn(8, 2, 100)
    x[3] += 1e4
    got, wanted = measure(x, exact=True), twin.of(x.double().numpy())
    np.testing.assert_allclose(got.values.var, wanted.var, rtol=1e-6)


def test_constant_channels_have_no_variance_and_no_negative_one() -> None:
    x = torch.full((6, 2, 50), 3.3)
    x[:, 1] = -7e3
    assert (measure(x).values.var >= 0).all()
    assert (measure(x).values.var < 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_narrow_and_wide_values_are_measured_as_what_they_are(dtype: torch.dtype) -> None:
    x = (torch.randn(6, 3, 300) * 20 + 50).to(dtype)
    agree(measure(x), Observed.of(x), 1e-5)


def test_sums_that_overflow_half_precision_do_not() -> None:
    x = torch.full((4, 2, 5000), 200.0, dtype=torch.float16)
    assert measure(x).values.mean.tolist() == [200, 200]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("axis", [1, -1])
def test_layout_and_axis_do_not_matter(layout: torch.memory_format, axis: int) -> None:
    x = (torch.randn(4, 5, 6, 7) + 3).contiguous(memory_format=layout)
    agree(measure(x, axis=axis), Observed.of(x, axis=axis), 1e-5)


# ── any split ──


@settings(max_examples=20)
@given(seeds, st.lists(st.integers(1, 31), max_size=5), st.sampled_from([0.0, 2e4]))
def test_running_does_not_depend_on_the_split(seed: int, cuts: list[int], mean: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 3, 4, 4, generator=generator) + mean
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)).eval()
    model[0].running_mean.fill_(mean)
    whole, parts = (observe(model, batches, under="running") for batches in ([x], split(x, cuts)))
    for name in whole:
        agree(parts[name], whole[name], 1e-6)


@settings(max_examples=15)
@given(seeds, st.lists(st.integers(1, 31), max_size=5))
def test_the_first_layer_does_not_depend_on_the_split_in_either_mode(seed: int, cuts: list[int]) -> None:
    x = torch.randn(32, 3, 4, generator=torch.Generator().manual_seed(seed)) * 3 + 10
    model = nn.Sequential(nn.BatchNorm1d(3))
    agree(observe(model, split(x, cuts), under="batch")["0"], Observed.of(x), 1e-5)


def test_a_ragged_last_batch_counts_by_its_samples() -> None:
    x = torch.cat([torch.randn(32, 3), torch.full((1, 3), 50.0)])
    got = observe(nn.BatchNorm1d(3), [x[:32], x[32:]], under="batch")[""]
    wanted = twin.of(x.double().numpy())
    np.testing.assert_allclose(got.values.mean, wanted.mean, rtol=1e-6)
    np.testing.assert_allclose(got.values.var, wanted.var, rtol=1e-6)
    assert got.images.count == 33


def test_batches_of_different_image_sizes_count_by_their_values_and_their_images() -> None:
    small, large = torch.randn(4, 2, 3, 3), torch.randn(2, 2, 9, 9) + 5
    got = observe(nn.BatchNorm2d(2), [small, large], under="running")[""]
    wanted = twin.pooled([small.double().numpy(), large.double().numpy()])
    assert got.values.count == wanted.count == 4 * 9 + 2 * 81
    assert got.images.count == 6
    np.testing.assert_allclose(got.values.mean, wanted.mean, atol=1e-6)


# ── modes ──


def test_under_batch_every_norm_normalises_by_its_batch_as_training_does() -> None:
    case = zoo.named("bn2d")
    x = case.batch(16)
    seen = observe(case.build(), [x], under="batch")
    trained = case.build()
    for module in trained.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    trained.train()(x)
    for name in seen:
        norm = trained.get_submodule(name)
        torch.testing.assert_close(seen[name].values.mean.float(), norm.running_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen[name].values.unbiased.float(), norm.running_var, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("under", ["batch", "running"])
def test_dropout_stays_off(under: Any) -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(4)).train()
    x = torch.randn(40, 4)
    agree(observe(model, [x], under=under)["1"], Observed.of(x), 1e-6)


def test_batch_and_running_differ_behind_the_first_norm() -> None:
    case = zoo.named("bn2d")
    batch, running = (observe(case.build(), [case.batch(16)], under=u) for u in ("batch", "running"))
    agree(batch["1"], running["1"], 1e-5)
    assert not torch.allclose(batch["4"].values.mean, running["4"].values.mean, rtol=0.01)


def test_calls_of_a_shared_norm_are_pooled() -> None:
    case = zoo.named("shared")
    model, x = case.build(), case.batch(6)
    got = observe(model, [x], under="running")["first"]
    with torch.no_grad():
        inside = model.conv(x)
        outside = nn.functional.avg_pool2d(model.first(inside), 2) + 1
    wanted = twin.pooled([inside.double().numpy(), outside.double().numpy()])
    assert got.values.count == wanted.count == 6 * (36 + 9)
    np.testing.assert_allclose(got.values.mean, wanted.mean, atol=1e-6)
    assert got.images.count == 12


@pytest.mark.parametrize("under", ["batch", "running"])
def test_slots_are_measured_apart(under: Any) -> None:
    case = zoo.named("slots")
    model, batches = case.build(), [case.batch(6), case.batch(3, seed=1)]
    seen = observe(model, batches, under=under)
    with torch.no_grad():
        inputs = [model[0](x) for x in batches]
    for slot, row in (("day", 0), ("night", 1)):
        wanted = Observed.of(torch.cat([x[row::2] for x in inputs]))
        agree(seen[f"1@{slot}"], wanted, 1e-5)


def test_a_norm_that_gets_no_samples_in_some_batches_is_measured_on_the_others() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x[self.body(x)[:, 0] > 3])

    x = torch.randn(8, 2)
    seen = observe(Detector(), [x, x + 4], under="running")
    assert seen["body"].images.count == 16
    assert 0 < seen["head"].images.count <= 8
    assert observe(Detector(), [x - 9], under="running").unvisited == ("head",)


def test_sites_are_chosen_by_pattern_and_the_others_stay_in_evaluation() -> None:
    case = zoo.named("bn2d")
    seen = observe(case.build(), [case.batch()], under="batch", exclude="1")
    assert list(seen) == ["4"]
    agree(seen["4"], observe(case.build(), [case.batch()], under="running")["4"], 1e-5)


# ── precision and layout ──


@pytest.mark.parametrize("where", ["option", "surroundings"])
@pytest.mark.parametrize("under", ["batch", "running"])
def test_autocast_measures_what_the_norm_gets_under_autocast(where: str, under: Any) -> None:
    case = zoo.named("bn2d")
    batches = [case.batch(12), case.batch(5, seed=1)]
    plain = observe(case.build(), batches, under=under)
    model = case.build()
    if where == "option":
        seen = observe(model, batches, under=under, autocast=torch.bfloat16)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            seen = observe(model, batches, under=under)
    assert model[1].running_mean.dtype == torch.float32
    for name in plain:
        agree(seen[name], plain[name], 3e-2)
    assert any(not torch.equal(seen[n].values.mean, plain[n].values.mean) for n in plain)


@pytest.mark.parametrize("under", ["batch", "running"])
@pytest.mark.parametrize("how", ["option", "input", "model"])
def test_channels_last_measures_the_same(how: str, under: Any) -> None:
    case = zoo.named("bn2d")
    plain = observe(case.build(), [case.batch(12)], under=under)
    model, x = case.build(), case.batch(12)
    if how == "model":
        model = model.to(memory_format=torch.channels_last)
    if how == "input":
        x = x.contiguous(memory_format=torch.channels_last)
    seen = observe(model, [x], under=under, channels_last=how == "option")
    for name in plain:
        agree(seen[name], plain[name], 1e-5)


# ── what is refused ──


def test_another_mode_is_refused() -> None:
    with pytest.raises(UsageError, match=r'"batch" or "running"; got \'training\''):
        observe(nn.BatchNorm1d(2), [torch.randn(4, 2)], under="training")  # type: ignore[arg-type]


def test_a_loader_without_batches_is_refused() -> None:
    with pytest.raises(BatchError, match="observe was given batches, but there was none"):
        observe(nn.BatchNorm1d(2), [], under="batch")


def test_one_value_per_channel_in_all_is_refused_with_the_sites() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(2))
    with pytest.raises(BatchError, match=r"gave '2' one value per channel in all"):
        observe(model, [torch.randn(1, 2, 4, 4)], under="running")
    with pytest.raises(BatchError, match=r"gave the model itself one value"):
        observe(nn.BatchNorm1d(2), [torch.randn(1, 2)], under="running")


def test_single_values_of_several_batches_make_moments_together() -> None:
    x = torch.randn(5, 2, 1, 1)
    agree(observe(nn.BatchNorm2d(2), list(x.split(1)), under="running")[""], Observed.of(x), 1e-6)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_model_is_refused_before_it_can_change() -> None:
    model = zoo.named("lazy").build()
    with pytest.raises(UsageError, match=r"1 lazy layers, '1' first.*run the model on one batch yourself"):
        observe(model, [torch.randn(2, 3, 6, 6)], under="running")
    assert isinstance(model[1], nn.LazyBatchNorm2d)


def test_a_model_without_batch_norm_is_observed_and_found_to_have_none() -> None:
    seen = observe(zoo.named("tokens").build(), [torch.randn(2, 6, 5)], under="running")
    assert dict(seen) == {}
    assert seen.samples == 2


def test_functional_batch_norms_are_counted() -> None:
    seen = observe(animals.Functional(), [torch.randn(2, 3, 6, 6)] * 3, under="running")
    assert seen.functional == 1


# ── several processes ──


def _share(rank: int) -> list[Tensor]:
    """Batches of one rank: three on the first, one on the second, of different sizes."""
    case = zoo.named("bn2d")
    return [case.batch(n, seed=10 * rank + n) for n in ([8, 5, 1], [7])[rank]]


def _on_a_rank(rank: int, folder: str, task: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # by its loopback interface: where a machine's own name leads nowhere, the ranks would wait for each other for ever
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    store = torch.distributed.FileStore(f"{folder}/{task}-store", 2)
    limit = timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    model = zoo.named("bn2d").build()
    result: Any = {}
    if task == "observe":
        for under in ("batch", "running"):
            seen = observe(model, _share(rank), under=under)  # type: ignore[arg-type]
            result[under] = {n: [(m.count, m.mean, m.var) for m in (o.values, o.images)] for n, o in seen.items()}
            result["counts"] = (seen.samples, seen.batches)
        idle = observe(model, _share(1) if rank else [], under="running")
        result["one idle"] = {n: o.values.count for n, o in idle.items()}
    else:
        try:
            observe(model, _share(0) if rank else [torch.full((2, 3, 6, 6), float("nan"))], under="batch")
        except BatchError as error:
            result["message"] = str(error)
    torch.save(result, f"{folder}/{task}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What both ranks found in a task, each task run once however many tests ask."""

    @functools.cache
    def run(task: str) -> list[Any] | str:
        folder = tmp_path_factory.mktemp("ranks")
        try:
            torch.multiprocessing.spawn(_on_a_rank, args=(str(folder), task), nprocs=2)
        except torch.multiprocessing.ProcessRaisedException as error:
            return str(error)
        return [torch.load(folder / f"{task}-{rank}.pt") for rank in (0, 1)]

    return run


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("under", ["batch", "running"])
def test_two_ranks_with_uneven_shares_see_what_one_process_sees(ranks: Any, under: Any) -> None:
    results = ranks("observe")
    assert not isinstance(results, str), results
    alone = observe(zoo.named("bn2d").build(), _share(0) + _share(1), under=under)
    assert results[0]["counts"] == results[1]["counts"] == (21, 4)
    for name, wanted in alone.items():
        first, second = results[0][under][name], results[1][under][name]
        for (count, mean, var), other, moments in zip(first, second, (wanted.values, wanted.images), strict=True):
            assert count == other[0] == moments.count
            assert torch.equal(mean, other[1])  # ranks agree to the last bit, or their models would drift apart
            assert torch.equal(var, other[2])
            torch.testing.assert_close(mean, moments.mean, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(var, moments.var, rtol=1e-9, atol=1e-9)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_rank_without_batches_takes_what_the_others_saw(ranks: Any) -> None:
    assert [result["one idle"] for result in ranks("observe")] == [{"1": 7 * 36, "4": 7 * 36}] * 2


@pytest.mark.distributed
@pytest.mark.slow
def test_when_one_rank_fails_all_do_and_none_waits(ranks: Any) -> None:
    first, second = ranks("failure")
    assert "NaN" in first["message"]
    assert "rank 0 failed" in second["message"]


@pytest.fixture
def second_rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Another rank, played in this process: it answers every exchange with a function of what this one sends."""

    def join(answer: Any) -> None:
        def all_gather(out: list[Tensor], sent: Tensor) -> None:
            out[0].copy_(sent)
            out[1].copy_(answer(sent))

        for module in ("renorm.observe", "renorm.ranks"):
            monkeypatch.setattr(sys.modules[module], "world", lambda: 2)
        monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
        monkeypatch.setattr(torch.distributed, "all_gather", all_gather)

    return join


def test_no_batch_on_any_rank_is_refused(second_rank: Any) -> None:
    second_rank(lambda sent: sent)
    with pytest.raises(BatchError, match="batches on several ranks, but there was none in any of them"):
        observe(zoo.named("bn2d").build(), [], under="running")


def test_the_failure_of_another_rank_is_raised_here_too(second_rank: Any) -> None:
    second_rank(lambda sent: 1 - sent)
    with pytest.raises(BatchError, match="observe stopped because rank 1 failed; its own message says why"):
        observe(zoo.named("bn2d").build(), [zoo.named("bn2d").batch()], under="running")
