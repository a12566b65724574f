"""Streams: what the guard does, what garbage leaves, which sources and states are taken, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import renorm.online
from renorm.adapt import adapt_
from renorm.errors import BatchError, ModelError, NoBatchNorm, RenormError, UnknownName, UsageError
from renorm.guard import Guard, Watch
from renorm.online.base import catalogue, profile_of
from renorm.profile import profile
from tests import zoo
from tests.animals import convs
from tests.contracts.photograph import differences, photograph

CASE = zoo.named("bn2d")
FORWARD_ONLY = ("batch", "ema", "lame", "prior", "shrink", "source", "unmix")


def feed(*sizes: int, seed: int = 0) -> list[Tensor]:
    return [CASE.batch(n, seed + k) for k, n in enumerate(sizes)]


def same_state(one: dict[str, Tensor], other: dict[str, Tensor], at: float = 0.0) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[k].double(), other[k].double(), rtol=at, atol=at) for k in one
    )


# ── the guard ──


def test_without_a_guard_every_answer_is_the_adapted_models_and_with_one_the_first_is_the_sources() -> None:
    (x,) = feed(64)
    model = CASE.build()
    with torch.no_grad():
        home = model(x)
    free, guarded = (
        adapt_(CASE.build(), "batch", guard=False),
        adapt_(model, "batch", guard=Guard(limit=1.0, certain=0.0)),
    )
    assert not torch.allclose(free(x), home, atol=1e-3)
    assert free.log[-1].believed
    assert torch.equal(guarded(x), home)
    assert not guarded.log[-1].believed
    for stream in (free, guarded):  # the two answered alike so far
        assert stream.log[-1].evidence != stream.log[-1].evidence


def test_a_believed_model_answers_and_some_samples_are_judged() -> None:
    stream = adapt_(CASE.build(), "batch", guard=Guard(limit=-1.5, certain=0.0, learning=1.0))
    free = adapt_(CASE.build(), "batch", guard=False)
    for x in feed(32, 32, 32):
        assert torch.allclose(stream(x), free(x), atol=1e-6)
    assert [row.believed for row in stream.log] == [True, True, True]
    ours, theirs = stream.log[-1].confidence
    assert 1 / 3 < ours <= 1
    assert 1 / 3 < theirs <= 1
    assert [row.step for row in stream.log] == [1, 2, 3]
    assert [row.samples for row in stream.log] == [32, 32, 32]


def test_the_judged_share_is_kept_in_the_long_run() -> None:
    for samples in (1, 4, 10, 16, 32, 64):
        watch = Watch(Guard(first=0))
        taken = sum(len(watch.rows(samples, 0.125)) for _ in range(400))
        assert taken == pytest.approx(400 * samples * 0.125, abs=max(32, samples))
    rows = Watch(Guard(first=0)).rows(64, 0.125)
    assert rows.tolist() == [0, 8, 16, 24, 32, 40, 48, 56]


def test_a_gradient_method_gone_wrong_is_sent_back_and_says_why() -> None:
    model = CASE.build()
    stream = adapt_(model, "tent", guard=Guard(limit=0.99, certain=0.0, patience=2, learning=1.0), lr=0.05)
    origin = model[1].weight.detach().clone()
    for x in feed(*[32] * 4):
        stream(x)
    assert "back" in [row.action for row in stream.log]
    assert any("judged steps in a row the source was surer" in row.why for row in stream.log)
    assert torch.equal(model[1].weight, origin)  # there was no good state: back to the source


def test_answers_that_crowd_into_one_class_start_it_anew() -> None:
    watch = Watch(Guard())
    one, many = torch.tensor([[9.0, 0.0, 0.0]]).repeat(48, 1), 9 * torch.eye(3).repeat(16, 1)
    verdict = watch.judge(one, many, moved=1.0, trains=True)
    assert verdict.action == "anew"
    assert "the answers crowd into few classes: their mix has an entropy of 0.0" in verdict.why
    assert not watch.believed


def test_numbers_that_are_not_finite_end_belief() -> None:
    for trains, action in ((True, "anew"), (False, "")):
        watch = Watch(Guard())
        verdict = watch.judge(torch.full((4, 3), torch.nan), torch.randn(4, 3), moved=0.0, trains=trains)
        assert verdict[:3] == (False, -1.0, action)
        assert "not finite" in verdict.why


# ── garbage ──


@pytest.mark.parametrize("name", [*FORWARD_ONLY, "tent"])
@pytest.mark.parametrize("guard", [False, True])
def test_samples_that_are_not_finite_get_nan_and_teach_nothing(name: str, guard: bool) -> None:
    stream, clean = (adapt_(CASE.build(), name, guard=guard) for _ in range(2))
    for x in feed(20, 20):
        dirty = torch.cat([x[:7], torch.full_like(x[:1], torch.nan), x[7:], torch.full_like(x[:1], torch.inf)])
        answer, wanted = stream(dirty), clean(x)
        assert answer[[7, 21]].isnan().all()
        assert torch.equal(torch.cat([answer[:7], answer[8:21]]), wanted)
        assert stream.log[-1].left_out == 2
    assert same_state(stream.state_dict(), clean.state_dict())


@pytest.mark.parametrize("guard", [False, True])
def test_a_batch_of_nothing_but_nan(guard: bool) -> None:
    model = CASE.build()
    stream = adapt_(model, guard=guard)
    stream(feed(16)[0])
    before, state = photograph(model), stream.state_dict()
    answer = stream(torch.full((5, 3, 6, 6), torch.nan))
    assert answer.shape == (5, 3)
    assert answer.isnan().all()
    assert differences(before, photograph(model)) == []
    assert same_state(state, stream.state_dict())
    assert stream.log[-1].left_out == 5
    assert "no sample of the batch was finite" in stream.log[-1].why


def test_a_second_input_of_one_number_a_sample_may_be_nan_too() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            y: Tensor = self.bn(x) * weight[:, None]
            return y

    x, weight = torch.randn(6, 3), torch.ones(6)
    weight[2] = torch.nan
    answer = adapt_(Weighted().eval(), guard=False)(((x, weight), None))
    assert answer.isnan().any(1).tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("name", ["shrink", "ema", "unmix", "tent"])
def test_garbage_a_thousand_times_too_large_leaves_no_trace(name: str) -> None:
    stream, clean = (adapt_(CASE.build(), name, guard=Guard(learning=1.0, judged=1.0)) for _ in range(2))
    for k, x in enumerate(feed(32, 32, 32, 32)):
        dirty = torch.cat([x, x[:2] * 1000]) if k else x
        answer, wanted = stream(dirty), clean(x)
        assert torch.allclose(answer[:32], wanted, atol=1e-4)
        assert stream.log[-1].left_out == (2 if k else 0)
    one, other = ({k: v for k, v in s.state_dict().items() if k.startswith("method.")} for s in (stream, clean))
    assert same_state(one, other, at=1e-5)


# ── sources and states ──


def test_a_source_is_a_profile_its_file_or_batches(tmp_path: Path) -> None:
    model = CASE.build()
    known = profile(model, feed(30, 30))
    known.save(tmp_path / "source.safetensors")
    x = feed(40, seed=9)[0]
    answers = [
        adapt_(CASE.build(), "shrink", source, guard=False)(x)
        for source in (known, tmp_path / "source.safetensors", str(tmp_path / "source.safetensors"), feed(30, 30))
    ]
    for answer in answers[1:]:
        assert torch.allclose(answer, answers[0], atol=1e-4)
    assert not torch.allclose(answers[0], adapt_(CASE.build(), guard=False)(x), atol=1e-5)


def test_batches_of_the_source_for_a_model_without_batch_norm() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    batches = [torch.randn(6, 5) for _ in range(2)]
    stream = adapt_(model, "eata", batches, guard=False)
    assert stream(batches[0]).shape == (6, 3)


@pytest.mark.parametrize("guard", [False, True])
def test_a_wrong_state_is_refused_with_the_stream_as_it_was(guard: bool) -> None:
    model = CASE.build()
    stream = adapt_(model, guard=guard)
    stream(feed(20)[0])
    wide = adapt_(convs(nn.BatchNorm2d(5), nn.BatchNorm2d(5), channels=5).eval(), guard=guard)
    wide(feed(20)[0])
    cut = stream.state_dict()
    del cut["method.images"]
    wrong: list[dict[str, Tensor]] = [{}, adapt_(CASE.build(), "ema", guard=guard).state_dict(), wide.state_dict(), cut]
    if guard:
        wrong.append(adapt_(CASE.build(), guard=False).state_dict())
    before, state = photograph(model), stream.state_dict()
    for other in wrong:
        with pytest.raises(UsageError, match="a state was to be loaded into a stream of 'shrink' on this model"):
            stream.load_state_dict(other)
        assert differences(before, photograph(model)) == []
        assert same_state(state, stream.state_dict(), at=1e-6)


def test_a_reset_puts_the_model_back_to_the_source_and_keeps_the_log() -> None:
    model = CASE.build()
    before = photograph(model)
    stream = adapt_(model, "tent", guard=False, lr=0.1)
    stream(feed(20)[0])
    assert differences(before, photograph(model)) != []
    stream.reset_()
    assert differences(before, photograph(model)) == []
    assert len(stream.log) == 1


# ── refused ──


def test_batches_that_cannot_be_used_leave_the_stream() -> None:
    model = CASE.build()
    stream = adapt_(model)
    stream(feed(20)[0])
    before, state = photograph(model), stream.state_dict()
    with pytest.raises(BatchError, match="a batch of a stream holds no samples"):
        stream(torch.zeros(0, 3, 6, 6))
    for bad in (torch.randn(4, 5, 6, 6), torch.zeros(4, 3, 6, 6, dtype=torch.long)):
        with pytest.raises((RenormError, RuntimeError), match=r"channels|dtype|type"):
            stream(bad)
        assert differences(before, photograph(model)) == []
        assert same_state(state, stream.state_dict())
    assert stream(torch.randn(4, 3, 9, 11)).shape == (4, 3)  # another size is none


def test_a_closed_stream_is_refused() -> None:
    stream = adapt_(CASE.build())
    state = stream.state_dict()
    stream.restore_()
    stream.restore_()
    x = feed(4)[0]
    for call in (lambda: stream(x), lambda: stream.predict(x), stream.reset_, lambda: stream.load_state_dict(state)):
        with pytest.raises(UsageError, match=r"this stream was ended by restore_\(\)"):
            call()


def test_unknown_names_models_and_sources() -> None:
    model = CASE.build()
    with pytest.raises(UnknownName, match="there is no online method 'shrnk'"):
        adapt_(model, "shrnk")
    with pytest.raises(UnknownName, match="there is no option of the online method 'shrink' 'flor'"):
        adapt_(model, flor=0.1)
    with pytest.raises(UnknownName, match="there is no optimiser 'adamw'"):
        adapt_(model, "tent", optimiser="adamw")
    for name in zoo.WITHOUT:
        bare = zoo.named(name).build()
        with pytest.raises(NoBatchNorm, match="the online method 'shrink' needs batch norm that holds statistics"):
            adapt_(bare)
    with pytest.raises(UsageError, match="the online method 'hybrid' needs to know the source"):
        adapt_(model, "hybrid")
    with pytest.raises(ModelError, match="the profile knows a batch norm"):
        adapt_(zoo.named("bn1d").build(), "shrink", profile(model, feed(20)))
    frozen = zoo.named("frozen-torchvision").build()[:2].append(nn.Flatten())
    with pytest.raises(UsageError, match="trains the scale and shift of norm layers, and this model has none"):
        adapt_(frozen, "tent")
    assert differences(photograph(model), photograph(model)) == []
    with pytest.raises(AttributeError, match="has no attribute 'Shrnk'"):
        _ = renorm.online.Shrnk
    assert renorm.online.Shrink is catalogue()["shrink"]
    assert profile_of.__doc__


def test_a_profile_of_other_classes_is_refused_with_the_stream_as_it_was() -> None:
    model = CASE.build()
    known = profile(model, feed(20), output=lambda logits: logits[:, :2])
    for name in ("shrink", "hybrid"):
        stream = adapt_(CASE.build(), name, known, guard=False)
        with pytest.raises(UsageError, match="the profile has 2 classes and the model gives logits of 3"):
            stream(feed(8)[0])
        assert not stream.log


def test_logits_that_are_not_one_row_a_sample() -> None:
    stream = adapt_(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(0)).eval(), guard=False)
    with pytest.raises(UsageError, match=r"adapt_ needs logits \(N, K\) for the 4 samples"):
        stream(torch.randn(4, 3, 2, 2))


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("shrink", {"floor": 2.0}, "floor of shrink is a share"),
    ("shrink", {"floor": True}, "floor of shrink is a share"),
    ("shrink", {"gap": 0.0}, "gap of shrink is a number above 0"),
    ("shrink", {"rows": 0}, "rows of shrink is 1 or more"),
    ("prior", {"images": -1}, "images of prior is how many"),
    ("ema", {"rate": "0.1"}, "rate of ema is a share"),
    ("tent", {"lr": -1.0}, "lr of tent is a number above 0"),
    ("tbr", {"keep": 1.5}, "keep of tbr is a share"),
    ("eata", {"sure": 0.0}, "sure of eata is a share of ln K"),
    ("eata", {"margin": 2.0}, "margin of eata is a cosine"),
    ("eata", {"anchor": -1.0}, "anchor of eata is a weight"),
    ("rdumb", {"every": 0}, "every of rdumb is a number of steps"),
    ("roid", {"temperature": 0.0}, "temperature of roid is a number above 0"),
    ("lame", {"neighbours": 0}, "neighbours and rounds of lame are 1 or more"),
    ("unmix", {"components": 1}, "components of unmix is a number of 2 or more"),
    ("hybrid", {"first": -0.1}, "first of hybrid is a share"),
]


@pytest.mark.parametrize(("name", "options", "says"), WRONG)
def test_options_that_make_no_sense(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        adapt_(CASE.build(), name, **options)


def test_a_guard_that_makes_no_sense() -> None:
    for name in ("judged", "learning", "collapse"):
        with pytest.raises(UsageError, match=f"{name} of the guard is a share"):
            Guard(**{name: 0.0})
    for name in ("memory", "patience", "good"):
        with pytest.raises(UsageError, match=f"{name} of the guard is a number above 0"):
            Guard(**{name: 0})
