"""On a CUDA device every verb gives what it gives on the processor, keeps tensors where they were, and is undone to the bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import renorm
from renorm.calls import map_tensors
from renorm.layers import BNGRU, BNLSTM, PosteriorNorm
from renorm.layers.base import catalogue as layers
from renorm.online.base import catalogue as methods
from renorm.regularisers.base import catalogue as regularisers
from renorm.sites import find_sites
from tests import zoo
from tests.contracts import test_online as online
from tests.contracts.photograph import differences, photograph
from tests.layers.catalogue import images, lived
from tests.test_finetune import data, net

pytestmark = pytest.mark.gpu
CASES = [p for p in zoo.with_batch_norm() if not {"keras", "compiled", "lazy"} & p.values[0].tags]
FEW = ("bn2d", "bn1d", "bn1d-sequence", "bn3d", "timm-resnet", "bn-lstm")
ALIKE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _plain_float32() -> Iterator[None]:
    """Without TF32, whose ten bits of mantissa would hide a wrong number; dropout apart, both devices then agree."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def on_cuda(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).cuda()


def tolerance(case: zoo.Case) -> dict[str, float]:
    return {"rtol": 3e-2, "atol": 3e-2} if "narrow" in case.tags else ALIKE


def alike(case: zoo.Case, ours: Tensor, theirs: Tensor) -> None:
    assert ours.device.type == "cuda"
    theirs = theirs.cpu()  # DataParallel is there from the beginning
    torch.testing.assert_close(ours.cpu(), theirs, equal_nan=True, **tolerance(case))


@pytest.mark.parametrize("case", CASES)
def test_statistics_are_estimated_alike_stay_there_and_come_back(case: zoo.Case) -> None:
    model = case.build()
    there = on_cuda(model)
    before = photograph(there)
    found = renorm.recalibrate_(there, case.batches(), forward=case.forward)
    renorm.recalibrate_(model, case.batches(), forward=case.forward)
    for (name, ours), (_, theirs) in zip(there.named_buffers(), model.named_buffers(), strict=True):
        assert ours.device.type == "cuda", name
        alike(case, ours, theirs)
    found.restore_()
    assert differences(before, photograph(there)) == []


@pytest.mark.parametrize("case", CASES)
def test_moments_are_seen_alike(case: zoo.Case) -> None:
    model = case.build()
    ours = renorm.observe(on_cuda(model), case.batches(), under="running", forward=case.forward)
    theirs = renorm.observe(model, case.batches(), under="running", forward=case.forward)
    for place, seen in theirs.items():
        torch.testing.assert_close(ours[place].values.mean, seen.values.mean, **tolerance(case))
        torch.testing.assert_close(ours[place].values.var, seen.values.var, **tolerance(case))


@pytest.mark.parametrize(
    "how", [{}, {"channels_last": True}, {"autocast": torch.bfloat16}, {"autocast": torch.float16}]
)
def test_a_profile_made_in_one_place_serves_in_the_other(how: dict[str, Any], tmp_path: Path) -> None:
    model, batches = net(), data()
    there = on_cuda(model)
    close = ALIKE if how.get("autocast") is None else {"rtol": 5e-2, "atol": 5e-2}
    renorm.profile(there, batches, **how).save(tmp_path / "there.safetensors")
    renorm.profile(model, batches).save(tmp_path / "here.safetensors")
    shifted = [(2 * x - 1, y) for x, y in data(seed=1)]
    for made, target in (("there", model), ("here", there)):
        changed = renorm.recalibrate_(target, shifted, source=tmp_path / f"{made}.safetensors", check=shifted)
        assert changed.samples == 40
    for ours, theirs in zip(there.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, **close)


@pytest.mark.parametrize("name", sorted(methods()))
@pytest.mark.parametrize("case", [zoo.named(name) for name in FEW], ids=FEW)
def test_a_stream_answers_alike_under_the_guard_and_is_undone(case: zoo.Case, name: str) -> None:
    if "slots" in case.tags and name in online.REFUSED:
        pytest.skip("refused where several sets of statistics stand")
    answers = {}
    for where in ("cpu", "cuda"):
        model = case.build().to(where)
        before = photograph(model)
        stream = online.stream_on(case, model, name, guard=True)
        answers[where] = [stream(batch) for seed in range(3) for batch in online.batches(case, seed)]
        kept = stream.state_dict()
        stream.predict(online.batches(case)[0])
        stream.load_state_dict(kept)
        stream.restore_()
        assert differences(before, photograph(model)) == []
    for ours, theirs in zip(answers["cuda"], answers["cpu"], strict=True):
        if name == "unmix":  # draws its first components, on the device
            assert ours.device.type == "cuda"
            assert ours.shape == theirs.shape
        else:
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-2, atol=1e-2)


def test_a_stream_of_half_precision_answers_single_images() -> None:
    model = net().cuda().half()
    stream = renorm.adapt_(model)
    for x, _ in data(20, size=1):
        assert bool(stream(x.half()).isfinite().all())


@pytest.mark.parametrize("name", sorted(layers()))
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_and_its_gradients_are_alike(name: str, training: bool) -> None:
    if name == "stochastic" and training:
        pytest.skip("draws its coins on the device")
    x = images(6, 4, 3, 3)
    found = []
    for where in ("cpu", "cuda"):
        layer = lived(name).to(where).train(training)
        value = x.to(where).requires_grad_()
        y = layer(value)
        weights = torch.linspace(-1, 1, y.numel()).view(y.shape).to(where)
        wanted = [value, *(p for p in layer.parameters() if p.requires_grad)]
        found.append([y, *torch.autograd.grad((y * weights).sum(), wanted, allow_unused=True), *layer.buffers()])
    for theirs, ours in zip(*found, strict=True):
        if theirs is not None:
            assert ours.device.type == "cuda"
            torch.testing.assert_close(ours.cpu(), theirs, **ALIKE)


@pytest.mark.parametrize("name", sorted(layers()))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_trains_under_autocast_on_channels_last(name: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layers()[name](4), nn.ReLU(), nn.Conv2d(4, 2, 3)).cuda()
    x = torch.randn(6, 3, 8, 8, device="cuda").contiguous(memory_format=torch.channels_last)
    with torch.autocast("cuda", dtype=dtype):
        y = model.to(memory_format=torch.channels_last)(x)
    y.float().square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert all(b.dtype in (torch.float32, torch.long, torch.bool) and b.is_cuda for b in model.buffers())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, which some versions of inductor import
@pytest.mark.parametrize("name", ["frozen", "shrink", "per_domain", "batch"])
def test_a_compiled_layer_is_the_eager_one(name: str) -> None:
    eager = lived(name).cuda()
    layer = copy.deepcopy(eager)
    x = images(6, 4, 3, 3).cuda()
    torch.testing.assert_close(torch.compile(layer)(x), eager(x), **ALIKE)
    for ours, theirs in zip(layer.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, **ALIKE)


def test_a_conversion_goes_where_the_layer_is_and_back() -> None:
    model = net().cuda()
    x = data()[0][0].cuda()
    said = model(x)
    for kind in ("ghost", "frozen"):
        changed = renorm.convert_(model, kind)
        assert all(t.is_cuda for t in (*model.parameters(), *model.buffers()))
        torch.testing.assert_close(model(x), said, **ALIKE)
        changed.restore_()
    assert torch.equal(model(x), said)


@pytest.mark.parametrize("kind", [BNLSTM, BNGRU])
def test_a_recurrent_network_is_alike_packed_and_not(kind: Any) -> None:
    torch.manual_seed(7)
    here = kind(3, 5, steps=6, batch_first=True, num_layers=2, bidirectional=True)
    there = copy.deepcopy(here).cuda()
    x = torch.randn(7, 6, 3)
    packed = pack_padded_sequence(x, torch.tensor([5, 2, 6, 3, 6, 2, 4]), batch_first=True, enforce_sorted=False)
    for given in (x, packed):
        ours, theirs = there(given.to("cuda"))[0], here(given)[0]
        ours, theirs = (v if isinstance(v, Tensor) else v.data for v in (ours, theirs))
        torch.testing.assert_close(ours.cpu(), theirs, **ALIKE)
        ours.square().sum().backward()
        theirs.square().sum().backward()
    for (name, p), (_, q) in zip(there.named_parameters(), here.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad.cpu(), q.grad, rtol=1e-3, atol=1e-3, msg=name)
    for p, q in zip(there.buffers(), here.buffers(), strict=True):
        torch.testing.assert_close(p.cpu(), q, **ALIKE)


def test_a_posterior_norm_holds_its_bound_there() -> None:
    layer = PosteriorNorm(6, gamma=0.7).cuda()
    mean = layer(torch.randn(64, 6, device="cuda"))
    assert mean.is_cuda
    assert float(mean.detach().square().mean(0).sum() / 2) >= 6 * 0.7**2 / 2 * 0.999


@pytest.mark.parametrize("policy", ["auto", "all", "frozen-statistics", "recalibrate-then-freeze", "affine-and-head"])
def test_fine_tuning_runs_there_and_is_undone(policy: str) -> None:
    model = net().cuda()
    before = photograph(model)
    tuned = renorm.finetune_(model, data(), data(seed=1), policy=policy, epochs=10, head="new")
    assert tuned.value is not None
    assert tuned.value > 0.5
    assert all(t.is_cuda for t in (*model.parameters(), *model.buffers()))
    tuned.restore_()
    assert differences(before, photograph(model)) == []


@pytest.mark.parametrize("name", sorted(regularisers()))
def test_a_regulariser_works_there(name: str) -> None:
    tuned = renorm.finetune_(net().cuda(), data(), data(seed=1), "all", name, epochs=10)
    assert tuned.value is not None
    assert tuned.value > 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fine_tuning_under_autocast(dtype: torch.dtype) -> None:
    tuned = renorm.finetune_(net().cuda(), data(), data(seed=1), epochs=10, autocast=dtype, channels_last=True)
    assert tuned.value is not None
    assert tuned.value > 0.5


@pytest.mark.parametrize("joint", ["transferable", "per_domain"])
def test_joint_training_runs_there(joint: Any) -> None:
    target = [(x * 2 - 1, y) for x, y in data(seed=2)]
    tuned = renorm.finetune_(net().cuda(), data(), target=target, joint=joint, epochs=2)
    assert tuned.value is not None


def test_a_run_that_stopped_there_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole, halves = net().cuda(), net().cuda()
    renorm.finetune_(whole, data(), epochs=2, head="keep", policy="all")
    with pytest.raises(KeyboardInterrupt):
        renorm.finetune_(halves, Stopping(), epochs=2, head="keep", policy="all", run=tmp_path / "run", save_every=1)
    renorm.finetune_(halves, data(), epochs=2, head="keep", policy="all", run=tmp_path / "run", save_every=1)
    for ours, theirs in zip(halves.state_dict().values(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, **ALIKE)


class Stopping(list[Any]):
    """Batches that stop the run while the second epoch is read."""

    def __init__(self) -> None:
        super().__init__(data())
        self.read = 0

    def __getitem__(self, index: Any) -> Any:
        self.read += 1
        if self.read > 7:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def test_adapters_are_served_from_there_as_from_here(tmp_path: Path) -> None:
    model = net()
    files = {}
    for number, name in enumerate(("north", "south")):
        tuned = renorm.finetune_(model, data(seed=number), policy="affine-and-head", epochs=1)
        renorm.save_adapter(model, tmp_path / f"{name}.safetensors")
        files[name] = tmp_path / f"{name}.safetensors"
        tuned.restore_()
    there = on_cuda(model)
    x = data()[0][0]
    domains = ["north", "south"] * (len(x) // 2)
    ours = renorm.serve_adapters(there, files)(x.cuda(), domains=domains)
    theirs = renorm.serve_adapters(model, files)(x, domains=domains)
    assert ours.is_cuda
    torch.testing.assert_close(ours.cpu(), theirs, **ALIKE)
    loaded = renorm.load_adapter_(there, files["north"])
    torch.testing.assert_close(there(x[:1].cuda())[0], ours[0], **ALIKE)
    loaded.restore_()


def test_a_fold_is_proved_there_and_a_file_written_from_there(tmp_path: Path) -> None:
    model = net().cuda()
    x = data()[0][0]
    folded = renorm.fold(model, x)
    assert not any(site.kind == "batch" for site in find_sites(folded.model))
    torch.testing.assert_close(folded.model(x.cuda()), model(x.cuda()), **ALIKE)
    for suffix in (".pt2", ".safetensors", ".onnx"):
        renorm.export(model, tmp_path / f"net{suffix}", x)


def test_a_rounded_network_is_repaired_there() -> None:
    source = net().cuda()
    model = copy.deepcopy(source)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_((module.weight / 0.2).round() * 0.2)
    batches = [x for x, _ in data(64)]
    before = renorm.verify(source, model, batches).max_abs
    repaired = renorm.repair_(model, source, batches)
    assert renorm.verify(source, model, batches).max_abs < before
    repaired.restore_()


def test_the_doctor_advice_and_recommendation_work_there() -> None:
    model = net().cuda()
    batches = data()
    before = photograph(model)
    source = renorm.profile(model, batches)
    found = renorm.diagnose(model, [(x * 3 + 1, y) for x, y in batches], source=source)
    assert found.findings
    assert renorm.evaluate(model, batches).value >= 0
    renorm.advise(model, batches, budget=0.5)
    assert renorm.recommend(model, batches, source=source) is not None
    assert differences(before, photograph(model)) == []


def test_inputs_that_are_there_already_are_taken_as_they_are() -> None:
    batches = map_tensors(lambda t: t.cuda(), data())
    model = net().cuda()
    renorm.recalibrate_(model, batches)
    renorm.adapt_(model)(batches[0][0])
    assert renorm.evaluate(model, batches).value >= 0
    renorm.finetune_(model, batches, epochs=1, head="keep")


def test_a_step_that_a_grad_scaler_skipped_is_seen_in_the_statistics() -> None:
    model = net().cuda()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cuda")
    with renorm.watch(model, optimiser) as watch:
        model.train()
        for number, (x, y) in enumerate(data()):
            with torch.autocast("cuda", dtype=torch.float16):
                loss = F.cross_entropy(model(x.cuda() * (1e6 if number == 2 else 1)), y.cuda())
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
            optimiser.zero_grad()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert "BN406" in {finding.rule for finding in watch.findings}


def test_a_lean_step_is_the_same_and_takes_less() -> None:
    from tests.test_lean import Deep

    model = Deep(blocks=6, width=16).cuda().train()
    lean = copy.deepcopy(model)
    renorm.lean_(lean)
    x = torch.randn(16, 3, 32, 32, device="cuda")
    peaks = []
    for each in (model, lean):
        torch.manual_seed(0)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.backward(each(x).square().mean())
        peaks.append(torch.cuda.max_memory_allocated() - before)
    for (name, ours), (_, theirs) in zip(lean.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, **ALIKE, msg=name)
    for (name, ours), (_, theirs) in zip(lean.named_buffers(), model.named_buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, **ALIKE, msg=name)
    assert peaks[1] < 0.7 * peaks[0]
