"""Contract: every online method, on the models of the zoo, answers in the model's shape and is undone to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from renorm.adapt import Stream, adapt_
from renorm.calls import Caller
from renorm.errors import RenormError, UsageError
from renorm.guard import Guard
from renorm.online.base import catalogue
from renorm.online.kinds.descent import Gradient
from renorm.profile import Profile, profile
from tests import zoo
from tests.contracts.photograph import differences, photograph, process

NAMES = sorted(catalogue())
# One of each: plain, (N, C), (N, C, L), (N, C, D, H, W), narrow, shared, silent, frozen copies, wrapped, compiled, slots.
FEW = (
    *("bn2d", "bn1d", "bn1d-sequence", "bn3d", "float64", "bfloat16", "called-twice", "no-statistics", "never-called"),
    *("mixed-modes", "dropout", "frozen-four", "timm-resnet", "two-inputs-by-name", "returns-dict", "compiled-warm"),
    *("data-parallel", "slots", "bn-lstm"),
)
REFUSED = (
    "unmix",
    *(n for n in NAMES if issubclass(catalogue()[n], Gradient)),
)  # where several sets of statistics stand
KNOWING = pytest.mark.parametrize("name", NAMES)


def plan() -> list[Any]:
    """Every method on a few models, and the default on all of them."""
    pairs = [(zoo.named(case), name) for case in FEW for name in NAMES]
    pairs = [(case, name) for case, name in pairs if "slots" not in case.tags or name not in REFUSED]
    pairs += [(p.values[0], "shrink") for p in zoo.with_batch_norm() if p.id not in FEW]
    return [pytest.param(case, name, id=f"{name}-{case.name}") for case, name in pairs]


def scores(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output


def caller_of(case: zoo.Case) -> Caller:
    return Caller(forward=lambda model, batch: case.call(model, batch[0]), output=case.output or scores)


def known_of(case: zoo.Case, model: nn.Module) -> Profile:
    caller = caller_of(case)

    def rows(output: Any) -> Tensor:
        logits = caller.output(output) if callable(caller.output) else scores(output)
        return logits.flatten(2).mean(2) if logits.dim() > 2 else logits

    return profile(model, batches(case), forward=caller.forward, output=rows)


def batches(case: zoo.Case, seed: int = 0) -> list[Any]:
    """Tuples of one, so that a second input is not taken for labels."""
    return [(case.batch(samples, seed + k),) for k, samples in enumerate(zoo.SIZES)]


def stream_on(case: zoo.Case, model: nn.Module, name: str, *, guard: Guard | bool = False, **options: Any) -> Stream:
    caller = caller_of(case)
    source = known_of(case, model) if catalogue()[name].needs_source else None
    return adapt_(model, name, source, guard=guard, forward=caller.forward, output=caller.output, **options)


def close(case: zoo.Case, a: Tensor, b: Tensor) -> bool:
    loose = 3e-2 if "narrow" in case.tags else 1e-5
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=loose, atol=loose, equal_nan=True)


@pytest.mark.parametrize(("case", "name"), plan())
def test_answers_have_the_models_shape_and_restoring_brings_every_bit_back(case: zoo.Case, name: str) -> None:
    model = case.settled()
    with torch.no_grad():
        shapes = [
            scores(case.call(model, b[0]) if not case.output else case.output(case.call(model, b[0]))).shape
            for b in batches(case)
        ]
    before, around = photograph(model), process()
    stream = stream_on(case, model, name)
    between = photograph(model)
    assert differences(before, between) == []
    for batch, shape in zip(batches(case), shapes, strict=True):
        answer = stream(batch)
        assert answer.shape == shape
        assert not answer.requires_grad
        assert bool(torch.isfinite(answer.float()).all())
    assert process() == around
    held = ("weight", "bias", "gamma", "beta", "scale", "shift", "running_mean", "running_var", "moving_mean")
    held += ("min_val", "max_val", "zero_point")  # observers of quantisation-aware training look on in evaluation too
    held += ("moving_variance", "means", "variances", "state_dict", "_mean", "_var", "value")
    changed = [k for k in differences(before, photograph(model)) if not k.endswith(held)]
    assert changed == []
    then = photograph(model)
    stream.predict(batches(case, 9)[0])
    if case.name != "quantisation-aware":  # its observers look on whenever it is called
        assert differences(then, photograph(model)) == []
    stream.restore_()
    assert differences(before, photograph(model)) == []
    stream.restore_()
    with pytest.raises(RenormError, match=r"this stream was ended by restore_\(\)"):
        stream(batches(case)[0])


@KNOWING
@pytest.mark.parametrize("guard", [False, True], ids=["free", "guarded"])
def test_a_state_goes_on_in_a_new_stream_and_a_reset_is_a_new_stream(name: str, guard: bool) -> None:
    case = zoo.named("bn2d")
    stream = stream_on(case, case.build(), name, guard=guard)
    first = [stream(batch) for batch in batches(case)]
    other = stream_on(case, case.build(), name, guard=guard)
    other.load_state_dict(stream.state_dict())
    assert close(case, stream.predict(batches(case, 5)[0]), other.predict(batches(case, 5)[0]))
    for batch in batches(case, 5):
        assert close(case, stream(batch), other(batch))
    assert stream.log[-1].believed == other.log[-1].believed
    stream.reset_()
    assert all(torch.equal(a, stream(b)) for a, b in zip(first, batches(case), strict=True))


@KNOWING
def test_the_callers_mode_and_gradients_change_no_answer(name: str) -> None:
    case = zoo.named("dropout")
    answers = []
    for mode in (False, True):
        model = case.build().train(mode)
        stream = stream_on(case, model, name, guard=True)
        with torch.set_grad_enabled(mode):
            answers.append([stream(batch) for batch in batches(case)])
        assert all(module.training == mode for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


@KNOWING
@pytest.mark.parametrize("guard", [False, True], ids=["free", "guarded"])
@pytest.mark.parametrize("at", [1, 2, 3], ids=["first", "second", "third"])
def test_a_forward_that_fails_leaves_state_and_model(name: str, guard: bool, at: int) -> None:
    case = zoo.named("bn2d")
    model = case.build()
    calls, fails = [0], [0]

    def broken(module: nn.Module, args: Any) -> None:
        calls[0] += 1
        if fails[0] and calls[0] == fails[0]:
            raise OSError("the disk is gone")

    model[6].register_forward_pre_hook(broken)  # behind both batch norms
    stream = stream_on(case, model, name, guard=guard and Guard(judged=1.0, learning=1.0))
    for batch in batches(case):
        stream(batch)
    before, state = photograph(model), stream.state_dict()
    calls[0], fails[0] = 0, at
    try:
        stream(batches(case, 3)[0])
    except OSError:
        after = stream.state_dict()
        assert differences(before, photograph(model)) == []
        assert state.keys() == after.keys()
        assert [k for k, v in state.items() if not torch.equal(v, after[k])] == []
        assert len(stream.log) == len(zoo.SIZES)
    else:
        assert calls[0] < at  # so many forwards are not run


@KNOWING
def test_predicting_teaches_nothing(name: str) -> None:
    case = zoo.named("bn2d")
    model, twin = case.build(), case.build()
    stream, other = (stream_on(case, m, name, guard=Guard(doubt=0.0, limit=-1.0)) for m in (model, twin))
    for batch in batches(case):
        assert torch.equal(stream(batch), other(batch))
        before, state = photograph(model), stream.state_dict()
        stream.predict((case.batch(5, 50),))
        stream.predict((case.batch(1, 51),))
        assert differences(before, photograph(model)) == []
        assert [k for k, v in stream.state_dict().items() if not torch.equal(v, state[k])] == []
    assert torch.equal(stream(batches(case, 3)[0]), other(batches(case, 3)[0]))
    assert len(stream.log) == len(zoo.SIZES) + 1


@KNOWING
@pytest.mark.parametrize("which", ["bn2d", "bn1d"])
def test_a_first_batch_of_one(name: str, which: str) -> None:
    case = zoo.named(which)
    stream = stream_on(case, case.build(), name)
    for seed in range(3):
        answer = stream((case.batch(1, seed),))
        assert answer.shape == (1, 3)
        assert bool(torch.isfinite(answer).all())


@pytest.mark.parametrize("name", [n for n in NAMES if issubclass(catalogue()[n], Gradient)])
def test_a_users_gradients_and_flags_stay(name: str) -> None:
    case = zoo.named("bn2d")
    model = case.build()
    model(case.batch()).sum().backward()
    model[0].weight.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    kept = {n: (p.requires_grad, p.grad is None or p.grad.clone()) for n, p in model.named_parameters()}
    stream = stream_on(case, model, name)
    stream(batches(case)[0])
    for n, p in model.named_parameters():
        flag, grad = kept[n]
        assert p.requires_grad == flag
        assert torch.equal(p.grad, grad) if isinstance(grad, Tensor) else p.grad is None


@pytest.mark.parametrize("name", [n for n in NAMES if catalogue()[n].any_norm])
def test_layer_and_group_norm(name: str) -> None:
    for make in (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)),
        lambda: nn.Sequential(nn.Linear(5, 8), nn.GroupNorm(2, 8), nn.ReLU(), nn.Linear(8, 3)),
    ):
        torch.manual_seed(0)
        model = make().eval()
        before = photograph(model)
        x = torch.randn(8, 5)
        stream = adapt_(model, name, guard=False, **({"lr": 0.1, "sure": 1.0} if name in ("eata", "rdumb") else {}))
        assert stream(x).shape == stream(x).shape == (8, 3)
        moved = differences(before, photograph(model)) != []
        assert moved == issubclass(catalogue()[name], Gradient)
        stream.restore_()
        assert differences(before, photograph(model)) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 4, 4)], ids=["vector", "column", "map"])
def test_scores_of_other_shapes_keep_them(name: str, shape: tuple[int, ...]) -> None:
    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.head = nn.Conv2d(3, shape[0] if shape else 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.norm(x))
            return y if len(shape) == 3 else y.mean((2, 3)).reshape(len(x), *shape)

    torch.manual_seed(0)
    model = Shaped().eval()
    x = torch.randn(6, 3, 4, 4) * 2 + 1
    if catalogue()[name].needs_source:
        rows = (lambda out: out.flatten(2).mean(2)) if len(shape) == 3 else None
        stream = adapt_(model, name, profile(model, [x], output=rows), guard=False)
    else:
        stream = adapt_(model, name, guard=False)
    assert stream(x).shape == (6, *shape)
    assert stream.predict(x).shape == (6, *shape)


@KNOWING
def test_it_says_what_it_stands_on(name: str) -> None:
    method = catalogue()[name]
    assert method.__doc__
    assert name == "source" or name == "shrink" or method.cites.startswith("@")


@pytest.mark.parametrize("name", REFUSED)
def test_modules_with_several_sets_of_statistics_are_refused_by_name(name: str) -> None:
    case = zoo.named("slots")
    model = case.build()
    before = photograph(model)
    with pytest.raises(UsageError, match="changes what batch norms are given, which '1' does not take"):
        stream_on(case, model, name)
    assert differences(before, photograph(model)) == []
