"""Every online method against its paper's formula in slow NumPy, on one batch norm or a tiny net."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from renorm.adapt import adapt_
from renorm.errors import UsageError
from renorm.methods.equal_mix import equal_mix
from renorm.moments import Moments
from renorm.online.base import as_if, glance, packed, rows_of, source_units, unpacked
from renorm.online.hybrid import least
from renorm.online.kinds.descent import by_batch
from renorm.online.kinds.mixes import Tally, at_home, class_by_class, moved, total_variation, variety
from renorm.online.lame import adjusted
from renorm.online.roid import soft_likelihood_ratio
from renorm.online.tbr import renormalised
from renorm.online.unmix import unmixed
from renorm.profile import profile
from renorm.shift import Shift
from renorm.sites import find_sites
from tests.reference import online as slow

EPS = 1e-3


def norm(channels: int = 3) -> nn.BatchNorm2d:
    """A batch norm alone, with statistics and no affine: its output is what it normalised."""
    bn = nn.BatchNorm2d(channels, eps=EPS, affine=False)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    bn.running_mean.normal_(0.3, 0.5)
    bn.running_var.uniform_(0.5, 2)
    return bn.eval()


def held(bn: nn.BatchNorm2d) -> tuple[Any, Any]:
    assert bn.running_mean is not None
    assert bn.running_var is not None
    return bn.running_mean.double().numpy().copy(), bn.running_var.double().numpy().copy()


def net(classes: int = 3) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, eps=EPS), nn.ReLU(), nn.Linear(8, classes)).eval()


def batches(*sizes: int, shape: tuple[int, ...] = (3, 4, 4)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(n, *shape, generator=generator) * 1.7 + 0.8 for n in sizes]


def near(found: Tensor, wanted: Any, at: float = 2e-5) -> None:
    torch.testing.assert_close(found.double(), torch.as_tensor(wanted), rtol=at, atol=at)


def per_map(logits: Tensor) -> Tensor:
    return logits.mean((2, 3))


# ── what they stand on ──


@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 9), (6, 3, 8, 5), (4, 3, 4, 5, 6)])
def test_a_glance_is_the_moments_of_what_it_looks_at(shape: tuple[int, ...], rows: int | None) -> None:
    x = torch.randn(shape) * 2 + 1
    seen = glance(x, rows=rows)
    wanted = Moments.of(x[:, :, :: shape[2] // 2] if rows and len(shape) > 2 else x)
    assert seen is not None
    assert seen.count == wanted.count
    near(seen.mean, wanted.mean, 1e-5)
    near(seen.var, wanted.var, 1e-5)


def test_a_glance_at_other_layouts_precisions_and_large_means() -> None:
    x = torch.randn(6, 5, 8, 4) * 2 + 1
    wanted = Moments.of(x)
    for other, at in (
        (x.to(memory_format=torch.channels_last), 1e-5),
        (x.double(), 1e-12),
        (x.movedim(1, -1).contiguous().movedim(-1, 1), 1e-5),
    ):
        seen = glance(other)
        assert seen is not None
        near(seen.mean, wanted.mean, at)
        near(seen.var, wanted.var, at)
    last = glance(x.movedim(1, -1).contiguous(), axis=3)
    assert last is not None
    near(last.var, wanted.var, 1e-5)
    narrow = glance(x.bfloat16())
    assert narrow is not None
    near(narrow.var, Moments.of(x.bfloat16()).var, 1e-5)
    far = glance(x + 3000)
    assert far is not None
    near(far.mean, wanted.mean + 3000, 1e-5)
    near(far.var, Moments.of(x + 3000).var, 1e-3)  # no E[x²] − E[x]² in float32, which would be noise of 1 here
    assert glance(x[:1, :, 0, 0]) is None
    assert glance(x * torch.nan) is None
    vector = glance(x[:, 0, 0, 0])
    assert vector is not None
    assert vector.mean.shape == (1,)


@pytest.mark.parametrize("each", [False, True])
def test_as_if_a_layer_held_other_moments(each: bool) -> None:
    bn, (x,) = norm(), batches(5)
    (site,) = find_sites(bn)
    known = site.statistics()
    assert known is not None
    mean, var = torch.randn(5, 3) if each else torch.randn(3), torch.rand(5, 3) + 0.2 if each else torch.rand(3) + 0.2
    found = bn(as_if(site, x, mean, var, known))
    for i in range(5):
        at = (mean[i], var[i]) if each else (mean, var)
        near(found[i : i + 1], slow.normalised(x[i : i + 1].double().numpy(), *(t.double().numpy() for t in at), EPS))


def test_by_batch_is_train_mode_and_its_gradient() -> None:
    bn, (x,) = norm(), batches(5)
    twin = nn.BatchNorm2d(3, eps=EPS, affine=False, track_running_stats=False)
    (site,) = find_sites(bn)
    weight = torch.randn_like(x)
    grads = []
    for layer in (lambda z: bn(by_batch(site, z)), twin):
        z = x.clone().requires_grad_()
        (layer(z) * weight).sum().backward()
        grads.append(z.grad)
    near(bn(by_batch(site, x)), twin(x).double())
    near(grads[0], grads[1].double())
    assert by_batch(site, x[:1, :, :1, :1]) is None


def test_moments_packed_are_unpacked() -> None:
    parts = {"a": Moments.of(torch.randn(5, 3)), "b": Moments.of(torch.randn(7, 2))}
    found = unpacked(packed(parts), parts)
    for name, moments in parts.items():
        assert found[name].count == moments.count
        assert torch.equal(found[name].mean, moments.mean)
        assert torch.equal(found[name].var, moments.var)
    assert packed({}) == unpacked({}, ["a"]) == {}


def test_rows_of_scores() -> None:
    x = torch.randn(4, 3, 2, 2)
    near(rows_of(x, 4), x.double().mean((2, 3)))
    assert torch.equal(rows_of(x[:, 0, 0, 0], 4), torch.stack([torch.zeros(4), x[:, 0, 0, 0]], 1))


# ── without gradients ──


@pytest.mark.parametrize("samples", [1, 7])
def test_prior(samples: int) -> None:
    bn = norm()
    mean, var = held(bn)
    stream = adapt_(bn, "prior", guard=False, images=16, output=per_map)
    (x,) = batches(samples)
    wanted = slow.normalised(x.double().numpy(), *slow.prior(x.double().numpy(), mean, var, 16), EPS)
    near(stream(x), wanted.mean((2, 3)))
    near(stream(x), wanted.mean((2, 3)))  # nothing is kept


def test_batch() -> None:
    (x,) = batches(6)
    wanted = slow.normalised(x.double().numpy(), *slow.moments(x.double().numpy()), EPS)
    near(adapt_(norm(), "batch", guard=False, output=lambda y: y[:, :, 0, 0])(x), wanted[:, :, 0, 0])


def test_ema_by_batch_size() -> None:
    bn, feed = norm(), batches(4, 64, 1, 9)
    mean, var = held(bn)
    stream = adapt_(bn, "ema", guard=False, rate=0.2, output=lambda y: y[:, :, 0, 0])
    for k, x in enumerate(feed):
        arrays = [b.double().numpy() for b in feed[: k + 1]]
        wanted = slow.normalised(arrays[-1], *slow.running(arrays, mean, var, 0.2), EPS)
        near(stream(x), wanted[:, :, 0, 0])


def test_unmix_against_the_papers_formula_seeded_and_still_under_predict() -> None:
    mean, var = torch.randn(4, 3).double(), torch.rand(4, 3).double()
    parts = (torch.randn(5, 3).double(), torch.rand(5, 3).double())
    arrays = (mean.numpy(), var.numpy(), (parts[0].numpy(), parts[1].numpy()))
    for found, wanted in zip(unmixed(mean, var, parts, temperature=0.07), slow.unmixed(*arrays, 0.07), strict=True):
        near(found, wanted, 1e-10)

    bn, (x,) = norm(), batches(5)
    streams = [
        adapt_(norm() if k else bn, "unmix", guard=False, components=4, output=per_map, seed=s)
        for k, s in ((0, 3), (1, 3), (1, 4))
    ]
    first, _, other = (s.state_dict() for s in streams)
    assert not torch.equal(first["method.m."], other["method.m."])
    start = (first["method.m."].double().numpy(), first["method.v."].double().numpy())
    seen = [t.double().numpy() for t in reversed(torch.var_mean(x.double().flatten(2), 2, correction=0))]
    streams[0].predict(x)
    assert torch.equal(streams[0].state_dict()["method.m."], first["method.m."])
    got = streams[0](x)
    mixed_mean, mixed_var, joins = slow.unmixed(*seen, start, 0.07)
    wanted = np.stack(
        [slow.normalised(x[i : i + 1].double().numpy(), mixed_mean[i], mixed_var[i], EPS)[0] for i in range(5)]
    )
    near(got, wanted.mean((2, 3)), 1e-4)
    after = streams[0].state_dict()
    moved_parts = slow.unmixed_parts(*seen, start, joins, 1 - 0.9 ** (5 / 64))
    near(after["method.m."], moved_parts[0], 1e-5)
    near(after["method.v."], moved_parts[1], 1e-5)


@pytest.mark.parametrize("samples", [1, 3, 12])
def test_lame_against_its_slow_twin(samples: int) -> None:
    logits = torch.randn(samples, 4).double() * 3
    near(adjusted(logits, neighbours=5, rounds=100).exp(), slow.lame(logits.numpy(), 5, 100), 1e-6)


def test_lame_of_equal_and_of_extreme_answers_is_finite() -> None:
    for logits in (torch.ones(8, 3), torch.eye(3).repeat(3, 1) * 1e4, torch.zeros(2, 3)):
        found = adjusted(logits, neighbours=5, rounds=100)
        assert bool(torch.isfinite(found).all())
        near(found.exp().sum(1), torch.ones(len(logits)).double(), 1e-5)


def test_hybrid_takes_the_channels_that_say_least_of_classes() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 0.5])
    assert least(scores, 0.5).tolist() == [False, True, False, True]
    assert not bool(least(scores, 0.0).any())
    assert bool(least(scores, 1.0).all())
    bn = norm(4)
    mean, var = held(bn)
    x = torch.randn(60, 4, 3, 3)
    labels = torch.arange(60) % 4
    x[:, 0] += 3 * labels[:, None, None]  # channels 0 and 2 tell classes apart
    x[:, 2] -= 2 * labels[:, None, None]
    known = profile(bn, [(x, labels)], output=per_map)
    stream = adapt_(bn, "hybrid", known, guard=False, first=0.5, output=lambda y: y[:, :, 0, 0])
    (y,) = batches(5, shape=(4, 3, 3))
    b_mean, b_var = slow.moments(y.double().numpy())
    follow = np.array([False, True, False, True])
    wanted = slow.normalised(y.double().numpy(), np.where(follow, b_mean, mean), np.where(follow, b_var, var), EPS)
    near(stream(y), wanted[:, :, 0, 0])
    assert stream.log[-1].weight == 0.5


# ── shrink ──


def test_at_home_is_equal_mix_in_source_units() -> None:
    def some() -> Moments:
        return Moments.of(torch.randn(20, 3) * 2 + 1)

    source, target, there, home = some(), some(), some(), some()
    wanted = equal_mix(target, there, home, eps=EPS, widest=30)
    unit = [source_units(m, source) for m in (target, there, home)]
    mean, var = at_home(*unit[0], unit[1], unit[2], eps=EPS / source.var)
    near(mean * source.sd + source.mean, wanted.mean, 1e-9)
    near(var * source.var, wanted.var, 1e-9)


def test_moved_is_that_of_a_shift() -> None:
    source, target = Moments.of(torch.randn(20, 3)), Moments.of(torch.randn(20, 3) * 2 + 1)
    wanted = Shift.between(source, target, eps=EPS).moved
    assert moved(*source_units(target, source), eps=EPS / source.var) == pytest.approx(wanted, rel=1e-9)


def test_a_tally_even_and_pooled() -> None:
    samples = torch.tensor([3.0, 0.0, 1.0, 5.0], dtype=torch.float64)
    first = torch.randn(4, 2, dtype=torch.float64) * samples[:, None]
    second = (first / samples.clamp_min(1)[:, None]).square() * samples[:, None] + samples[:, None]
    tally = Tally(samples, first, second)
    mean, var = slow.even(samples.numpy(), first.numpy(), second.numpy())
    near(tally.even()[0], mean, 1e-10)
    near(tally.even()[1], var, 1e-10)
    near(tally.pooled()[0], first.numpy().sum(0) / 9, 1e-10)
    near(tally.pooled()[1], second.numpy().sum(0) / 9 - (first.numpy().sum(0) / 9) ** 2, 1e-10)
    half = tally.times(0.5).plus(torch.ones(4).double(), torch.ones(2).double(), torch.ones(2).double())
    assert torch.equal(half.samples, 0.5 * samples + 1)
    assert torch.equal(half.first, 0.5 * first + 1)


def test_shrinks_first_batch_by_its_formula() -> None:
    bn, (x,) = norm(), batches(32)
    mean, var = held(bn)
    stream = adapt_(bn, "shrink", guard=False, rows=4, output=lambda y: y[:, :, 0, 0])
    b_mean, b_var = slow.moments(x.double().numpy())
    t, v, eps = (b_mean - mean) / np.sqrt(var), b_var / var, EPS / var
    far = np.minimum(t**2 / (1 + eps) + (0.5 * np.log((v + eps) / (1 + eps))) ** 2, 4).mean()
    images = 0.3 * 32
    weight = 0.75 * far / (0.03 + far) * images / (images + 4)
    blend = mean + weight * t * np.sqrt(var), var * (1 - weight + weight * v)
    near(stream(x), slow.normalised(x.double().numpy(), *blend, EPS)[:, :, 0, 0], 1e-4)
    assert stream.log[-1].weight == pytest.approx(weight, rel=1e-5)


def some_classes(k: int = 4, c: int = 3) -> tuple[Any, ...]:
    """A tally, the source's moments at some mix, its classes', a mix, and eps."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.3

    n = 10 * draw(k)
    first = n[:, None] * (draw(k, c) - 0.8)
    second = n[:, None] * draw(k, c) + first.square() / n[:, None]
    there, classes, prior = (draw(c) - 0.8, draw(c)), (draw(k, c) - 0.8, draw(k, c)), draw(k)
    return Tally(n, first, second), there, classes, prior / prior.sum(), 1e-3 * draw(c)


def test_class_by_class_is_its_formula() -> None:
    tally, there, classes, prior, eps = some_classes()
    own = torch.tensor([0.0, 0.3, 1.0, 0.8], dtype=torch.float64)
    wanted = slow.class_by_class(
        *(part.numpy() for part in tally),
        there=tuple(part.numpy() for part in there),
        classes=tuple(part.numpy() for part in classes),
        prior=prior.numpy(),
        own=own.numpy(),
        eps=eps.numpy(),
    )
    found = class_by_class(tally, there, classes, prior, own, eps=eps)
    near(found[0], wanted[0], 1e-10)
    near(found[1], wanted[1], 1e-10)


def test_class_by_class_without_a_class_of_its_own_is_equal_mix() -> None:
    tally, there, classes, prior, eps = some_classes()
    mean = prior @ classes[0]
    home = mean, prior @ (classes[1] + classes[0].square()) - mean.square()
    found = class_by_class(tally, there, classes, prior, torch.zeros(4).double(), eps=eps)
    wanted = at_home(*tally.pooled(), there, home, eps=eps)
    near(found[0], wanted[0], 1e-10)
    near(found[1], wanted[1], 1e-10)


@pytest.mark.parametrize(
    ("chosen", "wanted"),
    [
        ((8, 8, 8, 8), 1.0),
        ((32, 0, 0, 0), 0.0),
        ((2, 1, 0, 0), 0.0),  # too few answers to show more than one class
        ((16, 16, 0, 0), 1 / 3),
        ((30, 2, 0, 0), (1 / (30**2 + 2**2) * 32**2 - 1) / 3),
    ],
)
def test_variety_counts_classes_against_those_that_could_show(chosen: tuple[int, ...], wanted: float) -> None:
    assert variety(torch.tensor(chosen).double()) == pytest.approx(wanted)


def test_total_variation_of_two_mixes() -> None:
    assert total_variation(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == 1
    assert total_variation(torch.tensor([0.5, 0.5]), torch.tensor([0.7, 0.3])) == pytest.approx(0.2)


class Signs(nn.Module):
    """Two classes, by whether two inputs have the same sign: the first norm layer cannot tell them, the second does."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.product = nn.BatchNorm1d(2, eps=EPS), nn.BatchNorm1d(1, eps=EPS)
        self.between = nn.Sequential(*(nn.BatchNorm1d(2, eps=EPS) for _ in range(4)))
        self.looks = 0

    def forward(self, x: Tensor) -> Tensor:
        self.looks += 1
        score = self.product(self.between(self.inputs(x)).prod(1, keepdim=True)).mean(2)
        return torch.cat([-5 * score, 5 * score], 1)


def signs(labels: Tensor) -> Tensor:
    size = 1 + 0.1 * torch.randn(len(labels), 2)
    first = (torch.arange(len(labels)) // 2 % 2 * 2 - 1).float()  # independent of the class
    return (size * torch.stack([first, first * (2 * labels - 1)], 1))[:, :, None] + 0.05 * torch.randn(
        len(labels), 2, 4
    )


def trained() -> tuple[Signs, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model, labels = Signs(), torch.arange(400) % 2
    source = [(signs(labels), labels)]
    for bn in (model.inputs, *model.between, model.product):
        bn.momentum = 1.0
    with torch.no_grad():
        model.train()(source[0][0])
    return model.eval(), source


ONE, BOTH = torch.zeros(64).long(), torch.arange(64) % 2


@pytest.mark.parametrize(("profiled", "labels", "looks"), [(True, ONE, 2), (True, BOTH, 1), (False, ONE, 1)])
def test_a_batch_of_another_mix_is_looked_at_twice_by_a_profile(profiled: bool, labels: Tensor, looks: int) -> None:
    model, source = trained()
    stream = adapt_(model, "shrink", source if profiled else None, guard=False)
    model.looks = 0
    answer = stream(signs(labels))
    assert model.looks == looks
    assert bool((answer.argmax(1) == labels).all())


@pytest.mark.parametrize(("labels", "factor", "moves"), [(ONE, 1.0, False), (ONE, 3.0, True), (BOTH, 3.0, True)])
def test_one_class_alone_is_not_taken_for_another_domain_by_later_sites(
    labels: Tensor, factor: float, moves: bool
) -> None:
    model, _ = trained()
    before = held(model.product)
    stream = adapt_(model, "shrink", guard=False)
    stream(factor * signs(labels))
    after = held(model.product)
    assert (abs(after[0] - before[0])[0] > 1e-3 or abs(after[1] / before[1] - 1)[0] > 1e-3) == moves
    assert not math.isnan(stream.log[-1].moved)
    assert list(stream.log[-1].drift) == ["inputs", *(f"between.{k}" for k in range(4)), "product"]


def test_vectors_say_nothing_of_a_domain_at_the_first_site() -> None:
    feed = batches(32, 32, 32, shape=(6,))
    for name in ("shrink", "batch"):
        stream = adapt_(net(), name, guard=False)
        for x in feed:
            stream(5 * x + 3)
        assert math.isnan(stream.log[-1].moved)
        assert stream._running.changes == 0


def test_another_domain_is_noticed_in_its_first_batch_which_is_normalised_anew() -> None:
    torch.manual_seed(0)
    model, _ = trained()
    stream = adapt_(model, "shrink", guard=False)
    for _ in range(4):
        stream(signs(BOTH))
    before = stream._running.state()["images"][0]
    model.looks = 0
    stream(3 * signs(BOTH) + 1)
    assert stream._running.changes == 1
    assert before == pytest.approx(64 * sum(math.exp(-64 * k / 2000) for k in range(4)))
    assert stream._running.state()["images"][0] == 64  # all before is forgotten


def test_late_batches_are_measured_one_in_four_unless_the_first_site_shows_another_domain() -> None:
    torch.manual_seed(0)
    model, _ = trained()
    stream = adapt_(model, "shrink", guard=False, dense=128, thin=4)
    held_after = []
    for k in range(9):
        stream.predict(signs(BOTH))  # which does not count
        stream.load_state_dict(stream.state_dict())  # a stream that goes on, goes on at the same batch
        stream(signs(BOTH) + (6 if k == 8 else 0))
        held_after.append(float(stream._running.state()["images"][0]))
    steps = [held_after[k] != held_after[k - 1] for k in range(1, 9)]
    assert steps == [True, False, False, False, True, False, False, True]
    assert stream._running.changes == 1
    with pytest.raises(UsageError, match="thin of shrink is 1 or more"):
        adapt_(trained()[0], "shrink", thin=0)


# ── with gradients ──


def plain_tent(model: nn.Sequential, feed: list[Tensor], lr: float) -> list[Tensor]:
    bn: Any = model[1]
    model.requires_grad_(False)
    bn.requires_grad_(True)
    bn.train()
    optimiser = torch.optim.Adam(bn.parameters(), lr=lr, betas=(0.9, 0.999))
    answers = []
    for x in feed:
        logits = model(x)
        loss = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        answers.append(logits.detach())
    return answers


def test_tent_is_tent() -> None:
    model, twin, feed = net(), net(), batches(16, 16, 9, shape=(6,))
    wanted = plain_tent(twin, feed, 1e-2)
    stream = adapt_(model, "tent", guard=False, lr=1e-2)
    for x, answer in zip(feed, wanted, strict=True):
        near(stream(x), answer.double(), 1e-5)
    near(model[1].weight.detach(), twin[1].weight.detach().double(), 1e-5)
    assert torch.equal(model[1].running_mean, net()[1].running_mean)  # the source's statistics stay


def test_tbr_has_the_value_of_the_running_moments_and_the_gradient_of_the_batch_times_a_constant() -> None:
    bn, (x,) = norm(), batches(6)
    (site,) = find_sites(bn)
    known, run = site.statistics(), Moments(6, torch.randn(3).double(), torch.rand(3).double() + 0.5)
    assert known is not None
    z = x.clone().requires_grad_()
    out = bn(renormalised(site, z, run, known))
    near(out, slow.normalised(x.double().numpy(), run.mean.numpy(), run.var.numpy(), EPS))
    weight = torch.randn_like(x)
    (out * weight).sum().backward()
    own = x.clone().requires_grad_()
    (nn.functional.batch_norm(own, None, None, None, None, True, 0.0, EPS) * weight).sum().backward()
    _, var = slow.moments(x.double().numpy())
    r = torch.from_numpy(np.sqrt(var + EPS)) / (run.var + EPS).sqrt()
    near(z.grad, own.grad.double() * r[None, :, None, None])


def test_tbr_follows_the_stream_from_its_first_batch_on() -> None:
    model, feed = net(), batches(16, 16, 8, shape=(6,))
    stream = adapt_(model, "tbr", guard=False, lr=1e-12)
    hidden = [model[0](x).detach().double().numpy() for x in feed]
    mean, var = slow.moments(hidden[0])
    for x, h in zip(feed, hidden, strict=True):
        out = torch.from_numpy(slow.normalised(h, mean, var, EPS)).float()
        near(stream(x), model[3](out.relu()).detach().double(), 1e-4)
        m, v = slow.moments(h)
        mean, var = 0.95 * mean + 0.05 * m, 0.95 * var + 0.05 * v


def test_eata_selects_as_the_paper_with_the_margin_of_its_classes() -> None:
    model = net(classes=5)
    stream = adapt_(model, "eata", guard=False, sure=0.9, lr=1e-2)
    running: Any = stream._running
    margin = 1.5 / math.sqrt(5)
    mean, total, losses = None, 0, []
    for seed in range(4):
        logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(seed)) * 3
        loss = running.loss(logits)
        rows = logits.double().numpy()
        kept = slow.selected(rows, 0.9, margin, mean)
        assert 0 < len(kept) < 12
        total += len(kept)
        assert running.selected == total
        p = np.mean([slow.softmax(rows[i]) for i in kept], axis=0)
        mean = p if mean is None else 0.9 * mean + 0.1 * p
        h = [slow.entropy(rows[i]) for i in kept]
        losses.append((float(loss), np.mean([e * np.exp(0.9 * np.log(5) - e) for e in h])))
        near(running._mean, mean, 1e-5)
    for found, wanted in losses:
        assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_an_empty_selection_moves_nothing_not_even_by_momentum(optimiser: str) -> None:
    model, (x,) = net(), batches(16, shape=(6,))
    stream = adapt_(model, "eata", guard=False, sure=1.0, lr=0.1, optimiser=optimiser)
    stream(x)
    before = model[1].weight.detach().clone()
    assert not torch.equal(before, torch.ones(8))
    running: Any = stream._running
    running.finish(torch.zeros(4, 3))  # entropy ln 3: nobody is sure
    assert torch.equal(model[1].weight, before)


def test_fisher_only_with_batches_of_the_source_and_by_its_definition() -> None:
    model, feed = net(), batches(16, 8, shape=(6,))
    known = profile(model, feed)
    assert adapt_(net(), "eata", known, guard=False)._running._fisher == {}  # type: ignore[attr-defined]
    found: Any = adapt_(model, "eata", feed, guard=False)._running
    twin = net()
    twin[1].train()
    wanted = [torch.zeros(8), torch.zeros(8)]
    for x in feed:
        logits = twin(x)
        grads = torch.autograd.grad(
            nn.functional.cross_entropy(logits, logits.argmax(1)), [twin[1].weight, twin[1].bias]
        )
        wanted = [w + g.square() / 2 for w, g in zip(wanted, grads, strict=True)]
    near(found._fisher["1.weight"], wanted[0].double(), 1e-5)
    near(found._fisher["1.bias"], wanted[1].double(), 1e-5)
    assert float(found._pull(3).detach()) == 0.0
    with torch.no_grad():
        found.parameters["1.weight"] += 2.0
    assert float(found._pull(3).detach()) == pytest.approx(float(4 * wanted[0].sum()), rel=1e-4)
    assert float(found._pull(101).detach()) == pytest.approx(float(8000 * wanted[0].sum()), rel=1e-4)


def test_rdumb_is_the_source_again_after_every() -> None:
    model, feed = net(), batches(16, 16, 16, shape=(6,))
    stream = adapt_(model, "rdumb", guard=False, sure=1.0, lr=0.1, every=2)
    first = stream(feed[0])
    assert not torch.equal(model[1].weight, torch.ones(8))
    stream(feed[1])
    assert torch.equal(model[1].weight, torch.ones(8))
    assert torch.equal(stream(feed[0]), first)


def test_roids_ratio_and_its_answer() -> None:
    logits = torch.randn(7, 4).double() * 3
    near(soft_likelihood_ratio(logits), np.array([slow.soft_likelihood_ratio(row) for row in logits.numpy()]), 1e-9)
    running: Any = adapt_(net(), "roid", guard=False)._running
    p = slow.softmax(logits.numpy())
    mix = p.mean(0)
    smooth = max(1 / 7, 1 / 4) / mix.max()
    prior = (mix + smooth) / (1 + smooth * 4)
    near(running.answer(logits), np.log(p) + np.log(prior), 1e-9)


@pytest.mark.parametrize("samples", [1, 5])
def test_roid_of_one_sample_or_of_equal_ones_is_finite_and_pulled_to_the_source(samples: int) -> None:
    model = net()
    stream = adapt_(model, "roid", guard=False, lr=0.1, keep=0.5)
    (x,) = batches(1, shape=(6,))
    for _ in range(3):
        assert bool(torch.isfinite(stream(x.expand(samples, 6))).all())
    assert bool(torch.isfinite(model[1].weight).all())
    assert (
        float((model[1].weight.detach() - 1).abs().max()) <= 0.1 + 1e-6
    )  # steps of 0.1, each halved: 0.05 + 0.025 + …


def test_roids_second_forward_is_normalised_as_its_first() -> None:
    model, (x,) = net(), batches(16, shape=(6,))
    running: Any = adapt_(model, "roid", guard=False)._running
    twin = net()
    twin[1].train()
    with torch.no_grad():
        near(running.scores(x), twin(x).double(), 1e-5)
