"""freeze: it survives what training loops and tools do to a model, and it nests."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import renorm
from renorm import layers
from renorm.errors import NoBatchNorm, OpenChange, UsageError
from renorm.freeze import Freeze, freeze_, frozen, unfreeze_
from renorm.sites import find_sites
from tests import zoo
from tests.contracts.photograph import bits, differences, photograph


@pytest.fixture
def model() -> nn.Module:
    return zoo.named("bn2d").build()


@pytest.fixture
def group() -> Iterator[None]:
    zoo.join_group_of_one()
    yield
    zoo.leave_group()


def x(samples: int = 8, seed: int = 0) -> Tensor:
    return zoo.named("bn2d").batch(samples, seed)


def statistics(model: nn.Module) -> dict[str, Any]:
    return {f"{s.name}/{i}": bits(t) for s in find_sites(model) for i, t in enumerate(s.tensors or ())}


def affine(model: nn.Module) -> dict[str, Any]:
    return {f"{s.name}/{k}": bits(p) for s in find_sites(model) for k, p in s.affine.items()}


def step(model: nn.Module, optimiser: torch.optim.Optimizer, batch: Tensor) -> None:
    optimiser.zero_grad(set_to_none=False)
    model(batch).square().sum().backward()
    optimiser.step()


# ── the two switches ──


def test_statistics_alone_let_the_affine_train_on_fixed_statistics(model: nn.Module) -> None:
    freeze_(model, affine=False)
    stay, move = statistics(model), affine(model)
    model.train()
    step(model, torch.optim.SGD(model.parameters(), 0.1), x())
    assert statistics(model) == stay
    assert all(affine(model)[key] != move[key] for key in move)


def test_affine_alone_lets_the_statistics_move(model: nn.Module) -> None:
    handle = freeze_(model, statistics=False)
    assert handle.statistics == ()
    assert handle.parameters == ("1.weight", "1.bias", "4.weight", "4.bias")
    stay, move = affine(model), statistics(model)
    model.train()
    step(model, torch.optim.SGD(model.parameters(), 0.1), x())
    assert affine(model) == stay
    assert all(statistics(model)[key] != move[key] for key in move)
    assert all("train" not in vars(module) for module in model.modules())


def test_a_gradient_of_before_moves_nothing_and_is_given_back(model: nn.Module) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model.train()
    step(model, optimiser, x())
    model(x(seed=1)).sum().backward()  # a gradient that waits for its step
    before, stay = photograph(model), affine(model)
    with frozen(model):
        optimiser.step()
        assert affine(model) == stay
    kept = [k for k in differences(before, photograph(model)) if k.startswith(("1: ", "4: "))]
    assert kept == []


def test_patterns_choose_the_layers() -> None:
    model = zoo.named("timm-resnet").build()
    handle = freeze_(model, include=["layer*", "bn1"], exclude="*.downsample.*")
    assert "bn1" in handle.statistics
    assert "layer1.0.bn1" in handle.statistics
    assert not [name for name in handle.statistics if "downsample" in name or name.startswith("conv1")]
    model.train()
    modes = {site.name: site.module.training for site in find_sites(model)}
    assert {name for name, training in modes.items() if not training} == set(handle.statistics)


def test_a_shared_module_is_held_once() -> None:
    model = zoo.named("shared").build()
    handle = freeze_(model)
    assert handle.statistics == ("first",)
    assert handle.parameters == ("first.weight", "first.bias")


def test_an_activation_inside_the_layer_still_hears_the_mode() -> None:
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(layers.BatchNormAct2d(3, drop_layer=nn.Dropout))
    freeze_(model)
    model.train()
    assert not model[0].training
    assert model[0].drop.training


# ── nesting ──


def test_freezes_nest_and_are_undone_in_turn(model: nn.Module) -> None:
    start = photograph(model)
    outer = freeze_(model, affine=False, include="1")
    between = photograph(model)
    inner = freeze_(model)
    with pytest.raises(OpenChange, match="undoing freeze_ was asked for, but freeze_ came after it at '1'"):
        outer.restore_()
    inner.restore_()
    assert differences(between, photograph(model)) == []
    model.train()
    assert not model[1].training
    assert model[4].training
    model.eval()
    outer.restore_()
    assert differences(start, photograph(model)) == []


def test_freezes_at_different_layers_are_undone_in_any_order(model: nn.Module) -> None:
    start = photograph(model)
    first, second = freeze_(model, include="1"), freeze_(model, include="4")
    first.restore_()
    model.train()
    assert model[1].training
    assert not model[4].training
    model.eval()
    second.restore_()
    assert differences(start, photograph(model)) == []


def test_unfreezing_lets_go_of_every_freeze_also_those_nobody_holds(model: nn.Module) -> None:
    start = photograph(model)
    handle = freeze_(model, affine=False)
    freeze_(model)
    gc.collect()
    with pytest.raises(OpenChange, match="or let go of all with unfreeze_"):
        handle.restore_()
    unfreeze_(model)
    assert not handle.is_open
    handle.restore_()
    assert differences(start, photograph(model)) == []


def test_other_changes_and_freezes_wait_for_each_other(model: nn.Module) -> None:
    start = photograph(model)
    before = renorm.recalibrate_(model, [x()])
    handle = freeze_(model)
    with pytest.raises(OpenChange, match="undoing recalibrate_ was asked for, but freeze_ came after it at '1'"):
        before.restore_()
    after = renorm.recalibrate_(model, [x(seed=1)])
    for undo in (handle.restore_, lambda: unfreeze_(model)):
        with pytest.raises(OpenChange, match="undoing freeze_ was asked for, but recalibrate_ came after it at '1'"):
            undo()
    assert not model[1].train().training
    model[1].eval()
    after.restore_()
    handle.restore_()
    before.restore_()
    assert differences(start, photograph(model)) == []


def test_a_copy_that_was_changed_since_is_let_go_only_after_that(model: nn.Module) -> None:
    freeze_(model)
    twin = copy.deepcopy(model)
    adaptation = renorm.recalibrate_(twin, [x()])
    with pytest.raises(OpenChange, match="but recalibrate_ came after it"):
        unfreeze_(twin)
    adaptation.restore_()
    unfreeze_(twin)
    assert twin.train()[1].training


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_block_lets_go_whatever_happens_in_it(model: nn.Module, error: type[BaseException]) -> None:
    start = photograph(model)

    def failing() -> None:
        with frozen(model) as handle:
            assert isinstance(handle, Freeze)
            assert handle.is_open
            raise error("enough")

    with pytest.raises(error, match="enough"):
        failing()
    assert differences(start, photograph(model)) == []


def test_a_failure_midway_leaves_nothing_held(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    start = photograph(model)
    from renorm import freeze

    def opened(module: nn.Module, change: Any) -> None:
        if module is model[4]:
            raise KeyboardInterrupt

    monkeypatch.setattr(freeze, "opened", opened)
    with pytest.raises(KeyboardInterrupt):
        freeze_(model)
    assert differences(start, photograph(model)) == []


def test_a_train_of_the_users_own_is_called_and_comes_back(model: nn.Module) -> None:
    asked: list[bool] = []

    def mine(mode: bool = True) -> nn.Module:
        asked.append(mode)
        return nn.Module.train(model[1], mode)

    model[1].train = mine  # type: ignore[method-assign]
    with frozen(model):
        model.train()
        assert not model[1].training
    assert asked == [True]
    assert model[1].train is mine
    assert model[1].training


# ── what loops and tools do ──


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled_before_and_after_it_holds(model: nn.Module) -> None:
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager")
    compiled.train()
    compiled(x())  # warm, and in training: the freeze must be noticed
    handle = freeze_(compiled)
    stay = statistics(model)
    compiled.train()
    out = compiled(x(seed=1))
    assert statistics(model) == stay
    model.eval()
    torch.testing.assert_close(out, model(x(seed=1)), rtol=0, atol=0)
    handle.restore_()
    compiled.train()
    compiled(x(seed=2))
    assert statistics(model) != stay
    torch._dynamo.reset()


def test_exported_in_training_the_frozen_layers_are_constants(model: nn.Module) -> None:
    freeze_(model)
    model.train()
    exported = torch.export.export(model, (x(),))
    assert set(exported.state_dict) == set(model.state_dict())
    assert dict(exported.graph_signature.buffers_to_mutate) == {}
    stay = statistics(model)
    torch.testing.assert_close(exported.module()(x(seed=1)), model(x(seed=1)))
    assert statistics(model) == stay


@pytest.mark.usefixtures("group")
def test_distributed_training_holds(model: nn.Module) -> None:
    freeze_(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    stay = statistics(model), affine(model)
    optimiser = torch.optim.SGD(wrapped.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    wrapped.train()
    for seed in range(3):
        step(wrapped, optimiser, x(seed=seed))
    assert (statistics(model), affine(model)) == stay
    unfreeze_(wrapped)
    assert model[1].training


@pytest.mark.usefixtures("group")
def test_statistics_alone_can_be_frozen_after_wrapping_too(model: nn.Module) -> None:
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimiser = torch.optim.SGD(wrapped.parameters(), 0.1)
    step(wrapped.train(), optimiser, x())
    freeze_(wrapped, affine=False)
    stay = statistics(model)
    for seed in range(3):
        step(wrapped.train(), optimiser, x(seed=seed))
    assert statistics(model) == stay


def test_update_bn_of_torch_resets_even_what_is_frozen(model: nn.Module) -> None:
    freeze_(model)
    torch.optim.swa_utils.update_bn([x()], model)
    assert not model[1].running_mean.any()  # as docs/policies.md warns: neither held nor re-estimated


def test_sync_conversion_makes_new_layers_which_are_not_frozen(model: nn.Module) -> None:
    handle = freeze_(model)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted.train()[1].training  # as the docstring of freeze_ says: freeze after converting
    handle.restore_()


def test_an_accelerate_loop_holds(model: nn.Module) -> None:
    accelerate = pytest.importorskip("accelerate")
    freeze_(model)
    stay = statistics(model), affine(model)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    data = torch.utils.data.TensorDataset(x(16), torch.randint(3, (16,)))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimiser, loader = accelerator.prepare(model, optimiser, loader)
    for _ in range(2):
        model.train()
        for images, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(images), labels))
                optimiser.step()
                optimiser.zero_grad()
        model.eval()
    unwrapped = accelerator.unwrap_model(model)
    assert (statistics(unwrapped), affine(unwrapped)) == stay
    unfreeze_(unwrapped)
    assert unwrapped.train()[1].training
    accelerator.free_memory()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's advice on loaders and loggers
def test_a_lightning_loop_with_validation_holds(model: nn.Module, tmp_path: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning = pytest.importorskip("lightning.pytorch", exc_type=ImportError)

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = model
            self.modes: list[bool] = []

        def training_step(self, batch: Any, number: int) -> Tensor:
            self.modes.append(self.net[1].training or not self.net[2].training)
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, number: int) -> None:
            self.net(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9, weight_decay=0.1)

    model.train()
    freeze_(model)
    stay, weights = (statistics(model), affine(model)), bits(model[0].weight)
    module = Module()
    data = torch.utils.data.TensorDataset(x(16), torch.randint(3, (16,)))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, enable_model_summary=False, **options
    )
    trainer.fit(module, loader, loader)
    assert module.modes == [False] * 8
    assert (statistics(model), affine(model)) == stay
    assert bits(model[0].weight) != weights
    unfreeze_(model)
    assert model.train()[1].training


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_callback_that_sets_requires_grad_itself_cannot_move_the_statistics(tmp_path: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning = pytest.importorskip("lightning.pytorch", exc_type=ImportError)
        callbacks = pytest.importorskip("lightning.pytorch.callbacks", exc_type=ImportError)

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            net = zoo.named("bn2d").build()
            self.backbone, self.head = net[:-1], net[-1]

        def training_step(self, batch: Any, number: int) -> Tensor:
            return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.01)

    module = Module()
    freeze_(module)
    stay = statistics(module)
    data = torch.utils.data.TensorDataset(x(16), torch.randint(3, (16,)))
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    tuning = callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1, train_bn=False)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_model_summary=False,
        callbacks=[tuning],
        **options,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    assert statistics(module) == stay
    told = {row.part: row.moves for row in renorm.policy_table(module)}
    assert told["affine"]  # as the docs say: the callback asked the affine to train again, and the table shows it


# ── refusals ──


def test_what_makes_no_sense_is_refused_and_leaves_the_model() -> None:
    model = zoo.named("slots").build()
    start = photograph(model)
    with pytest.raises(UsageError, match="neither statistics nor affine; give at least one"):
        freeze_(model, statistics=False, affine=False)
    with pytest.raises(UsageError, match="of 3 norm layers, '1@day' first, none is left by that"):
        freeze_(model, include="layer9*")
    with pytest.raises(UsageError, match=r"'1@day' but not '1@night', which is the same module.*match '1@\*'"):
        freeze_(model, include="1@day")
    assert differences(start, photograph(model)) == []
    freeze_(model, include="1@*")


def test_models_without_such_layers_are_refused() -> None:
    with pytest.raises(NoBatchNorm, match="freeze_ needs norm layers; Sequential has none"):
        freeze_(zoo.named("no-norm").build())
    with pytest.raises(NoBatchNorm, match=r"with running statistics; Sequential has none \(only layer, rms norm"):
        freeze_(zoo.named("tokens").build(), affine=False)
    freeze_(zoo.named("tokens").build())


def test_a_lazy_layer_is_refused_until_it_holds_statistics() -> None:
    model = zoo.named("lazy").build()
    with pytest.raises(UsageError, match="'1', a lazy layer that has seen no input and holds none yet"):
        freeze_(model)
    handle = freeze_(model, statistics=False)
    model.eval()(x())
    assert not model[1].weight.requires_grad
    handle.restore_()
    assert model[1].weight.requires_grad


def test_keras_learns_of_a_freeze_by_its_own_switch() -> None:
    model = zoo.named("keras-sequential").build()
    case = zoo.named("keras-sequential")
    trainable = len(model.trainable_variables)
    handle = freeze_(model, affine=False)
    stay = statistics(model)
    model(case.batch(), training=True)
    assert statistics(model) == stay
    assert len(model.trainable_variables) == trainable
    handle.restore_()
    with frozen(model):
        assert len(model.trainable_variables) == trainable - 6
    assert len(model.trainable_variables) == trainable
    model(case.batch(), training=True)
    assert statistics(model) != stay


@pytest.mark.parametrize("layer", [layers.PerDomain(4, domains=3), layers.Split(4)], ids=["per_domain", "split"])
def test_every_domains_affine_is_frozen_and_given_back(layer: nn.Module) -> None:
    model = nn.Sequential(layer, nn.Linear(4, 2))
    handle = freeze_(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"1.weight", "1.bias"}
    handle.restore_()
    assert all(p.requires_grad for p in model.parameters())
