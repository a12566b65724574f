"""The posterior's norm: its bound on the divergence, and that recalibration leaves it alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import renorm
from renorm.errors import UsageError
from renorm.layers import BatchNorm, PosteriorNorm
from renorm.surgery import convert_


def divergence(mean: Tensor, log_var: Tensor) -> Tensor:
    """The mean over samples of KL(q ‖ N(0, 1)), in nats."""
    return 0.5 * (mean.square() + log_var.exp() - log_var - 1).sum(1).mean()


@settings(max_examples=60, deadline=None)
@given(
    gamma=st.floats(0.05, 3),
    seed=st.integers(0, 10**6),
    samples=st.integers(2, 40),
    width=st.integers(1, 9),
    spread=st.floats(0.1, 1e3),
)
def test_no_encoder_brings_the_divergence_below_the_floor(
    gamma: float, seed: int, samples: int, width: int, spread: float
) -> None:
    torch.manual_seed(seed)
    norm = PosteriorNorm(width, gamma=gamma, eps=1e-12, dtype=torch.float64)
    nn.init.normal_(norm.bias)
    means = torch.randn(samples, width, dtype=torch.float64) * spread + torch.randn(width)
    log_var = torch.randn(samples, width, dtype=torch.float64)
    beta = norm.bias.detach()
    floor = 0.5 * (width * gamma**2 + beta.square().sum())
    torch.testing.assert_close(norm.floor.detach(), floor)
    var = means.var(0, correction=0)
    least = (
        floor - 0.5 * (gamma**2 * norm.eps / (var + norm.eps)).sum()
    )  # what eps takes, where all means are nearly one
    assert divergence(norm(means), log_var) >= least * (1 - 1e-9)
    torch.testing.assert_close(divergence(norm(means), torch.zeros_like(log_var)), least, rtol=1e-7, atol=1e-9)


def test_an_encoder_that_learns_nothing_else_than_to_vanish_cannot() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 5)
    found = {}
    for name, last in (("plain", nn.Identity()), ("norm", PosteriorNorm(3))):
        encoder, spread = nn.Sequential(nn.Linear(5, 3), last), nn.Linear(5, 3)
        optimizer = torch.optim.Adam([*encoder.parameters(), *spread.parameters()], lr=0.05)
        for _ in range(150):
            optimizer.zero_grad()
            loss = divergence(encoder(x), spread(x))
            loss.backward()
            optimizer.step()
        found[name] = loss.item()
    assert found["plain"] < 0.01
    assert found["norm"] >= 3 * 0.5**2 / 2 * 0.99


def test_gamma_is_fixed_and_the_bias_trains() -> None:
    norm = PosteriorNorm(4, gamma=0.7)
    assert norm.weight.tolist() == pytest.approx([0.7] * 4)
    assert [name for name, p in norm.named_parameters() if p.requires_grad] == ["bias"]
    bare = PosteriorNorm(4, gamma=0.7, affine=False)
    assert float(bare(torch.randn(50, 4)).std(0, correction=0).mean()) == pytest.approx(0.7, rel=1e-3)
    assert float(bare.floor) == pytest.approx(4 * 0.49 / 2)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    convert_(model, "posterior", gamma=0.3)
    assert model[1].weight.tolist() == pytest.approx([0.3] * 4)
    assert "gamma=0.3" in repr(model)
    for gamma in (0, -1, float("nan")):
        with pytest.raises(UsageError, match="gamma is the standard deviation that posterior means are given"):
            PosteriorNorm(4, gamma=gamma)


def encoder() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), BatchNorm(4), nn.ReLU(), nn.Linear(4, 2), PosteriorNorm(2))
    for _ in range(30):
        model(torch.randn(32, 3))
    return model.eval()


def test_recalibration_leaves_it_alone_and_says_so_unless_it_is_named() -> None:
    model, batches = encoder(), [torch.randn(64, 3) * 3 + 2]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for include in ("*", ["*"], ["1", "*"]):
        adaptation = renorm.recalibrate_(model, batches, prior=0, include=include)
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
        assert torch.equal(model[4].running_mean, before["4.running_mean"])
        assert adaptation.unvisited == ()
        (note,) = adaptation.notes
        assert "'4' was left alone: its statistics set how far posteriors lie from the prior" in note
        adaptation.restore_()
    adaptation = renorm.recalibrate_(model, batches, prior=0, include=["1", "4"])
    assert adaptation.notes == ()
    assert not torch.equal(model[4].running_mean, before["4.running_mean"])


def test_a_model_with_nothing_else_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2), PosteriorNorm(2)).eval()
    with pytest.raises(
        UsageError, match=r"recalibrate_ found only layers that it leaves alone \('1'\): its statistics set"
    ):
        renorm.recalibrate_(model, [torch.randn(8, 3)])
