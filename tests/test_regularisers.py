"""Regularisers: each penalty against its slow twin, what pulls where, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import renorm.regularisers
from renorm.calls import Caller
from renorm.errors import UsageError
from renorm.events import Epoch, Finished, Stepped
from renorm.finetune import finetune_, training
from renorm.heads import new_head_
from renorm.layers import Shrink as ShrinkLayer
from renorm.layers import Stochastic
from renorm.recipe import Recipe
from renorm.regularisers import BSS, L2SP, CoTuning, Delta, Shrink, StochNorm
from renorm.regularisers.base import Penalty, Regulariser, Start, Step, build, catalogue
from renorm.session import values_of
from renorm.split import split
from tests.contracts.photograph import differences, photograph
from tests.reference import regularisers as twin
from tests.test_finetune import data, net, weights


def started(model: nn.Module, *, new: bool, batches: Any = None) -> Start:
    parts, state = split(model), values_of(model)
    head = new_head_(model, parts, 2) if new else None
    passes = None if batches is None else lambda: iter(batches)
    old = head.old if head else ()
    return Start(model=model, parts=parts, state=state, old_head=old, batches=passes, caller=Caller())


@contextmanager
def running(regulariser: Regulariser, start: Start) -> Iterator[tuple[Penalty, Any]]:
    """The penalty, and a function that runs a batch and gives its step."""
    with regulariser.over(start) as penalty:
        yield penalty, lambda batch: Step(batch, start.caller.run(start.model, batch))


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def double(tensor: Tensor) -> Any:
    return tensor.detach().double().numpy()


@pytest.mark.parametrize("new", [True, False])
def test_l2_sp_is_its_twin(new: bool) -> None:
    model = net()
    start = started(model, new=new)
    model[0].bias.requires_grad_(False)
    with running(L2SP(alpha=0.3, beta=0.07), start) as (penalty, run):
        moved(model)
        got = penalty(run(data()[0]))
        held = [(n, p) for n, p in model.named_parameters() if n != "0.bias"]
        fresh = [double(p) for n, p in held if new and n.startswith("9.")]
        near = [(double(p), double(start.state[n])) for n, p in held if not (new and n.startswith("9."))]
        assert got.item() == pytest.approx(twin.l2_sp(near, fresh, 0.3, 0.07), rel=1e-5)
        got.backward()
        assert model[0].bias.grad is None
        torch.testing.assert_close(model[1].weight.grad, 0.3 * (model[1].weight - start.state["1.weight"]))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("samples", [3, 8])
def test_bss_is_its_twin(k: int, samples: int) -> None:
    model = net()
    features: list[Tensor] = []
    model[9].register_forward_pre_hook(lambda module, args: features.append(args[0]))
    with running(BSS(eta=0.5, k=k), started(model, new=False)) as (penalty, run):
        got = penalty(run(data(samples, size=samples)[0]))
    assert got.item() == pytest.approx(twin.bss(double(features[0]), 0.5, k), rel=1e-3, abs=1e-9)


def test_bss_pools_feature_maps_and_keeps_rows() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    start = started(model.eval(), new=False)
    start = Start(**{**vars(start), "parts": split(model, "2")})
    with running(BSS(), start) as (penalty, run):
        batch = data()[0]
        maps = double(model[:2](batch[0]))
        assert penalty(run(batch)).item() == pytest.approx(twin.bss(maps.mean((2, 3)), 0.001, 1), rel=1e-3)


def test_co_tuning_is_its_twin_and_the_old_head_stays() -> None:
    model, source, train = net(), net(), data(24, classes=2)
    before = weights(source[9])
    with running(CoTuning(weight=1.7), started(model, new=True, batches=train)) as (penalty, run):
        with torch.no_grad():
            chances = double(torch.cat([source(x) for x, _ in train]).softmax(1))
        relation = twin.relation(chances, torch.cat([y for _, y in train]).numpy(), 2)
        np.testing.assert_allclose(relation.sum(1), 1)
        moved(model)
        batch = train[0]
        got = penalty(run(batch))
        logits = double(source[9](model[:9](batch[0])))
        assert got.item() == pytest.approx(twin.co_tuning(logits, relation[batch[1].numpy()], 1.7), rel=1e-5)
        got.backward()
    assert weights(source[9]) == before
    assert model[9].weight.grad is None
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("new", [True, False])
def test_delta_is_its_twin(attention: bool, new: bool) -> None:
    model, source, train = net(), net(), data(24, classes=2)
    options: dict[str, Any] = {"weight": 0.2, "attention": attention, "layers": ("1", "4")}
    with running(Delta(**options), started(model, new=new, batches=train)) as (penalty, run):
        assert penalty(run(train[0])).item() == 0.0
        moved(model)
        got = penalty(run(train[0]))
    wanted = 0.0
    for end in (2, 5):
        now, was = (double(m[:end](train[0][0])) for m in (model, source))
        share = _attention(source, end, train[0], new=new) if attention else np.full(4, 0.25)
        wanted += twin.delta(now, was, share, 0.2)
    assert got.item() == pytest.approx(wanted, rel=1e-4)


def _attention(source: nn.Sequential, end: int, batch: Any, *, new: bool) -> Any:
    """Softmax over channels of how much worse the source becomes when one is silenced, by hand."""
    growth = []
    with torch.no_grad():
        for channel in (None, *range(4)):
            maps = source[:end](batch[0])
            if channel is not None:
                maps[:, channel] = 0
            features = source[end:9](maps).double()
            logits = source[9].double()(features)
            source[9].float()
            growth.append(features if new else nn.functional.cross_entropy(logits, batch[1]))
    worse = [float((g - growth[0]).square().mean() if new else g - growth[0]) for g in growth[1:]]
    exps = np.exp(np.array(worse) - max(worse))
    return exps / exps.sum()


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_each_keeps_a_run_nearer_and_leaves_no_hooks(name: str) -> None:
    model, plain = net(), net()
    hooks = [len(m._forward_hooks) for m in model.modules()]
    options: dict[str, Any] = {"epochs": 2, "lr": 0.02, "head": "new", "policy": "frozen-statistics", "clip": None}
    strong = {
        "l2_sp": L2SP(alpha=50.0),
        "delta": Delta(weight=3.0, probes=2),
        "bss": BSS(eta=0.1, k=2),
        "co_tuning": CoTuning(),
        "stochnorm": StochNorm(p=0.2),
        "shrink": Shrink(noise=50.0),
    }
    if strong[name].layer:
        options["policy"] = "all"
    finetune_(model, data(), regularisers=[strong[name]], **options)
    finetune_(plain, data(), weight_decay=0.0 if name == "l2_sp" else 0.01, regularisers=(), **options)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert weights(model) != weights(plain)
    if name == "l2_sp":
        far = [(m[0].weight - net()[0].weight).norm().item() for m in (model, plain)]
        assert far[0] < 0.5 * far[1]
    if name == "delta":
        x = data()[0][0]
        away = [(m[:5](x) - net()[:5](x)).norm().item() for m in (model, plain)]
        assert away[0] < away[1]


def test_they_combine_and_are_named() -> None:
    assert [each.name for each in build(["l2_sp", BSS(k=2)])] == ["l2_sp", "bss"]
    assert build("delta") == (Delta(),)
    for one in ("stochnorm", "shrink"):
        others = [name for name, kind in catalogue().items() if not kind.layer]
        assert finetune_(net(), data(), regularisers=[one, *others], epochs=1, head="new", policy="all").steps == 5
    for kind in catalogue().values():
        assert getattr(renorm.regularisers, kind.__name__) is kind
        assert kind.cites.startswith("@inproceedings{") or kind is Shrink  # ours
    with pytest.raises(AttributeError, match=r"'renorm\.regularisers' has no attribute 'Nothing'"):
        _ = renorm.regularisers.Nothing


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: L2SP(alpha=-1.0), "alpha of l2_sp is a number of at least 0; got -1"),
        (lambda: L2SP(beta=float("nan")), "beta of l2_sp"),
        (lambda: BSS(k=0), "k of bss is a number of singular values, 1 or more; got 0"),
        (lambda: Delta(probes=0), "probes of delta is a number of batches, 1 or more"),
        (lambda: StochNorm(p=1.5), r"p of stochnorm is a probability, in \[0, 1\]; got 1.5"),
        (lambda: Shrink(floor=2.0), r"floor of shrink is a share, in \[0, 1\]; got 2.0"),
        (lambda: Shrink(noise=-1.0), "noise of shrink is a number of at least 0"),
        (lambda: CoTuning(weight=float("inf")), "weight of co_tuning"),
    ],
)
def test_options_are_checked(make: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()


@pytest.mark.parametrize(("name", "kind"), [("stochnorm", Stochastic), ("shrink", ShrinkLayer)])
def test_layers_stand_in_while_training_and_batch_norms_hold_what_they_learnt(name: str, kind: type) -> None:
    model = net()
    norms, before = (model[1], model[4]), photograph(model)
    options: dict[str, Any] = {"epochs": 2, "lr": 0.02, "head": "keep", "policy": "all"}
    for event in training(model, data(), data(seed=1), Recipe(regularisers=build(name), **options)):
        if isinstance(event, Stepped | Epoch):
            assert [type(model[i]) for i in (1, 4)] == [kind, kind]
        elif isinstance(event, Finished):
            result = event.result
    assert (model[1], model[4]) == norms
    assert {"1.weight", "1.running_mean", "4.bias"} <= set(result.moved)
    twin = net()
    finetune_(twin, data(), **options)
    assert not torch.equal(twin[1].weight, model[1].weight)
    torch.testing.assert_close(model[1].running_mean, _mean_in(model, 1), rtol=1e-4, atol=1e-5)
    result.restore_()
    assert differences(before, photograph(model)) == []


def _mean_in(model: nn.Sequential, place: int) -> Tensor:
    with torch.no_grad():
        return model[:place](torch.cat([x for x, _ in data()])).mean((0, 2, 3))


def test_a_failure_while_layers_stand_in_gives_the_batch_norms_back() -> None:
    model = net()
    before = photograph(model)
    broken = [*data(), (torch.zeros(8, 5, 8, 8), torch.zeros(8, dtype=torch.long))]
    with pytest.raises(RuntimeError, match="expected input"):
        finetune_(model, broken, regularisers="shrink", policy="all", head="keep")
    assert differences(before, photograph(model)) == []


class Listed(nn.Module):
    """Layers in lists, which nobody calls; the last stage is a list of norm layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ModuleList([nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 1)])
        self.bn = nn.ModuleList([nn.BatchNorm2d(6) for _ in self.conv])
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for conv, bn in zip(self.conv, self.bn, strict=True):
            x = bn(conv(x)).relu()
        return cast(Tensor, self.fc(x.mean((2, 3))))


def test_delta_compares_the_last_of_a_list_of_modules() -> None:
    with running(Delta(), started(Listed().eval(), new=False, batches=data())) as (penalty, run):
        step = run(data()[0])
        with torch.no_grad():
            assert float(penalty(step)) == 0
    model = Listed().eval()
    with running(Delta(), started(model, new=False, batches=data())) as (penalty, run):
        with torch.no_grad():
            cast(nn.BatchNorm2d, model.bn[-1]).bias.add_(1)
        step = run(data()[0])
        with torch.no_grad():
            assert float(penalty(step)) > 0


def test_what_they_cannot_do_is_refused() -> None:
    with pytest.raises(UsageError, match="stochnorm and shrink both train through a layer of their own"):
        finetune_(net(), data(), regularisers=["stochnorm", "shrink"], policy="all")
    with pytest.raises(UsageError, match="shrink changes how batch norms normalise whose statistics move"):
        finetune_(net(), data(), regularisers="shrink", policy="frozen-statistics")
    with pytest.raises(UsageError, match="co_tuning relates old classes to new ones, and the head was kept"):
        finetune_(net(), data(), regularisers="co_tuning", head="keep")
    with pytest.raises(UsageError, match="co_tuning reads the training data once beforehand"):
        finetune_(net(), iter(data()), regularisers="co_tuning", head="new", classes=["a", "b", "c"], epochs=1)
    with pytest.raises(UsageError, match="delta compares the outputs of 'nowhere'"):
        finetune_(net(), data(), regularisers=Delta(layers=("nowhere",)), head="keep")
    for attention in (True, False):
        with pytest.raises(UsageError, match="delta compares the output of 'bn', which no forward calls"):
            finetune_(Listed(), data(), regularisers=Delta(layers=("bn",), attention=attention), head="keep")
    headless = nn.Sequential(nn.Conv2d(3, 3, 8), nn.BatchNorm2d(3), nn.Flatten())
    with pytest.raises(UsageError, match="bss looks at the features before the head, and no head is found"):
        finetune_(headless, data(), regularisers="bss", head="keep", policy="all")
    one_hot = [(x, torch.nn.functional.one_hot(y, 3).float()) for x, y in data()]
    with pytest.raises(UsageError, match="co_tuning relates classes to classes"):
        finetune_(net(), one_hot, regularisers="co_tuning", head="new", classes=["a", "b", "c"])
    model = net()
    with running(BSS(), started(model, new=False)) as (_, run):
        step = Step(data()[0], copy.copy(run(data()[0])))
    with (
        BSS().over(started(net(), new=False)) as unseen,
        pytest.raises(UsageError, match="bss saw no tensor go into '9'"),
    ):
        unseen(step)
