"""Fine-tuning: what it moves, what it gives back, and that stopping and going on changes nothing."""

from __future__ import annotations

import copy
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import renorm
from renorm.choices import Facts, choose_rate
from renorm.errors import (
    BatchError,
    CheckpointError,
    Diverged,
    MissingExtra,
    OneShot,
    OpenChange,
    UnknownName,
    UsageError,
)
from renorm.events import Epoch, Finished, Started, Stepped
from renorm.feed import Feed
from renorm.finetune import finetune_, training
from renorm.policy import POLICIES
from renorm.recipe import Recipe
from renorm.state import own_randomness
from tests import zoo
from tests.contracts.photograph import bits, differences, photograph, process

Batch = tuple[Tensor, Tensor]


def net(outputs: int = 3) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        norms = (nn.BatchNorm2d(4), nn.BatchNorm2d(4))
        parts = [nn.Conv2d(3, 4, 3), norms[0], nn.ReLU(), nn.Conv2d(4, 4, 3), norms[1], nn.ReLU(), nn.Dropout(0.1)]
        return zoo.lived(nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, outputs))).eval()


def data(samples: int = 40, classes: int = 3, *, size: int = 8, seed: int = 0) -> list[Batch]:
    """Batches of images whose brightness by channel tells their class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % classes
    images = torch.randn(samples, 3, 8, 8, generator=generator)
    images += 2 * F.one_hot(labels % 3, 3)[:, :, None, None] + (labels // 3)[:, None, None, None]
    return list(zip(images.split(size), labels.split(size), strict=True))


def weights(model: nn.Module) -> dict[str, Any]:
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


# ── what it does ──


def test_what_moves_from_nothing_has_moved_as_far_as_it_is_large() -> None:
    model = net()
    nn.init.zeros_(model[1].bias)
    assert finetune_(model, data(), policy="all", epochs=1, head="keep").moved["1.bias"] == pytest.approx(1)


def test_it_learns_moves_what_it_says_and_is_undone() -> None:
    model = net()
    before, around = photograph(model), process()
    result = finetune_(model, data(60), data(30, seed=1), epochs=4, lr=0.02, head="keep")
    assert result.value is not None
    assert result.score is not None
    assert result.value == result.score.value > 0.8
    assert result.value > renorm.evaluate(net(), data(30, seed=1)).value
    assert [epoch.epoch for epoch in result.history] == [0, 1, 2, 3]
    assert result.history[-1].loss < result.history[0].loss
    assert (result.lr, result.head, result.steps) == (0.02, "keep", 32)
    assert set(result.moved) == {n for n in model.state_dict() if "num_batches" not in n}
    assert all(0 < far < float("inf") for far in result.moved.values())
    assert not any(module.training for module in model.modules())
    assert process() == around
    result.restore_()
    assert differences(before, photograph(model)) == []
    result.restore_()


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"statistics-only", "few-labels"}))
def test_only_what_the_policy_lets_move_moves(policy: str) -> None:
    model = net()
    result = finetune_(model, data(), policy=policy, epochs=1, lr=0.05, head="keep")
    statistics = {n for n in result.moved if "running" in n}
    affine = {n for n in result.moved if n in ("1.weight", "1.bias", "4.weight", "4.bias")}
    head = {n for n in result.moved if n.startswith("9.")}
    chosen = POLICIES[policy]
    assert bool(head) == ("head" in chosen.trains)
    assert bool(set(result.moved) - statistics - affine - head) == ("rest" in chosen.trains)
    assert len(affine) == (0 if "affine" not in chosen.trains else 2 if chosen.last else 4)
    assert len(statistics) == (0 if chosen.statistics == "source" else 2 if chosen.last else 4)


def test_statistics_that_moved_are_those_of_the_training_data_exactly() -> None:
    model, train = net(), data()
    finetune_(model, train, policy="all", epochs=1, lr=0.01, head="keep")
    images = torch.cat([x for x, _ in train])
    with torch.no_grad():
        inside = model[0](images).transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(model[1].running_mean.double(), inside.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model[1].running_var.double(), inside.var(1), rtol=1e-5, atol=1e-5)


def test_the_policy_of_the_target_re_estimates_first_and_then_holds() -> None:
    model, twin, train = net(), net(), data()
    finetune_(model, train, policy="recalibrate-then-freeze", epochs=2, lr=0.01, head="keep")
    renorm.recalibrate_(twin, train)
    torch.testing.assert_close(model[1].running_mean, twin[1].running_mean, rtol=1e-5, atol=1e-6)


def test_a_run_is_the_same_again_and_another_seed_is_not() -> None:
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed + len(runs))  # whatever the caller's generator does
        model = net()
        finetune_(model, data(), epochs=2, lr=0.01, head="new", classes=["a", "b", "c"], seed=seed)
        runs.append(weights(model))
    assert runs[0] == runs[1] != runs[2]


def test_one_epoch_on_fixed_statistics_is_a_plain_loop() -> None:
    """The loop adds nothing: the same steps written down by hand give the same weights."""
    model, twin, (batch, *_) = net(), net(), data()
    model[6] = twin[6] = nn.Identity()
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.0, "optimiser": _sgd}
    finetune_(model, [batch], policy="frozen-statistics", epochs=3, head="keep", **options)
    optimiser = _sgd([{"params": list(twin.parameters())}])
    for step in range(3):
        twin.train()
        twin[1].eval()
        twin[4].eval()
        for group in optimiser.param_groups:
            group["lr"] = 0.1 * ((1.0, 1.0, 0.5)[step])  # warm at once; then half a cosine over two steps
        optimiser.zero_grad()
        F.cross_entropy(twin(batch[0]), batch[1]).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimiser.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def _sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def test_events_come_in_order_and_say_what_was_decided() -> None:
    events = list(training(net(), data(), data(12, seed=1), Recipe(epochs=2, lr=0.01, head="keep")))
    assert [type(event) for event in events] == [Started, *([Stepped] * 5 + [Epoch]) * 2, Finished]
    started = events[0]
    assert isinstance(started, Started)
    assert (started.steps, started.done, started.facts.samples, started.facts.present) == (10, 0, 40, 3)
    rates = [event.lr for event in events if isinstance(event, Stepped)]
    assert max(rates) == rates[0] == 0.01
    assert rates[-1] < 0.001


def test_whoever_stops_listening_has_the_model_as_it_was() -> None:
    model = net()
    before, around = photograph(model), process()
    events = training(model, data(), None, Recipe(epochs=2, lr=0.1))
    for _ in range(4):
        next(events)
    assert differences(before, photograph(model)) != []
    events.close()  # type: ignore[attr-defined]
    assert differences(before, photograph(model)) == []
    assert process() == around


# ── data as they come ──


def test_a_list_is_mixed_anew_and_a_loader_is_read_as_it_is() -> None:
    seen: list[list[float]] = []

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.fc = nn.BatchNorm1d(1), nn.Linear(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                seen.append(x.flatten().tolist())
            return self.fc(self.bn(x))

    values, labels = torch.arange(9.0)[:, None], torch.arange(9) % 2
    batches = list(zip(values.split(4), labels.split(4), strict=True))
    finetune_(Looks(), batches, policy="frozen", epochs=2, head="keep")
    assert [len(batch) for batch in seen] == [4, 5, 4, 5]  # a last sample alone joins those before it
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == values.flatten().tolist()
    assert seen[0] != values[:4].flatten().tolist()
    assert sorted(seen[0]) != sorted(seen[2])
    seen.clear()
    finetune_(Looks(), DataLoader(TensorDataset(values, labels), batch_size=3), policy="frozen", epochs=2, head="keep")
    assert [batch for batch in seen if len(batch) == 3] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]] * 2


@pytest.mark.parametrize("devices", [False, True])
def test_a_place_draws_the_numbers_that_its_seed_draws_anywhere(devices: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("renorm.feed._devices", lambda: devices)
    with own_randomness():
        Feed(data(), 1, seed=3).begin(1, 2)
        drawn = torch.rand(4)
        torch.manual_seed(int(np.random.SeedSequence([3, 1, 2]).generate_state(3)[0]))
        assert torch.equal(drawn, torch.rand(4))


def test_batches_that_cannot_be_taken_apart_come_whole_in_a_new_order() -> None:
    seen: list[int] = []

    def forward(model: nn.Module, batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(batch["number"])
        return model(batch["image"])

    batches = [{"image": x, "labels": y, "number": i} for i, (x, y) in enumerate(data(48))]
    finetune_(net(), batches, policy="frozen", epochs=2, head="keep", forward=forward)
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    assert seen[:6] != seen[6:]


def test_an_iterator_serves_one_epoch_and_no_more() -> None:
    result = finetune_(net(), iter(data()), epochs=1, head="keep", lr=0.01)
    assert result.steps == 5
    assert "read only once" in result.notes[0]
    with pytest.raises(OneShot, match="training for 2 epochs reads its batches several times"):
        finetune_(net(), iter(data()), epochs=2)
    with pytest.raises(OneShot, match="val= reads its batches several times"):
        finetune_(net(), data(), iter(data()))


def test_dicts_tokens_and_layer_norm_train_too() -> None:
    case = zoo.named("tokens")
    model = case.build()
    train = [(case.batch(6, seed), torch.randint(0, 3, (6, 6))) for seed in range(3)]
    result = finetune_(
        model, train, policy="affine-only", epochs=1, head="keep", loss=lambda out, y: out.square().mean()
    )
    assert all(name.split(".")[0] in ("1", "4", "7") for name in result.moved)
    assert result.facts.shift is None


def test_regression_and_multi_label_losses() -> None:
    x = torch.randn(24, 3, 8, 8)
    real = [(a, a.mean((2, 3))) for a in x.split(8)]
    result = finetune_(net(), real, real, epochs=3, lr=0.02, metric="mse")
    assert (result.head, result.why["head"]) == ("keep", "the labels are no class indices")
    assert result.history[-1].loss < result.history[0].loss
    several = [(a, (a.mean((2, 3)) > 0).float()) for a in x.split(8)]
    for loss in ("bce", "l1"):
        assert finetune_(net(), several, epochs=1, loss=loss).steps == 3


# ── head, policy, rate ──


def test_a_new_head_has_the_classes_of_the_labels_and_goes_again() -> None:
    model = net(10)
    model.num_classes, model.pretrained_cfg = 10, {"num_classes": 10, "label_names": tuple("abcdefghij")}
    before, old = photograph(model), model[9]
    result = finetune_(model, data(), epochs=1, classes=["x", "y", "z"])
    assert (result.head, result.why["head"]) == ("new", "the label names are not the model's")
    assert model[9].out_features == model.num_classes == 3
    assert model.pretrained_cfg["label_names"] == ("x", "y", "z")
    again = finetune_(model, data(), epochs=1, classes=["x", "y", "z"])
    assert again.head == "keep"
    with pytest.raises(OpenChange, match="finetune_ came after it"):
        result.restore_()
    again.restore_()
    result.restore_()
    assert model[9] is old
    assert differences(before, photograph(model)) == []


def test_a_convolution_can_be_the_head_and_a_norm_layer_cannot() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 7, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    result = finetune_(model, data(), epochs=1, head="new", head_name="2")
    assert model[2].out_channels == 3
    result.restore_()
    with pytest.raises(UsageError, match="but '1' is a BatchNorm2d"):
        finetune_(model, data(), head="new", head_name="1")
    with pytest.raises(UsageError, match="a new head was asked for, and none is found in Sequential"):
        finetune_(nn.Sequential(nn.Conv2d(3, 3, 8), nn.Flatten()), data(), head="new")


@pytest.mark.parametrize(
    ("samples", "size", "far", "policy"),
    [
        (64, 20, 0.0, "all"),
        (64, 8, 0.0, "frozen-statistics"),
        (64, 8, 9.0, "recalibrate-then-freeze"),
        (63, 8, 0.0, "few-labels"),
        (63, 20, 9.0, "few-labels"),
    ],
)
def test_the_policy_follows_labels_batch_and_shift(samples: int, size: int, far: float, policy: str) -> None:
    model, train = net(), data(samples, size=size)
    renorm.recalibrate_(model, train, prior=0)  # now the data are what the statistics say
    train = [(x + far, y) for x, y in train]
    result = finetune_(model, train, epochs=1)
    assert result.policy.name == policy
    why = f"{result.facts.shift:.2f} source sd" if samples >= 64 else "63 labels in all"
    assert why in result.why["policy"]


def test_a_few_labels_train_a_head_that_cannot_be_solved() -> None:
    maps = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 7, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    result = finetune_(maps, data(24), epochs=1, head="new", head_name="2")
    assert (result.policy.name, result.steps) == ("head-only", 3)


def test_the_rate_follows_the_batch_and_what_trains() -> None:
    def chosen(**options: Any) -> float:
        return finetune_(net(), data(64, size=16), epochs=1, head="keep", **options).lr

    assert chosen(policy="all") == 0.0015
    assert chosen(policy="affine-and-head") == 0.0045
    assert chosen(lr=0.3) == 0.3
    facts = Facts(samples=9, batch=64, classes=3, present=3, outputs=3, right=0.5, weights=2_000_000, shift=0.1)
    assert choose_rate("auto", facts, POLICIES["all"]).value == 0.001
    bare = choose_rate("auto", dataclasses.replace(facts, shift=None), POLICIES["all"])
    assert (bare.value, bare.why) == (
        0.0001,
        "0.0001 for nets without batch norm at batches of 64, by the root of 64 / 64",
    )


def test_gradual_unfreezing_goes_from_the_head_to_the_first_stage() -> None:
    model, moved = net(), []
    before = {n: p.clone() for n, p in model.named_parameters()}
    for event in training(model, data(), None, Recipe(epochs=4, lr=0.05, gradual=True, policy="all", head="keep")):
        if isinstance(event, Epoch):
            moved.append({n for n, p in model.named_parameters() if not torch.equal(p, before[n])})
    assert moved[0] == {"9.weight", "9.bias"}
    assert moved[0] < moved[1] < moved[2] == set(before)
    with pytest.raises(
        UsageError, match="gradual unfreezing begins with the head, which policy 'affine-only' does not"
    ):
        finetune_(net(), data(), policy="affine-only", gradual=True, head="keep")


# ── bad input ──


def labelled(*labels: int, samples: int = 12) -> list[Batch]:
    y = torch.tensor([labels[i % len(labels)] for i in range(samples)])
    return [(torch.randn(samples, 3, 8, 8), y)]


@pytest.mark.parametrize(
    ("train", "options", "words"),
    [
        (labelled(2), {}, r"the label of all training samples \(12\) is 2"),
        (labelled(0, -1), {}, "the labels hold -1"),
        (labelled(0, 2), {"head": "new"}, "1 of 3 classes have no training sample, 1 first"),
        (labelled(0, 1), {"classes": ["a", "b", "c"]}, r"1 of 3 classes have no training sample, 2 \('c'\) first"),
        (labelled(0, 5), {"head": "keep"}, r"the labels run to 5, but there are 3 classes \(0 to 2\)"),
        (labelled(0, 5), {"classes": ["a", "b"]}, r"the labels run to 5, but there are 2 classes"),
        ([(torch.randn(4, 3, 8, 8),)], {}, "training needs labels, but batch 0 has none"),
        ([], {}, "training was given batches, but there was none"),
        (
            [(x[None], y[None]) for x, y in zip(*data(6, size=6)[0], strict=True)],
            {"policy": "all"},
            "hold one sample each",
        ),
    ],
)
def test_data_that_nothing_can_be_learnt_from(train: list[Any], options: dict[str, Any], words: str) -> None:
    model = net()
    before = photograph(model)
    with pytest.raises(BatchError, match=words):
        finetune_(model, train, epochs=1, **options)
    assert differences(before, photograph(model)) == []


def test_batches_of_one_train_on_fixed_statistics() -> None:
    single = [(x[None], y[None]) for x, y in zip(*data(6, size=6)[0], strict=True)]
    assert finetune_(net(), single, epochs=1, head="keep", policy="frozen-statistics").steps == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "epochs is a whole number of at least 1; got 0"),
        ({"seed": -1}, "seed is a whole number of at least 0"),
        ({"lr": -1.0}, 'lr is "auto" or a number above 0'),
        ({"lr": float("inf")}, 'lr is "auto" or a number above 0'),
        ({"clip": 0.0}, "clip is the largest norm of a gradient"),
        ({"head": "fresh"}, 'head is "auto", "new" or "keep"'),
        (
            {"head": "new", "loss": "mse", "train": [(torch.randn(4, 3, 8, 8), torch.randn(4, 3))]},
            "name them with classes=",
        ),
        ({"regularisers": ["bss", "bss"]}, "'bss' was given twice"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    train = options.pop("train", data())
    with pytest.raises(UsageError, match=words):
        finetune_(net(), train, **options)


@pytest.mark.parametrize(
    ("option", "what"),
    [("policy", "policy"), ("loss", "loss"), ("metric", "metric"), ("optimiser", "optimiser"), ("memory", "memory")],
)
def test_names_that_are_unknown(option: str, what: str) -> None:
    with pytest.raises(UnknownName, match=f"there is no {what} 'nothing'"):
        finetune_(net(), data(), **{option: "nothing"})


def test_unknown_regularisers_are_refused_by_name() -> None:
    with pytest.raises(UnknownName, match="there is no regulariser 'l2-sp'; did you mean 'l2_sp'"):
        finetune_(net(), data(), regularisers="l2-sp")


def test_a_loss_that_is_no_number_names_the_step_and_the_place(tmp_path: Path) -> None:
    class Bursts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (float("nan") if self.training and model.count >= 6 else 1)

    model: Any = net()
    model.count = 0
    model[2] = Bursts()
    model.register_forward_pre_hook(lambda m, a: setattr(m, "count", m.count + m.training))
    train = [(x.abs(), y) for x, y in data(24)]
    before = weights(model)
    with pytest.raises(
        Diverged, match=r"became nan at step 6, in epoch 2: '2' is the first place.*checkpoint stands in"
    ):
        finetune_(model, train, epochs=3, head="keep", policy="all", run=tmp_path / "run", save_every=1)
    assert weights(model) == before
    with safe_open(tmp_path / "run" / "checkpoint.safetensors", framework="pt") as opened:
        assert all(torch.isfinite(opened.get_tensor(n).float()).all() for n in opened.keys())
    with pytest.raises(Diverged, match="every layer's output is finite"):
        finetune_(net(), data(), head="keep", loss=lambda out, y: out.sum() * float("nan"))


class StopError(Exception):
    """Something of the user's own."""


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
@pytest.mark.parametrize("case", ["bn2d", "sync", "momentum-none", "frozen-four", "mixed-modes", "never-called"])
def test_a_failure_at_any_step_leaves_the_model_bit_identical(case: str, error: type[BaseException]) -> None:
    model = zoo.named(case).build()
    if next(iter(model.parameters()), None) is not None:
        next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    train = [(zoo.named(case).batch(6, s), torch.arange(6) % 3) for s in range(3)]
    before, around = photograph(model), process()
    calls = iter(range(100))

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        if next(calls) == 4:
            raise error("stop")
        return output.flatten(1).square().mean()

    with pytest.raises(error, match="stop"):
        finetune_(model, train, epochs=2, lr=0.1, head="keep", policy="all", loss=loss)
    assert differences(before, photograph(model)) == []
    assert process() == around


def test_without_accelerate_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(
        MissingExtra, match=r'fine-tuning needs accelerate, which is not installed: pip install "renorm\[train\]"'
    ):
        finetune_(net(), data())


# ── stopping and going on ──


def interrupted(model: nn.Module, train: Any, run: Path, *, after: int, **options: Any) -> None:
    """Train until `after` steps were taken, and be interrupted there."""
    events = training(model, train, None, Recipe(run=run, save_every=1, **options))
    while not (isinstance(event := next(events), Stepped) and event.step == after):
        pass
    with pytest.raises(KeyboardInterrupt):
        events.throw(KeyboardInterrupt)  # type: ignore[attr-defined]


@pytest.mark.parametrize("after", [1, 4, 5, 7])
@pytest.mark.parametrize("policy", ["all", "recalibrate-then-freeze"])
def test_a_run_that_was_stopped_goes_on_to_the_same_result(after: int, policy: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 2, "lr": 0.02, "head": "new", "policy": policy, "seed": 3}
    whole, parts = net(), net()
    wanted = finetune_(whole, data(), **options)
    interrupted(parts, data(), tmp_path, after=after, **options)
    assert weights(parts) == weights(net())
    got = finetune_(parts, data(), **options, run=tmp_path, save_every=1)
    assert weights(parts) == weights(whole)
    assert [e.loss for e in got.history] == [e.loss for e in wanted.history]
    again = finetune_(fresh := net(), data(), **options, run=tmp_path, save_every=1)  # finished: nothing is left to do
    assert weights(fresh) == weights(whole)
    assert again.steps == 10


def test_a_loader_with_a_generator_of_its_own_goes_on_where_it_was(tmp_path: Path) -> None:
    def loader() -> DataLoader[Any]:
        x, y = (torch.cat(part) for part in zip(*data(), strict=True))
        generator = torch.Generator().manual_seed(5)
        return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, generator=generator)

    options: dict[str, Any] = {"epochs": 3, "lr": 0.02, "head": "keep", "policy": "all"}
    whole, parts = net(), net()
    finetune_(whole, loader(), **options)
    interrupted(parts, loader(), tmp_path, after=8, **options)
    finetune_(parts, loader(), **options, run=tmp_path, save_every=1)
    assert weights(parts) == weights(whole)


def test_another_model_data_or_recipe_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 1, "lr": 0.02, "head": "keep", "run": tmp_path}
    finetune_(net(), data(), **options)
    other = net()
    nn.init.zeros_(other[0].bias)
    with pytest.raises(CheckpointError, match="belongs to another run: its model was"):
        finetune_(other, data(), **options)
    with pytest.raises(CheckpointError, match="its data was"):
        finetune_(net(), data(seed=2), **options)
    with pytest.raises(CheckpointError, match=r"its lr was 0\.02, and is 0\.03 now \(and seed\)"):
        finetune_(net(), data(), **{**options, "lr": 0.03, "seed": 1})
    (tmp_path / "checkpoint.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="is no checkpoint of a run, or damaged"):
        finetune_(net(), data(), **options)


def test_two_runs_cannot_share_a_folder_and_a_file_is_none(tmp_path: Path) -> None:
    first = training(net(), data(), None, Recipe(run=tmp_path / "run", epochs=1))
    next(first)
    with pytest.raises(UsageError, match=r"another process is training in .*run"):
        finetune_(net(), data(), run=tmp_path / "run", epochs=1)
    first.close()  # type: ignore[attr-defined]
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot hold a run"):
        finetune_(net(), data(), run=tmp_path / "file", epochs=1)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
    ],
)
def test_a_full_disk_keeps_the_checkpoint_of_before(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    interrupted(net(), data(), tmp_path, after=2, epochs=1, lr=0.01, head="keep")
    good = (tmp_path / "checkpoint.safetensors").read_bytes()

    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    model = net()
    with pytest.raises(CheckpointError, match=r"(No space left on device|os error 27\))\. The one of before stands"):
        finetune_(model, data(), epochs=1, lr=0.01, head="keep", run=tmp_path, save_every=1)
    assert weights(model) == weights(net())
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == good
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "checkpoint.safetensors"]


KILLED = """
import sys, time
from pathlib import Path
from tests.test_finetune import data, net
from renorm.events import Stepped
from renorm.finetune import training
from renorm.recipe import Recipe
for event in training(net(), data(), None, Recipe(run=Path(sys.argv[1]), save_every=1, epochs=3, lr=0.02, head="new")):
    if isinstance(event, Stepped):
        print(event.step, flush=True)
        time.sleep(0.05 if event.step > 3 else 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_killed_process_goes_on_to_the_same_result(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"}
    words = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment, cwd=root) as running:
        assert running.stdout is not None
        while "5" not in running.stdout.readline():
            assert running.poll() is None
        time.sleep(0.02)
        running.send_signal(signal.SIGKILL)
    whole, parts = net(), net()
    wanted = finetune_(whole, data(), epochs=3, lr=0.02, head="new")
    events = list(training(parts, data(), None, Recipe(run=tmp_path, save_every=1, epochs=3, lr=0.02, head="new")))
    assert isinstance(events[0], Started)
    assert events[0].done >= 4
    last = events[-1]
    assert isinstance(last, Finished)
    assert weights(parts) == weights(whole)
    assert last.result.steps == wanted.steps == 15


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    model = net()

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        return output.sum() * 0 + model[0].weight.sum().abs().sqrt() * 0 + _bad_gradient(model[0].bias)

    with pytest.raises(Diverged, match="holds numbers that are not finite; the checkpoint of before stands"):
        finetune_(model, data(), head="keep", loss=loss, run=tmp_path, save_every=1, clip=None)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def _bad_gradient(x: Tensor) -> Tensor:
    return (x * 0).sqrt().sum()  # its value is 0, its gradient infinite times 0


# ── accelerate ──


def test_accumulation_is_the_accelerators_and_the_same_as_a_larger_batch() -> None:
    from accelerate import Accelerator

    (x, y), *_ = data(16, size=16)
    options: dict[str, Any] = {"policy": "frozen-statistics", "epochs": 1, "lr": 0.1, "head": "keep"}
    options |= {"optimiser": lambda g: torch.optim.SGD(g, lr=0.1), "clip": None}
    halves, whole = net(), net()
    halves[6] = whole[6] = nn.Identity()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    got = finetune_(halves, [(x[:8], y[:8]), (x[8:], y[8:])], accelerator=accelerator, **options)
    want = finetune_(whole, [(x, y)], **options)
    assert got.steps == want.steps == 1
    for mine, theirs in zip(halves.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_bfloat16_by_the_caller_trains_float32_weights() -> None:
    model = net()
    result = finetune_(model, data(), epochs=1, lr=0.01, head="keep", autocast=torch.bfloat16)
    assert result.steps == 5
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_copy_shares_nothing_with_what_was_trained() -> None:
    model = net()
    twin = copy.deepcopy(model)
    finetune_(model, data(), epochs=1, head="keep")
    assert weights(twin) == weights(net())


RANKS = """
import sys
import torch
from torch import nn
from tests.test_finetune import data, net
from renorm.finetune import finetune_
model = net()
model[6] = nn.Identity()
options = {"policy": sys.argv[2], "epochs": 2, "lr": 0.1, "head": "new", "clip": None, "run": sys.argv[1] + ".run"}
result = finetune_(model, data(32, size=8), data(12), optimiser=lambda groups: torch.optim.SGD(groups, lr=0.1), **options)
rank = torch.distributed.get_rank()
torch.save([model.state_dict(), result.steps, result.value], f"{sys.argv[1]}.{rank}")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("policy", ["frozen-statistics", "all"])
def test_two_processes_are_one_with_batches_twice_as_large(policy: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "ACCELERATE_USE_CPU": "1"}
    (tmp_path / "ranks.py").write_text(RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*launch, str(tmp_path / "ranks.py"), str(tmp_path / "out"), policy]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    (first, steps, value), (second, *same) = (torch.load(tmp_path / f"out.{rank}") for rank in (0, 1))
    assert [steps, value] == same
    assert steps == 4  # of 4 batches each process takes 2, twice
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-6, atol=1e-7)
    if policy == "frozen-statistics":
        twin = net()
        twin[6] = nn.Identity()
        options: dict[str, Any] = {"policy": policy, "epochs": 2, "lr": 0.1, "head": "new", "clip": None}
        pairs = [[torch.cat(part) for part in zip(a, b, strict=True)] for a, b in _orders(data(32, size=8))]
        finetune_(twin, _Pairs(pairs), optimiser=lambda groups: torch.optim.SGD(groups, lr=0.1), **options)
        for name, tensor in twin.state_dict().items():
            torch.testing.assert_close(tensor, first[name], rtol=1e-4, atol=1e-5)


def _orders(train: list[Batch]) -> Any:
    """The batches of both epochs as two processes share them, in pairs."""
    feed = Feed(train, 2, 0)
    batches = [batch for epoch in range(2) for batch in feed.epoch(epoch)]
    return list(zip(batches[::2], batches[1::2], strict=True))


class _Pairs:
    """Pairs of an epoch, then those of the next."""

    def __init__(self, pairs: list[Any]) -> None:
        self.pairs, self.reads = pairs, 0

    def __iter__(self) -> Any:
        self.reads += 1
        half = len(self.pairs) // 2
        # the first reading is the look before training
        return iter(self.pairs[half:] if self.reads == 3 else self.pairs[:half])
