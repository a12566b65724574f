"""Watching a loop: each thing that goes wrong in one is counted and named, and the loop is the same bit for bit."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import renorm
from renorm import callbacks
from renorm.doctor import diagnose
from renorm.errors import UsageError
from renorm.freeze import freeze_
from renorm.layers import BNGRU, BNLSTM
from renorm.loop import optimizers_in
from renorm.rules.base import Finding
from renorm.sites import find_sites
from renorm.watch import Watch, watch
from tests import zoo
from tests.contracts.photograph import differences, photograph, process


class Net(nn.Module):
    """Two blocks with batch norm and a head; the second block may be checkpointed."""

    def __init__(self, *, reentrant: bool | None = None, whole: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.head = nn.Linear(6, 4)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.reentrant is None or not self.training:
            x = self.block(x)
        else:
            x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.head(x.relu().mean((2, 3)))


def images(count: int = 8, *, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def net(**options: Any) -> Net:
    torch.manual_seed(3)
    return Net(**options)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, *, views: int = 1, parts: int = 1, seed: int = 0) -> None:
    """One step of the optimiser: `parts` backwards, each over `views` forwards."""
    optimizer.zero_grad()
    for part in range(parts):
        sum(model(images(seed=seed * 100 + part * 10 + view)).square().mean() for view in range(views)).backward()
    optimizer.step()


def sgd(model: nn.Module, **options: float) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, **options)


def train(model: nn.Module, *, steps: int = 3, **options: int) -> Watch:
    optimizer = sgd(model)
    model.train()
    with watch(model, optimizer) as watching:
        for seed in range(steps):
            step(model, optimizer, seed=seed, **options)
    return watching


def rules(watching: Watch) -> list[str]:
    return [finding.rule for finding in watching.findings]


def the(watching: Watch, rule: str) -> Finding:
    (found,) = [finding for finding in watching.findings if finding.rule == rule]
    return found


def test_a_sound_loop_has_no_finding_and_its_counts_are_right() -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as watching:
        for seed in range(3):
            model.train()
            step(model, optimizer, seed=seed)
            model.eval()
            with torch.no_grad(), watching.validating():
                model(images(seed=50))
    loop = watching.loop
    assert watching.findings == ()
    assert str(watching) == "nothing wrong was found in the loop"
    assert (loop.steps, loop.forwards, loop.waiting) == (3, 3, 1)
    assert set(loop.counts) == {"stem.1", "block.1"}
    counts = loop.counts["stem.1"]
    assert (counts.updates, counts.usual, counts.trained, counts.samples, counts.calls) == ({1: 3}, 1, 3, 8, 1)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_found_in_both_modes_and_its_mend_weighs_two_updates_as_one(reentrant: bool) -> None:
    watching = train(model := net(reentrant=reentrant))
    assert rules(watching) == ["BN403"]
    found = the(watching, "BN403")
    assert (found.site, found.value, found.severity) == ("block.1", 2.0, "warning")
    assert int(model.block[1].num_batches_tracked) == 6  # torch's own counter agrees
    assert found.fix_ is not None
    undo = found.fix_(model)
    assert model.block[1].momentum == pytest.approx(1 - math.sqrt(0.9))
    assert model.stem[1].momentum == 0.1
    undo.restore_()
    assert model.block[1].momentum == 0.1


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_mended_checkpointed_model_holds_what_one_without_checkpointing_would(reentrant: bool) -> None:
    plain, twice = net(), net(reentrant=reentrant)
    mended = copy.deepcopy(twice)
    the(train(twice, steps=1), "BN403").fix_(mended)  # type: ignore[misc]
    train(plain)
    train(mended)
    twice = net(reentrant=reentrant)
    train(twice)
    right, wrong, again = (m.block[1].running_var for m in (plain, twice, mended))
    torch.testing.assert_close(again, right, rtol=1e-4, atol=1e-5)
    assert float((wrong - right).abs().max()) > 0.05


@pytest.mark.parametrize(("how", "times"), [({"parts": 4}, 4), ({"views": 2}, 2), ({"views": 2, "parts": 2}, 4)])
def test_several_updates_a_step_are_counted(how: dict[str, int], times: int) -> None:
    watching = train(model := net(), **how)
    assert rules(watching) == ["BN404"]
    found = the(watching, "BN404")
    assert found.value == times
    assert watching.loop.waiting == how.get("views", 1)
    assert found.fix_ is not None
    found.fix_(model)
    assert [site.momentum for site in find_sites(model)] == pytest.approx([1 - 0.9 ** (1 / times)] * 2)


def test_checkpointing_and_accumulation_are_told_apart() -> None:
    watching = train(net(reentrant=False), parts=3)
    assert sorted(rules(watching)) == ["BN403", "BN404"]
    assert the(watching, "BN404").value == 3
    assert the(watching, "BN403").value == 2


def test_a_discriminator_that_sees_real_fake_and_the_generators_is_found() -> None:
    generator = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
    critic = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    both = nn.ModuleDict({"generator": generator, "critic": critic})
    optimizers = [torch.optim.Adam(generator.parameters()), torch.optim.Adam(critic.parameters())]
    with watch(both, optimizers) as watching:
        for _ in range(3):
            optimizers[1].zero_grad()
            fake = generator(torch.randn(8, 4))
            (critic(torch.randn(8, 6)).mean() - critic(fake.detach()).mean()).backward()
            optimizers[1].step()
            optimizers[0].zero_grad()
            critic(fake).mean().backward()
            optimizers[0].step()
    found = {f.site: f.value for f in watching.findings if f.rule == "BN404"}
    assert found == {"critic.1": 3.0}  # real, fake, and once more for the generator


@pytest.mark.parametrize("told", [False, True])
def test_a_leak_in_validation_is_an_error(told: bool) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as watching:
        step(model, optimizer)
        with watching.validating() if told else torch.no_grad():
            model(images(seed=9))  # eval() was forgotten
        step(model, optimizer)
    found = the(watching, "BN405")
    assert (found.severity, found.value) == ("error", 1.0)
    assert rules(watching) == ["BN405"]


def test_a_teacher_that_moves_is_found_and_held() -> None:
    student, teacher = net(), net().requires_grad_(False)
    both = nn.ModuleDict({"student": student, "teacher": teacher})
    optimizer = sgd(student)
    both.train()
    with watch(both, optimizer) as watching:
        for seed in range(2):
            optimizer.zero_grad()
            with torch.no_grad():
                target = teacher(images(seed=seed))
            (student(images(seed=seed)) - target).square().mean().backward()
            optimizer.step()
    found = the(watching, "BN405")
    assert (found.site, found.severity) == ("teacher.stem.1", "warning")
    assert found.fix_ is not None
    found.fix_(both)
    before = teacher.stem[1].running_mean.clone()
    both.train()
    teacher(images())
    assert torch.equal(teacher.stem[1].running_mean, before)


def test_re_estimation_on_purpose_is_no_leak() -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as watching:
        step(model, optimizer)
        update_bn([images(seed=s) for s in range(3)], model)
        renorm.recalibrate_(model, [images(seed=s) for s in range(3)])
        model.train()
        step(model, optimizer)
    assert watching.findings == ()


def test_a_skipped_step_whose_statistics_were_kept_is_found_and_put_back() -> None:
    model = net()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with watch(model, optimizer) as watching:
        for seed in range(3):
            x = images(seed=seed)
            if seed == 2:
                before = copy.deepcopy(model.state_dict())
                x[0, 0, 0, 0] = math.inf
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
    found = the(watching, "BN406")
    assert (found.severity, found.value) == ("error", 2.0)
    assert watching.loop.steps == 2
    assert not model.stem[1].running_mean.isfinite().all()
    undo = found.fix_(model)  # type: ignore[misc]
    for name, value in before.items():
        if "running" in name:
            assert torch.equal(model.state_dict()[name], value), name
    undo.restore_()
    assert not model.stem[1].running_mean.isfinite().all()


def test_weights_that_diverged_with_the_statistics_are_no_skipped_step() -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as watching:
        for _ in range(2):
            optimizer.zero_grad()
            (model(images()) * math.inf).mean().backward()
            optimizer.step()
    assert "BN406" not in rules(watching)


def test_a_shared_layer_is_found_in_a_loop_and_on_a_batch() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.own = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.own(self.norm(self.conv(self.norm(self.conv(x)))))

    watching = train(model := Twice())
    assert [(f.rule, f.site, f.value) for f in watching.findings] == [("BN410", "norm", 2.0)]
    found = [f for f in diagnose(model.eval(), [images(32)]).findings if f.rule == "BN410"]
    assert [(f.site, f.value) for f in found] == [("norm", 2.0)]


@pytest.mark.parametrize("network", [BNLSTM, BNGRU])
def test_a_norm_over_time_is_not_shared_but_beyond_the_steps_it_knows(network: Any) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = network(3, 8, steps=6, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    model = Reader().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer) as watching:
        for seed in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images(16, seed=seed)[:, 0, :, :3]), torch.arange(16) % 3).backward()
            optimizer.step()
    assert "BN410" not in rules(watching)
    model.eval()
    assert not [f for f in diagnose(model, [torch.randn(32, 6, 3)]).findings if f.rule == "BN410"]
    (found,) = [f for f in diagnose(model, [torch.randn(32, 9, 3)]).findings if f.rule == "BN410"]
    assert (found.site, found.value) == ("rnn.input@5", 4.0)
    assert "longer than the steps that have statistics of their own" in found.message


@pytest.mark.parametrize("how", ["eval", "affine", "held", "converted"])
def test_a_freeze_that_is_lost_on_the_way_is_found(how: str) -> None:
    model = net().train()
    if how == "eval":
        model.stem[1].eval()
    elif how == "affine":
        model.eval()
        model.stem[1].requires_grad_(False)
    else:
        freeze_(model, include="stem.1")
    optimizer = sgd(model)
    with watch(model, optimizer) as watching:
        if how == "converted":
            model.stem[1] = copy.deepcopy(net().stem[1])
        model.train()
        step(model, optimizer)
    found = [f for f in watching.findings if f.rule == "BN411"]
    assert [f.site for f in found] == ([] if how == "held" else ["stem.1"])
    for finding in found:
        finding.fix_(model)  # type: ignore[misc]
        model.train()
        assert not model.stem[1].training


def test_an_optimiser_alone_is_enough_for_the_rules_on_its_groups() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-2)
    found = {f.rule: f for f in diagnose(model, optimizer=optimizer).findings}
    assert (found["BN401"].severity, found["BN401"].value) == ("info", 4.0)
    assert "0.01" in found["BN401"].message
    groups = renorm.parameter_groups(model, 0.1, weight_decay=1e-2)
    assert [f.rule for f in diagnose(model, optimizer=torch.optim.SGD(groups)).findings if f.rule[2] == "4"] == []
    model.stem[1].weight = nn.Parameter(torch.ones(6))  # after the optimiser was made
    (lost,) = [f for f in diagnose(model, optimizer=optimizer).findings if f.rule == "BN402"]
    assert (lost.site, lost.value) == ("stem.1", 1.0)
    assert "no group" in lost.message
    step(model, optimizer)
    model.block[1].requires_grad_(False)
    stale = [f for f in diagnose(model, optimizer=optimizer).findings if "with a gradient" in f.unit]
    assert [(f.site, f.value) for f in stale] == [("block.1", 2.0)]


def groups_of(*optimizers: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Every group, with what it holds by identity."""
    return [
        group | {"params": [id(p) for p in group["params"]]}
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]


def named_groups(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": list(model.named_parameters()), "lr": 0.1, "weight_decay": 1e-2, "name": "all"},
    ]


@pytest.mark.parametrize("made", ["plain", "named", "norms alone", "two"])
def test_decay_is_taken_off_norms_in_the_optimiser_itself_and_put_back(made: str) -> None:
    model = net()
    affine = [p for site in find_sites(model) for p in site.affine.values()]
    rest = [p for p in model.parameters() if all(p is not a for a in affine)]
    optimizers: list[torch.optim.Optimizer] = {
        "plain": lambda: [torch.optim.AdamW(model.parameters(), lr=0.1)],
        "named": lambda: [torch.optim.SGD(named_groups(model), momentum=0.9)],
        "norms alone": lambda: [torch.optim.SGD([{"params": affine}, {"params": rest}], lr=0.1, weight_decay=0.1)],
        "two": lambda: [
            torch.optim.SGD(affine, lr=0.1, weight_decay=0.1),
            torch.optim.SGD(rest, lr=0.1, weight_decay=0.1),
        ],
    }[made]()
    step(model, optimizers[0])
    before, learnt = groups_of(*optimizers), [copy.deepcopy(o.state_dict()) for o in optimizers]
    (finding,) = [f for f in diagnose(model, optimizer=optimizers).findings if f.rule == "BN401"]
    assert finding.fix_ is not None
    undo = finding.fix_(model)
    assert [f for f in diagnose(model, optimizer=optimizers).findings if f.rule in ("BN401", "BN402")] == []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            assert len(group.get("param_names", group["params"])) == len(group["params"])
            some = any(p is a for p in group["params"] for a in affine)
            assert group["weight_decay"] == (0 if some else pytest.approx(before[0]["weight_decay"]))
    undo.restore_()
    assert groups_of(*optimizers) == before
    assert [str(o.state_dict()) for o in optimizers] == [str(state) for state in learnt]
    finding.fix_(model)
    step(model, optimizers[0])  # and it trains on with its momentum
    with pytest.raises(UsageError, match="holds no parameter of this model"):
        finding.fix_(copy.deepcopy(model))


def test_a_parameter_in_no_group_is_added_and_one_with_an_old_gradient_held_still() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model.stem[1].weight = nn.Parameter(torch.ones(6))
    before = groups_of(optimizer)
    (lost,) = [f for f in diagnose(model, optimizer=optimizer).findings if f.rule == "BN402"]
    assert lost.fix_ is not None
    undo = lost.fix_(model)
    step(model, optimizer)
    assert not torch.equal(model.stem[1].weight, torch.ones(6))
    undo.restore_()
    assert groups_of(optimizer) == before
    optimizer.state_dict()  # refuses what is known of a parameter in no group
    lost.fix_(model)
    step(model, optimizer)
    model.block[1].requires_grad_(False)
    held = model.block[1].weight.detach().clone()
    (stale,) = [f for f in diagnose(model, optimizer=optimizer).findings if f.rule == "BN402"]
    assert stale.fix_ is not None
    grad = model.block[1].weight.grad
    undo = stale.fix_(model)
    optimizer.step()
    assert torch.equal(model.block[1].weight, held)
    undo.restore_()
    assert model.block[1].weight.grad is grad


def test_groups_that_a_scheduler_counts_are_left_alone() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    (finding,) = [f for f in diagnose(model, optimizer=optimizer).findings if f.rule == "BN401"]
    assert finding.fix_ is None


def test_what_is_no_optimiser_is_refused() -> None:
    with pytest.raises(UsageError, match="torch optimiser"), watch(net(), object()):  # type: ignore[arg-type]
        pass
    assert optimizers_in(None) == []


class Wrapped:
    """As accelerate and Lightning wrap an optimiser."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


def test_a_wrapped_optimiser_is_looked_through() -> None:
    optimizer = sgd(net())
    assert optimizers_in(Wrapped(Wrapped(optimizer))) == [optimizer]  # type: ignore[arg-type]
    assert optimizers_in([Wrapped(optimizer)]) == [optimizer]


@pytest.mark.parametrize("options", [{}, {"reentrant": True}, {"reentrant": False}], ids=str)
def test_a_watched_loop_is_bit_identical_and_nothing_stays_behind(options: dict[str, Any]) -> None:
    watched, plain = net(**options), net(**options)
    optimizers = sgd(watched, momentum=0.9), sgd(plain, momentum=0.9)
    before = photograph(watched)
    with watch(watched, optimizers[0]):
        for seed in range(3):
            step(watched, optimizers[0], seed=seed)
    random = process()
    for seed in range(3):
        step(plain, optimizers[1], seed=seed)
    assert process() == random
    for one, other in zip(watched.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    changed = differences(before, photograph(watched))
    assert not [key for key in changed if "hooks" in key]
    assert not optimizers[0]._optimizer_step_post_hooks
    assert not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in watched.parameters())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_no_hook_stays_after_an_exception(error: type[BaseException]) -> None:
    model = net()
    optimizer = sgd(model)
    before = photograph(model)
    with pytest.raises(error, match="stopped"), watch(model, optimizer) as watching:
        raise error("stopped")
    assert differences(before, photograph(model)) == []
    assert watching.findings == ()


def test_hooks_that_cannot_all_be_set_are_all_taken_away() -> None:
    class Refusing(torch.optim.SGD):
        def register_step_post_hook(self, hook: Any) -> Any:
            raise OSError("no room")

    model = net()
    before = photograph(model)
    with pytest.raises(OSError, match="no room"), watch(model, Refusing(model.parameters(), lr=0.1)):
        pass
    assert differences(before, photograph(model)) == []


def test_copies_and_pickles_made_meanwhile_count_nothing() -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as watching:
        average = AveragedModel(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        for other in (average, loaded):
            other.train()
            with torch.no_grad():
                other(images())
        step(model, optimizer)
    assert watching.findings == ()


def test_watches_nest_and_find_the_same() -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as outer, watch(model, optimizer) as inner:
        step(model, optimizer, parts=2)
    assert rules(outer) == rules(inner) == ["BN404"]


def test_moved_to_another_dtype_meanwhile_is_followed() -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as watching:
        step(model, optimizer)
        model.double()
        optimizer.zero_grad()
        model(images().double()).mean().backward()
        optimizer.step()
    assert watching.findings == ()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wrapper", "in place", "part", "around"])
def test_compiled_models_are_counted(how: str) -> None:
    model: nn.Module = net()
    optimizer = sgd(model)
    inner = model
    if how == "wrapper":
        model = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "part":
        inner.stem = torch.compile(inner.stem, backend="eager")  # type: ignore[assignment]
    else:
        model = torch.compile(nn.Sequential(inner), backend="eager")
    model.train()
    step(model, optimizer)  # compiled before it is watched
    compiled = vars(inner).get("_compiled_call_impl")
    with watch(model, optimizer) as watching:
        for seed in range(3):
            step(model, optimizer, parts=2, seed=seed)
        with torch.no_grad():
            model(images())
    assert sorted(rules(watching)) == ["BN404", "BN405"]
    assert the(watching, "BN404").value == 2.0
    assert the(watching, "BN405").value == 1.0
    assert {c.trained for c in watching.loop.counts.values()} == {6}
    assert vars(inner).get("_compiled_call_impl") is compiled
    torch.compiler.reset()


@pytest.mark.parametrize("case", zoo.cases(without=("no-norm", "lazy")))
def test_every_kind_of_model_can_be_watched(case: zoo.Case) -> None:
    model = case.settled()
    before = photograph(model)
    with watch(model) as watching, torch.no_grad():
        case.call(model, case.batch())  # in evaluation
    assert [f for f in watching.findings if f.severity == "error"] == []
    hooks = [key for key in differences(before, photograph(model)) if "hook" in key]
    assert hooks == []


def _loaded() -> torch.utils.data.DataLoader[Any]:
    data = torch.utils.data.TensorDataset(images(16), torch.arange(16) % 4)
    return torch.utils.data.DataLoader(data, batch_size=8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ends", ["well", "badly"])
def test_a_lightning_run_is_watched(tmp_path: Any, ends: str) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, index: int) -> Tensor:
            if ends == "badly" and index == 1:
                raise KeyError("a bad batch")
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            self.net.train()  # the leak
            self.net(batch[0])

        def configure_optimizers(self) -> Any:
            return sgd(self)

    model = Module()
    callback = callbacks.lightning()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(
        max_epochs=2, callbacks=[callback], accumulate_grad_batches=2, default_root_dir=tmp_path, **options
    )
    assert callback.findings == ()
    if ends == "badly":
        with pytest.raises(KeyError, match="a bad batch"):
            trainer.fit(model, _loaded(), _loaded())
    else:
        trainer.fit(model, _loaded(), _loaded())
        assert [f.rule for f in callback.findings] == ["BN405", "BN404"]
        assert callback.findings[0].site == "net.stem.1"
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_transformers_run_is_watched(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")

    class Wanted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    data = [{"x": x, "labels": torch.tensor(i % 4)} for i, x in enumerate(images(16))]
    model = Wanted()
    callback = callbacks.transformers()
    options = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=2, **options
    )
    with callback:
        transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    assert [f.rule for f in callback.findings] == ["BN404"]
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.filterwarnings("ignore")
def test_what_accelerate_prepared_can_be_watched() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = net()
    model, optimizer = accelerator.prepare(model, sgd(model))
    with watch(model, optimizer) as watching:
        for seed in range(4):
            with accelerator.accumulate(model):
                accelerator.backward(model(images(seed=seed)).square().mean())
                optimizer.step()
                optimizer.zero_grad()
    assert watching.loop.steps == 2
    assert rules(watching) == ["BN404"]


def test_sync_batch_norm_on_a_cpu_with_a_group_is_an_error_and_converted_back() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(net()).train()
    (alone,) = diagnose(model).findings[-1:]
    assert (alone.rule, alone.severity, alone.value) == ("BN407", "info", 2.0)
    zoo.join_group_of_one()
    (found,) = [f for f in diagnose(model).findings if f.rule == "BN407"]
    assert found.severity == "error"
    with pytest.raises(ValueError, match="SyncBatchNorm"):
        model(images())
    before = photograph(model)
    undo = found.fix_(model)  # type: ignore[misc]
    model(images())
    undo.restore_()
    assert differences(before, photograph(model)) == []
    zoo.leave_group()


def test_two_forwards_under_ddp_before_one_backward_are_found() -> None:
    zoo.join_group_of_one()
    for syncs, expected in ((True, ["BN404", "BN409"]), (False, ["BN404"])):
        model = nn.parallel.DistributedDataParallel(net())
        for name in {"broadcast_buffers", "forward_sync_buffers"} & set(vars(model)):  # its name in newer versions
            vars(model)[name] = syncs
        watching = train(model, views=2)
        assert sorted(rules(watching)) == expected
    assert sorted(rules(train(nn.parallel.DistributedDataParallel(net()), parts=2))) == ["BN404"]
    zoo.leave_group()


def _rank(rank: int, file: str, results: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(net())
    watching = train(model)
    results.put([(f.rule, f.site, f.value) for f in watching.findings])
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.slow
def test_few_samples_on_each_of_two_ranks_are_found(tmp_path: Any) -> None:
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_rank, args=(rank, str(tmp_path / "meet"), results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert found == [[("BN408", "block.1", 8.0)]] * 2 or found == [[("BN408", "stem.1", 8.0)]] * 2
