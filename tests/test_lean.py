"""Room lean: the same outputs, gradients and statistics to the bit, less is kept, and each batch moves statistics once."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import renorm
from renorm.errors import NoBatchNorm, OpenChange, UsageError
from renorm.finetune import finetune_
from renorm.lean import lean_
from tests.contracts.photograph import differences, photograph
from tests.test_finetune import data, net, weights


class Residual(nn.Module):
    """A block as residual networks have them, with dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width, momentum=None)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return (x + scale * self.bn2(self.conv2(self.drop(self.bn1(self.conv1(x)).relu_())))).relu()


class Deep(nn.Module):
    """A stem, blocks in two stacks and a head."""

    def __init__(self, blocks: int = 4, width: int = 8) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(*(Residual(width) for _ in range(blocks)))
        self.layer2 = nn.ModuleList(Residual(width) for _ in range(blocks))
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.bn(self.stem(x)).relu())
        for block in self.layer2:
            x = block(x, scale=0.5)
        found: Tensor = self.fc(x.mean((2, 3)))
        return found


def plain(convolutions: int = 9) -> nn.Sequential:
    """Single layers in a row."""
    parts: list[nn.Module] = []
    act = nn.ReLU(inplace=True)  # one that stands in many places
    for number in range(convolutions):
        parts += [nn.Conv2d(3 if not number else 6, 6, 3, padding=1), nn.BatchNorm2d(6), act]
    parts.insert(3, nn.Sequential())  # one that does nothing, and whose length is 0
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Flatten(), nn.Linear(40, 3))


def library(name: str) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        timm = pytest.importorskip("timm")
        model: nn.Module = timm.create_model(name, num_classes=3)
        return model

    return made


IMAGES = (4, 3, 12, 12)
MODELS: dict[str, tuple[Callable[[], nn.Module], Sequence[int], int]] = {  # how many blocks
    "deep": (Deep, IMAGES, 8),
    "plain": (plain, IMAGES, 3),
    "transformer": (transformer, (4, 5, 8), 3),
    "resnet18": (library("resnet18"), (2, 3, 32, 32), 8),
    "efficientnet_b0": (library("efficientnet_b0"), (2, 3, 32, 32), 16),
    "densenet121": (library("densenet121"), (2, 3, 32, 32), 62),
    "convnext_atto": (library("convnext_atto"), (2, 3, 32, 32), 16),
    "vit_tiny_patch16_224": (library("vit_tiny_patch16_224"), (2, 3, 224, 224), 12),
}


def steps(model: nn.Module, shape: Sequence[int], *, number: int = 2) -> list[Tensor]:
    """Losses and, after the last step, all gradients."""
    torch.manual_seed(3)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    found = []
    for _ in range(number):
        optimiser.zero_grad()
        loss = model(torch.randn(*shape)).square().mean()
        torch.autograd.backward(loss)
        optimiser.step()
        found.append(loss.detach())
    return found + [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes_but_what_is_kept(name: str) -> None:
    made, shape, blocks = MODELS[name]
    model = made().train()
    other = copy.deepcopy(model)
    undo = lean_(other)
    assert len(undo.blocks) == blocks, undo.blocks
    one, two = steps(model, shape), steps(other, shape)
    assert len(one) == len(two)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert weights(model) == weights(other), "statistics or weights moved otherwise"
    undo.restore_()
    undo.restore_()
    assert not undo.is_open
    assert all("forward" not in m.__dict__ for m in other.modules())
    assert all(torch.equal(a, b) for a, b in zip(steps(model, shape), steps(other, shape), strict=True))


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """What a forward leaves for the backward pass: every storage that saved tensors lie in, once, but for parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    total = sum(found.values())
    torch.autograd.backward(y.sum())
    return total


@pytest.mark.parametrize(("name", "share"), [("deep", 0.5), ("plain", 0.5), ("resnet18", 0.7)])
def test_less_is_kept(name: str, share: float) -> None:
    made, shape, _ = MODELS[name]
    model, x = made().train(), torch.randn(*shape)
    before = kept_bytes(model, x)
    undo = lean_(model)
    # a checkpoint keeps its arguments itself, where hooks do not see them: they are counted here
    inputs: list[int] = []
    handles = [
        m.register_forward_pre_hook(lambda m, args: inputs.append(args[0].nbytes))
        for n, m in model.named_modules()
        if n in undo.blocks
    ]
    lean = kept_bytes(model, x) + sum(inputs[: len(handles)])
    assert lean < share * before


@pytest.mark.parametrize("policy", ["frozen-statistics", "all", "head-only", "affine-and-head"])
def test_a_run_in_little_memory_is_the_same_run(policy: str) -> None:
    one, two = net(), net()
    told: dict[str, Any] = {"policy": policy, "epochs": 2, "head": "new", "seed": 1}
    first, second = finetune_(one, data(), data(), **told), finetune_(two, data(), data(), memory="lean", **told)
    assert weights(one) == weights(two)
    assert [e.loss for e in first.history] == [e.loss for e in second.history]
    assert all("forward" not in m.__dict__ for m in two.modules())


@pytest.mark.parametrize(
    "options", [{"regularisers": ["stochnorm", "bss"]}, {"regularisers": "shrink"}, {"average": "ema"}]
)
def test_regularisers_and_averages_do_not_notice(options: dict[str, Any]) -> None:
    one, two = net(), net()
    told: dict[str, Any] = {"policy": "all", "epochs": 2, "head": "new", "seed": 1, **options}
    finetune_(one, data(), **told)
    finetune_(two, data(), memory="lean", **told)
    assert weights(one) == weights(two)


def test_a_joint_run_does_not_notice() -> None:
    one, two = net(), net()
    target = [x + 1 for x, _ in data(seed=1)]
    told: dict[str, Any] = {"head": "keep", "epochs": 2, "target": target, "joint": "per_domain"}
    finetune_(one, data(), **told)
    finetune_(two, data(), memory="lean", **told)
    assert weights(one) == weights(two)


def test_a_failed_run_leaves_no_block_lean() -> None:
    model = net()
    before = photograph(model)
    broken = [*data(), (torch.zeros(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))]
    with pytest.raises(RuntimeError, match="should be the same"):
        finetune_(model, broken, memory="lean", policy="all", head="keep")
    assert differences(before, photograph(model)) == []


def test_a_watch_sees_each_batch_once() -> None:
    model = Deep().train()
    lean_(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    with renorm.watch(model, optimiser) as watch:
        for _ in range(3):
            optimiser.zero_grad()
            torch.autograd.backward(model(torch.randn(*IMAGES)).sum())
            optimiser.step()
    assert "BN403" not in [finding.rule for finding in watch.findings]


def test_copies_and_pickles_are_lean_too() -> None:
    model = Deep().train()
    x = torch.randn(*IMAGES)
    whole = kept_bytes(model, x)
    lean_(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.layer1[0].forward.args[0].module is other.layer1[0]
        assert kept_bytes(other, x) < 0.6 * whole


def test_without_gradients_and_with_a_cache_blocks_run_once() -> None:
    calls: list[int] = []

    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x: Tensor, *, cache: Any = None) -> Tensor:
            calls.append(1)
            y: Tensor = self.norm(x)
            if cache is not None:
                cache.add(y.sum().item())
            return y

    model = nn.Sequential(Caching(), Caching())
    lean_(model)
    x = torch.randn(2, 4)
    with torch.no_grad():
        model(x)
    assert len(calls) == 2
    torch.autograd.backward(model(x).sum())
    assert len(calls) == 2 + 4
    calls.clear()
    held: set[float] = set()
    torch.autograd.backward(model[0](x, cache=held).sum())
    assert len(calls) == len(held) == 1


def causal() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2, "num_labels": 3, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=40, pad_token_id=0, **sizes)
    model: nn.Module = transformers.GPT2ForSequenceClassification(config)
    return model


def test_the_empty_cache_of_a_causal_model_stands_in_no_ones_way() -> None:
    model = causal().train()
    other = copy.deepcopy(model)
    lean_(other)
    calls: list[int] = []
    other.get_submodule("transformer.h.0.ln_1").register_forward_hook(lambda *_: calls.append(1))
    tokens = torch.randint(1, 40, (4, 6))
    for each in (model, other):
        torch.manual_seed(1)
        torch.autograd.backward(each(input_ids=tokens, labels=torch.arange(4) % 3).loss)
    assert len(calls) == 2, "forward, and once more in the backward pass"
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert (one.grad is None and two.grad is None) or torch.equal(one.grad, two.grad)
    with torch.no_grad():
        kept = other.eval()(input_ids=tokens, use_cache=True).past_key_values
    assert kept.get_seq_length() == 6, "in evaluation it is filled as ever"


def test_a_layer_that_was_put_in_later_moves_once_too() -> None:
    model, x = Deep(2).train(), torch.randn(*IMAGES)
    lean_(model)
    torch.autograd.backward(model(x).sum())
    block = model.layer1[0]
    block.bn1 = nn.BatchNorm2d(8)
    torch.autograd.backward(model(x).sum())
    assert block.bn1.num_batches_tracked == 1


def test_an_input_that_was_changed_since_is_refused() -> None:
    model = Deep(2).train()
    lean_(model)
    x = torch.randn(2, 8, 6, 6, requires_grad=True) * 1.0
    y = model.layer1[0](x=x)  # by name: those given by place torch looks after itself
    x.add_(1)
    with pytest.raises(
        UsageError, match=r"the block 'layer1\.0' was to be run again, and its input was changed in place"
    ):
        torch.autograd.backward(y.sum())


def test_patterns_choose_blocks_and_reasons_are_given() -> None:
    model = Deep(2)
    assert lean_(copy.deepcopy(model), exclude="layer2*").blocks == ("layer1.0", "layer1.1")
    with pytest.raises(UsageError, match=r"asked for '\*' without '\*', and of 4 blocks, 'layer1\.0' first, none"):
        lean_(model, exclude="*")
    first = nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm2d(8))
    model.layer1[0] = nn.ModuleDict({"a": first})  # type: ignore[assignment]

    class Eager(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.norm = nn.ReLU(inplace=True), nn.BatchNorm2d(8)

    model.layer1[1] = Eager()
    undo = lean_(model)
    assert undo.kept == {"layer1.1": "changes its input in place"}
    assert "layer1.1" not in undo.blocks


def test_what_has_no_blocks_is_refused() -> None:
    with pytest.raises(NoBatchNorm, match="lean_ needs norm layers; Linear has none"):
        lean_(nn.Linear(2, 2))

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    with pytest.raises(UsageError, match=r"Flat is not made of blocks with norm layers\. Put them into"):
        lean_(Flat())


def test_undoing_keeps_to_the_order() -> None:
    model = Deep(2)
    first, second = lean_(model), lean_(model)
    with pytest.raises(OpenChange, match=r"undoing lean_ was asked for, but lean_ came after it at 'layer1\.0'"):
        first.restore_()
    second.restore_()
    first.restore_()
    assert all("forward" not in m.__dict__ for m in model.modules())
