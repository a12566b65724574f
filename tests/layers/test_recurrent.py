"""Recurrent networks with batch norm: their formulas, torch's face, and every step a place of its own."""

from __future__ import annotations

import copy
import pickle
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import renorm
from renorm.errors import BatchError, UsageError
from renorm.layers import BNGRU, BNLSTM
from renorm.layers.recurrent.steps import StepNorm
from tests.reference import recurrent as twin

F64 = torch.float64
KINDS: dict[str, Any] = {"lstm": BNLSTM, "gru": BNGRU}
TORCH: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU}
every_kind = pytest.mark.parametrize("kind", ["lstm", "gru"])
LENGTHS = (5, 2, 6, 3, 6, 2, 4)


def made(kind: str, *args: int, lived: bool = True, **options: Any) -> Any:
    """A network with its norms off their defaults, in training."""
    torch.manual_seed(7)
    options = {"steps": 4, "batch_first": True, "dtype": F64, **options}
    rnn = KINDS[kind](*(args or (3, 5)), **options)
    with torch.no_grad():
        for name, tensor in rnn.state_dict().items():
            if name.endswith(("running_var", ".weight")):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("running_mean") or "bias" in name:
                tensor.normal_(0, 0.3)
            elif name.endswith("tracked") and lived:
                tensor.fill_(7)
    return rnn


def sequences(n: int = 7, steps: int = 6, width: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, steps, width, dtype=F64, generator=generator) * 2 + 0.5


def arrays(rnn: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights under their names, and the statistics (mean, var) of each norm, as NumPy arrays."""
    weights = {name: p.detach().numpy().copy() for name, p in rnn.named_parameters()}
    held = {n: (m.running_mean.numpy().copy(), m.running_var.numpy().copy()) for n, m in rnn.named_children()}
    return weights, held


def moments(rnn: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in rnn.named_buffers()}


def same(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=tolerance, atol=tolerance, msg=key)


# ── numbers ──


@every_kind
@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("lengths", [LENGTHS, None], ids=["ragged", "equal"])
def test_it_gives_what_its_twin_gives(kind: str, mode: bool, lengths: tuple[int, ...] | None) -> None:
    rnn, x = made(kind).train(mode), sequences()
    weights, held = arrays(rnn)
    rows = [x[n, : (lengths or (6,) * 7)[n]].numpy() for n in range(7)]
    wanted, last, seen = twin.run(kind, rows, weights, None if mode else held)
    output, final = rnn(x, lengths=lengths)
    for n, row in enumerate(wanted):
        np.testing.assert_allclose(output[n, : len(row)].detach().numpy(), row, rtol=1e-9, atol=1e-9)
        assert not output[n, len(row) :].any()
        for got, state in zip(final if kind == "lstm" else (final,), last[n], strict=False):
            np.testing.assert_allclose(got[0, n].detach().numpy(), state, rtol=1e-9, atol=1e-9)
    for name, norm in rnn.named_children():
        for place in range(4):
            steps = [seen[name, t] for t in range(6) if mode and min(t, 3) == place and (name, t) in seen]
            mean, var = held[name][0][place], held[name][1][place]
            if steps:  # steps from the fourth on share a place: pooled by their samples
                count = sum(n for *_, n in steps)
                pooled = sum(m * n for m, _, n in steps) / count
                spread = sum((v + (m - pooled) ** 2) * n for m, v, n in steps) / count
                mean, var = 0.9 * mean + 0.1 * pooled, 0.9 * var + 0.1 * spread * count / (count - 1)
            np.testing.assert_allclose(norm.running_mean[place].numpy(), mean, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(norm.running_var[place].numpy(), var, rtol=1e-9, atol=1e-12)


@every_kind
@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_its_gradient_is_that_of_its_formula(kind: str, mode: bool) -> None:
    rnn = made(kind, 2, 2, bidirectional=True).train(mode)
    for norm in rnn.children():
        norm.track_running_stats = False
    x = sequences(4, 3, 2).requires_grad_()
    parameters = list(rnn.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: rnn(x, lengths=[3, 2, 3, 2])[0], (x, *parameters))


@every_kind
def test_without_norms_that_do_anything_it_is_torchs_network(kind: str) -> None:
    torch.manual_seed(0)
    for bidirectional in (False, True):
        old = TORCH[kind](3, 5, 2, batch_first=True, bidirectional=bidirectional, bias=bidirectional).eval()
        new = getattr(KINDS[kind], f"from_{kind}")(old, steps=4)
        assert not new.training
        x = sequences().float()
        state = torch.randn(2 + 2 * bidirectional, 7, 5)
        begin = (state, state.flip(0)) if kind == "lstm" else state
        for fed in (x, x[0], pack_padded_sequence(x, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False)):
            hx = begin if not isinstance(fed, Tensor) or fed.dim() == 3 else None
            (wanted, last), (got, final) = old(fed, hx), new(fed, hx)
            torch.testing.assert_close(
                *((o if isinstance(o, Tensor) else o.data) for o in (got, wanted)), rtol=1e-5, atol=1e-6
            )
            torch.testing.assert_close(final, last, rtol=1e-5, atol=1e-6)


def test_training_starts_as_the_paper_says() -> None:
    rnn = BNLSTM(3, 5, num_layers=2, bidirectional=True)
    names = [f"{norm}{end}" for end in ("", "_reverse", "_l1", "_l1_reverse") for norm in ("input", "hidden", "cell")]
    assert sorted(name for name, _ in rnn.named_children()) == sorted(names)
    for name, norm in rnn.named_children():
        assert torch.equal(norm.weight, torch.full_like(norm.weight, 0.1))
        assert (norm.bias is None) == (not name.startswith("cell"))
    for end in ("_l0", "_l0_reverse", "_l1", "_l1_reverse"):
        whole = rnn.get_parameter(f"bias_ih{end}") + rnn.get_parameter(f"bias_hh{end}")
        assert whole.tolist() == [0.0] * 5 + [1.0] * 5 + [0.0] * 10
    state = {name for name in rnn.state_dict() if "." not in name}
    assert state == set(nn.LSTM(3, 5, 2, bidirectional=True).state_dict())
    rnn.flatten_parameters()
    assert "steps=100, num_layers=2, bidirectional=True" in repr(rnn)


# ── padding, packing ──


@every_kind
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_padding_moves_nothing_and_packed_equals_padded(kind: str, lengths: list[int], seed: int) -> None:
    rnn = made(kind, num_layers=2, bidirectional=True)
    x = sequences(len(lengths), seed=seed)
    noisy = x.clone()
    for n, length in enumerate(lengths):
        noisy[n, length:] = torch.nan
    first, second, third = rnn, copy.deepcopy(rnn), copy.deepcopy(rnn)
    output, final = first(x, lengths=lengths)
    other, ended = second(noisy, lengths=lengths)
    packed, done = third(pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False))
    assert isinstance(packed, PackedSequence)
    torch.testing.assert_close(other, output)
    torch.testing.assert_close((ended, done), (final, final))
    torch.testing.assert_close(pad_packed_sequence(packed, batch_first=True, total_length=6)[0], output)
    same(moments(first), moments(second))
    same(moments(first), moments(third))


@every_kind
def test_the_order_of_sequences_and_the_layout_do_not_matter(kind: str) -> None:
    x, order = sequences(), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    lengths = torch.tensor(LENGTHS)
    first, second, third = (made(kind, bidirectional=True, batch_first=b) for b in (True, True, False))
    output, _ = first(x, lengths=lengths)
    again, _ = second(x[order], lengths=lengths[order])
    turned, _ = third(x.transpose(0, 1), lengths=lengths)
    torch.testing.assert_close(again, output[order])
    torch.testing.assert_close(turned.transpose(0, 1), output)
    same(moments(first), moments(second), 1e-12)
    same(moments(first), moments(third), 1e-12)


def test_equal_lengths_given_or_not_are_the_same_to_rounding() -> None:
    first, second = made("lstm"), made("lstm")
    torch.testing.assert_close(first(sequences())[0], second(sequences(), lengths=[6] * 7)[0])
    same(moments(first), moments(second), 1e-12)


# ── statistics in time ──


def test_a_step_with_one_sequence_is_normalised_by_what_is_held_and_moves_nothing() -> None:
    rnn = made("lstm", steps=6)
    before = moments(rnn)
    rnn(sequences(3), lengths=[2, 6, 2])
    after = moments(rnn)
    for name in ("input", "hidden", "cell"):
        assert (after[f"{name}.tracked"] - before[f"{name}.tracked"]).tolist() == [1, 1, 0, 0, 0, 0]
        assert torch.equal(after[f"{name}.running_mean"][2:], before[f"{name}.running_mean"][2:])


def test_steps_that_training_never_reached_reuse_the_last_that_it_did() -> None:
    rnn = made("lstm", lived=False, steps=9)
    assert rnn.hidden.slots() == tuple("012345678")
    rnn(sequences(steps=5))
    assert rnn.hidden.slots() == tuple("01234")
    rnn.eval()
    long, _ = rnn(sequences(steps=12))
    for norm in rnn.children():
        norm.running_mean[5:], norm.running_var[5:] = 1e3, 1e-3
    torch.testing.assert_close(rnn(sequences(steps=12))[0], long)
    assert torch.isfinite(long).all()


def test_a_step_that_is_not_finite_moves_nothing_and_is_counted() -> None:
    rnn = made("lstm")
    before = moments(rnn)
    x = sequences()
    x[2, 0, 1] = torch.inf
    rnn(x)
    after = moments(rnn)
    assert torch.equal(after["cell.running_var"], before["cell.running_var"])
    assert torch.equal(after["input.running_var"][0], before["input.running_var"][0])
    assert (after["input.tracked"] - before["input.tracked"]).tolist() == [0, 1, 1, 1]
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert [int(norm.skipped) for norm in rnn.children()] == [1, 5, 6]  # the hidden state starts at 0


def test_a_steps_first_batch_is_taken_as_it_is_unless_nothing_is_to_move() -> None:
    rnn, still = made("lstm", lived=False), made("lstm", lived=False, momentum=0.0)
    before = moments(still)
    for each in (rnn, still):
        each(sequences(steps=2))
    torch.testing.assert_close(
        rnn.input.running_mean[1], (sequences(steps=2)[:, 1] @ rnn.weight_ih_l0.T).mean(0).detach()
    )
    assert not rnn.hidden.running_var[0].any()
    same(
        {k: v for k, v in moments(still).items() if "running" in k}, {k: v for k, v in before.items() if "running" in k}
    )


def test_momentum_none_averages_and_a_norm_in_evaluation_stays() -> None:
    rnn = made("gru", lived=False, momentum=None)
    rnn.input.eval()
    seen = []
    for seed in range(3):
        before = rnn.hidden.running_mean.clone()
        rnn(sequences(seed=seed, steps=4))
        seen.append(rnn.hidden.running_mean * (seed + 1) - before * seed)
    torch.testing.assert_close(rnn.hidden.running_mean, torch.stack(seen).mean(0))
    assert not rnn.input.tracked.any()
    rnn.hidden.reset_parameters()
    assert rnn.hidden.used == 0


def test_one_norm_alone_normalises_a_step() -> None:
    norm, x = StepNorm(3, 4, dtype=F64, gain=1.0), sequences()[:, 0]
    plain = nn.BatchNorm1d(3, dtype=F64, momentum=1.0)
    torch.testing.assert_close(norm(x, step=2), plain(x))
    torch.testing.assert_close(norm.running_var[2], plain.running_var)
    assert norm.tracked.tolist() == [0, 0, 1, 0]


def test_recomputing_for_checkpoints_counts_a_batch_once() -> None:
    from torch.utils.checkpoint import checkpoint

    first, second = made("lstm"), made("lstm")
    x = sequences().requires_grad_()
    first(x)[0].sum().backward()
    checkpoint(lambda x: second(x)[0], x, use_reentrant=False).sum().backward()
    same(moments(first), moments(second))


# ── as any module ──


@every_kind
def test_state_copy_and_pickle(kind: str) -> None:
    rnn = made(kind, num_layers=2, bidirectional=True)
    rnn(sequences())
    other = KINDS[kind](3, 5, 2, steps=4, batch_first=True, bidirectional=True, dtype=F64)
    other.load_state_dict(rnn.state_dict())
    rnn.eval()
    for copied in (other.eval(), copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert torch.equal(copied(sequences())[0], rnn(sequences())[0])


def test_dropout_stands_between_layers_in_training_only() -> None:
    rnn = made("gru", num_layers=2, dropout=1.0)
    output, _ = rnn(sequences())
    other, _ = rnn(sequences(seed=4))
    assert torch.equal(output[:, 0], other[:, 0])  # the second layer sees zeros
    rnn.eval()
    assert not torch.equal(rnn(sequences())[0], rnn(sequences(seed=4))[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_types_and_autocast(dtype: torch.dtype) -> None:
    rnn = made("lstm", dtype=torch.float32)
    wanted, _ = copy.deepcopy(rnn)(sequences().float())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        got, _ = rnn(sequences().float())
    torch.testing.assert_close(got.float(), wanted, rtol=5e-2, atol=5e-2)
    assert rnn.cell.running_var.dtype == torch.float32
    half, _ = copy.deepcopy(rnn).to(dtype).eval()(sequences().to(dtype))
    assert half.dtype == dtype


# ── places ──


class Reader(nn.Module):
    """Sequences to classes, by the last state."""

    def __init__(self, kind: str = "lstm", steps: int = 8, width: int = 3) -> None:
        super().__init__()
        self.rnn = KINDS[kind](width, 8, steps=steps, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def trained() -> tuple[Reader, Tensor]:
    model, x = _trained()
    return copy.deepcopy(model), x


@cache
def _trained() -> tuple[Reader, Tensor]:
    torch.manual_seed(1)
    model, x = Reader(), torch.randn(64, 6, 3).cumsum(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=100)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), (x[:, -1, 0] > 0).long()).backward()
        optimizer.step()
        decay.step()
    return model.eval(), x


def test_every_step_is_observed_recalibrated_and_undone_by_itself() -> None:
    model, x = trained()
    names = [f"rnn.{norm}@{t}" for norm in ("input", "hidden", "cell") for t in range(6)]
    assert [site.name for site in renorm.find_sites(model)] == names
    seen = renorm.observe(model, [x[:40], x[40:]], under="running")
    assert sorted(seen) == sorted(names)
    weight = model.rnn.weight_ih_l0.detach().double()
    at_4 = x[:, 4].double() @ weight.T
    torch.testing.assert_close(seen["rnn.input@4"].values.mean, at_4.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen["rnn.input@4"].values.var, at_4.var(0, correction=0), rtol=1e-5, atol=1e-5)

    before = {k: v.clone() for k, v in model.state_dict().items()}
    shifted = x * 3 + torch.arange(6)[:, None]  # another shift at every step
    adaptation = renorm.recalibrate_(model, [shifted], prior=0)
    assert not adaptation.unvisited
    moved = [float(adaptation.shifts[f"rnn.input@{t}"].mean_gap.abs().mean()) for t in range(6)]
    assert moved[5] > moved[0]
    torch.testing.assert_close(
        model.rnn.input.running_mean[4].double(), (shifted[:, 4].double() @ weight.T).mean(0), rtol=1e-5, atol=1e-5
    )
    adaptation.restore_()
    same(dict(model.state_dict()), before)

    renorm.recalibrate_(model, [shifted], prior=0, include="*@2")
    changed = (model.rnn.cell.running_mean != before["rnn.cell.running_mean"]).any(1)
    assert changed.tolist() == [False, False, True, *[False] * 5]


def test_a_shifted_stream_is_read_again_after_recalibration() -> None:
    model, _ = trained()
    torch.manual_seed(2)
    fresh = torch.randn(256, 6, 3).cumsum(1)
    labels = (fresh[:, -1, 0] > 0).long()
    shifted = fresh * 4 - 20

    def score(x: Tensor) -> float:
        return renorm.evaluate(model, [(x, labels)]).value

    home, lost = score(fresh), score(shifted)
    adaptation = renorm.recalibrate_(model, [shifted], prior=0)
    found = score(shifted)
    assert lost < home - 0.2
    assert found > home - 0.05
    adaptation.restore_()


def test_a_trained_one_is_healthy_and_steps_shorter_than_steps_are_no_finding() -> None:
    model, x = trained()
    findings = renorm.diagnose(model, [x]).findings
    assert [f for f in findings if f.severity == "error"] == []
    assert not any("@6" in (f.site or "") or "@7" in (f.site or "") for f in findings)


def test_a_profile_sees_the_sequences_in_the_order_of_their_labels() -> None:
    """Packing sorts by length; class moments must not be booked under the labels of others."""

    class Ragged(Reader):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            output, _ = self.rnn(x, lengths=lengths)
            return self.head(output.sum(1))

    torch.manual_seed(3)
    model, labels = Ragged().eval(), torch.arange(20) % 2
    x = torch.randn(20, 4, 3) + 5 * labels[:, None, None]
    lengths = torch.tensor([2, 4] * 10)
    profile = renorm.profile(
        model,
        [{"x": x, "lengths": lengths, "labels": labels}],
        forward=lambda m, b: m(b["x"], b["lengths"]),
    )
    moments = profile.at(torch.tensor([1.0, 0.0], dtype=F64))["rnn.input@0"]
    wanted = (x[labels == 0, 0] @ model.rnn.weight_ih_l0.detach().T).mean(0).double()
    torch.testing.assert_close(moments.mean, wanted, rtol=1e-3, atol=1e-3)


# ── bad input ──


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_size": 0, "hidden_size": 4}, "input_size is a whole number of 1 or more; got 0"),
        ({"input_size": 3, "hidden_size": 4, "num_layers": 1.5}, "num_layers is a whole number of 1 or more; got 1.5"),
        ({"input_size": 3, "hidden_size": 4, "dropout": 2}, "dropout is a probability, in .*; got 2"),
        ({"input_size": 3, "hidden_size": 4, "steps": 0}, "steps is the number of time steps .*; got 0"),
        ({"input_size": 3, "hidden_size": 4, "momentum": 3}, "momentum is the weight of the new batch, .*; got 3"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BNLSTM(**options)


def test_inputs_that_do_not_fit_are_refused_and_nothing_moves() -> None:
    rnn, x = made("lstm"), sequences()
    before = moments(rnn)
    packed = pack_padded_sequence(x, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False)
    for wrong, options, message in (
        (x[:, :, :2], {}, r"BNLSTM reads sequences \(N, T, C\) of 3 values a step, .* given the shape \(7, 6, 2\)"),
        (x[:, :0], {}, r"the shape \(7, 0, 3\)"),
        (x, {"lengths": [6, 2, 0, 1, 1, 1, 1]}, "sequence 2 was said to have 0 steps; it needs 1 to 6"),
        (x, {"lengths": [6, 2, 7, 1, 1, 1, 1]}, "sequence 2 was said to have 7 steps; it needs 1 to 6"),
        (x, {"lengths": [6, 2]}, r"lengths should be 7 whole numbers, .* got shape \(2,\)"),
        (x, {"hx": (torch.zeros(1, 7, 4), torch.zeros(1, 7, 4))}, r"initial states of shape .* = \(1, 7, 5\)"),
    ):
        with pytest.raises(BatchError, match=message):
            rnn(wrong, **options)
    with pytest.raises(UsageError, match="a packed sequence knows its lengths"):
        rnn(packed, lengths=LENGTHS)
    with pytest.raises(BatchError, match=r"StepNorm has 20 channels, and was given the shape \(7, 3\)"):
        rnn.hidden(x[:, 0])
    same(moments(rnn), before)


def test_networks_that_have_no_counterpart_are_refused() -> None:
    with pytest.raises(UsageError, match=r"from_lstm makes a BNLSTM of an nn\.LSTM; got GRU"):
        BNLSTM.from_lstm(nn.GRU(3, 4))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"from_gru makes a BNGRU of an nn\.GRU; got LSTM"):
        BNGRU.from_gru(nn.LSTM(3, 4))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a network with proj_size=2 was given"):
        BNLSTM.from_lstm(nn.LSTM(3, 4, proj_size=2))


# ── whole sequences as one node ──


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["equal", "ragged"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"bidirectional": True, "num_layers": 2}], ids=str)
def test_a_sequence_in_one_node_gives_what_single_steps_give(
    options: dict[str, Any], lengths: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs, states, statistics, gradients, and gradients of gradients."""
    found = []
    for one_node in (True, False):
        rnn, x = made("lstm", **options), sequences().requires_grad_()
        if not one_node:
            monkeypatch.setattr(BNLSTM, "_in_one", lambda *_: False)
        start = torch.linspace(-1, 1, rnn.num_layers * rnn.directions * 35, dtype=F64).view(-1, 7, 5).requires_grad_()
        output, (h, c) = rnn(x, (start, 2 * start), lengths=lengths)
        loss = (output * torch.linspace(-1, 1, output.numel(), dtype=F64).view_as(output)).sum() + (h * c).sum()
        inputs = [x, start, *rnn.parameters()]
        plain = torch.autograd.grad(loss, inputs, retain_graph=True)
        again = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(torch.stack([g.square().sum() for g in again]).sum(), inputs)
        for first, same in zip(plain, again, strict=True):
            torch.testing.assert_close(first, same.detach(), rtol=1e-9, atol=1e-9)
        found.append([output.detach(), h.detach(), c.detach(), *plain, *second, *rnn.buffers()])
    for ours, other in zip(*found, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
def test_statistics_do_not_hang_on_which_way_they_are_moved(
    momentum: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, moved_apart = sequences(steps=4), StepNorm._moved_apart
    quick, slow = made("lstm", momentum=momentum), made("lstm", momentum=momentum)
    taken: list[bool] = []
    monkeypatch.setattr(StepNorm, "_moved_apart", lambda *given: taken.append(moved_apart(*given)) or taken[-1])
    quick(x)
    assert taken == [True] * 3  # each norm took the short way, which the other network is kept from
    monkeypatch.setattr(StepNorm, "_moved_apart", lambda *_: False)
    slow(x)
    same(moments(quick), moments(slow), 1e-12)


@every_kind
def test_it_compiles_whole_with_the_same_numbers_and_statistics(kind: str) -> None:
    """One graph in training and in evaluation, the statistics of steps that share a place and of one that is not finite too."""
    steps = 2 if kind == "lstm" else 3
    plain = made(kind, steps=steps, lived=False)
    other = copy.deepcopy(plain)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for spoilt in (False, True):
        x = sequences(steps=3)
        x[0, 2] = torch.inf if spoilt else 0
        ours, theirs = plain(x)[0], compiled(x)[0]
        torch.testing.assert_close(theirs, ours, equal_nan=True)
        same(moments(other), moments(plain), 1e-12)
        if not spoilt:
            for output in (ours, theirs):
                output.square().sum().backward()
            for mine, its in zip(plain.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(its.grad, mine.grad, rtol=1e-9, atol=1e-9)
    longer = sequences(steps=4)  # than training ever was
    torch.testing.assert_close(compiled.eval()(longer)[0], plain.eval()(longer)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        narrow, other = longer.float(), compiled.float()
        torch.testing.assert_close(other(narrow)[0], plain.float()(narrow)[0], rtol=2e-2, atol=2e-2)
    torch.compiler.reset()


@every_kind
@pytest.mark.parametrize("training", [True, False])
def test_a_hook_on_a_norm_sees_every_step(kind: str, training: bool) -> None:
    rnn = made(kind).train(training)
    seen = {name: 0 for name, _ in rnn.named_children()}
    for name, norm in rnn.named_children():
        norm.register_forward_hook(lambda module, args, y, name=name: seen.update({name: seen[name] + 1}))
    rnn(sequences(steps=6))
    assert set(seen.values()) == {6}
