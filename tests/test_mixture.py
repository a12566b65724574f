"""mixture and BN306: groups of samples with moments of their own are found, classes and single clouds are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from renorm.calls import Caller
from renorm.doctor import Diagnosis, diagnose
from renorm.errors import UsageError
from renorm.mixture import apart, mixtures
from renorm.moments import Moments
from renorm.rules.base import Finding
from renorm.shift import Shift
from renorm.sites import find_sites
from tests.contracts.photograph import differences, photograph
from tests.data import shared


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    with torch.no_grad():
        for _ in range(60):
            model(torch.randn(64, 3, 12, 12))
    return model.eval()


def images(count: int, *, seed: int = 0, offset: float = 0.0, scale: float = 1.0) -> Tensor:
    """Pictures whose brightness differs a little, as pictures' does."""
    generator = torch.Generator().manual_seed(seed)
    light = 0.3 * torch.randn(count, 1, 1, 1, generator=generator)
    return torch.randn(count, 3, 12, 12, generator=generator) * scale + light + offset


def mixed(diagnosis: Diagnosis) -> list[Finding]:
    return [finding for finding in diagnosis.findings if finding.rule == "BN306"]


def shuffled(*parts: Tensor, size: int = 32) -> list[Tensor]:
    whole = torch.cat(parts)
    return list(whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(1))].split(size))


@pytest.mark.parametrize("offset", [2.5, -2.5])
@pytest.mark.parametrize("share", [20, 64])
def test_two_domains_in_shuffled_batches_are_found(offset: float, share: int) -> None:
    model = network()
    before = photograph(model)
    (finding,) = mixed(diagnose(model, shuffled(images(128 - share), images(share, seed=2, offset=offset))))
    assert (finding.severity, finding.site, finding.fix_) == ("warning", "0.1", None)
    assert finding.value > finding.limit
    assert f"{round(100 * share / 128)}%" in finding.message
    assert differences(before, photograph(model)) == []


@pytest.mark.parametrize("seed", range(5))
def test_one_domain_is_left_in_peace(seed: int) -> None:
    assert mixed(diagnose(network(), [images(64, seed=seed), images(64, seed=seed + 50)])) == []
    assert mixed(diagnose(network(), [images(128, seed=seed, offset=2.0)])) == []  # shifted, all of it


def test_a_few_odd_samples_and_a_small_difference_are_no_domains() -> None:
    model = network()
    assert mixed(diagnose(model, shuffled(images(120), images(8, seed=2, offset=4.0)))) == []
    assert mixed(diagnose(model, shuffled(images(64), images(64, seed=2, offset=0.1)))) == []
    assert mixed(diagnose(model, [images(40), images(40, seed=2, offset=4.0)])) == []  # too few to tell


def test_known_domains_are_compared_by_name() -> None:
    model = network()
    batches = [torch.cat([images(32, seed=s), images(32, seed=s + 9, offset=1.5)]) for s in range(2)]
    names = ["ward 1"] * 32 + ["ward 2"] * 32
    (finding,) = mixed(diagnose(model, batches, domains=names * 2))
    assert "ward" in finding.message
    assert finding.value > finding.limit == 0.3
    same = [images(64, seed=s) for s in range(2)]
    assert mixed(diagnose(model, same, domains=names * 2)) == []
    assert mixed(diagnose(model, same, domains=["one"] * 128)) == []
    with pytest.raises(UsageError, match="domains names the domain of each sample"):
        diagnose(model, batches, domains=names)


def test_a_batch_that_cannot_be_run_takes_its_names_along() -> None:
    model = network()
    names = [k for k in ("a", "bad", "b") for _ in range(32)]
    batches = [images(32), torch.zeros(32, 5, 12, 12), images(32, seed=1, offset=2.0)]
    (finding,) = mixed(diagnose(model, batches, domains=names))
    assert "bad" not in finding.message
    assert mixed(diagnose(model, batches, domains=["a"] * 32 + ["b"] * 32 + ["a"] * 32)) == []


def test_what_a_site_says_is_what_a_slow_twin_says() -> None:
    model = network()
    x = torch.cat([images(40), images(24, seed=1, offset=1.5)]).double()
    model.double()
    names = ["x"] * 40 + ["y"] * 24
    found = mixtures(model, [x[:30], x[30:]], find_sites(model), Caller(), names)
    with torch.no_grad():
        values = model[0][0](x).numpy()
    eps = model[0][1].eps
    expected = {}
    for name, chosen in {"x": slice(0, 40), "y": slice(40, 64)}.items():
        part, moved = values[chosen], []
        for channel in range(values.shape[1]):
            whole_mean, whole_var = values[:, channel].mean(), values[:, channel].var()
            error = part[:, channel].mean((1, 2)).var(ddof=1) / len(part) / (whole_var + eps)
            gap = (part[:, channel].mean() - whole_mean) ** 2
            gap += (np.sqrt(part[:, channel].var() + eps) - np.sqrt(whole_var + eps)) ** 2
            moved.append(np.sqrt(max(0.0, gap / (whole_var + eps) - 2 * error)))
        expected[name] = float(np.mean(moved))
    farthest = max(expected, key=lambda name: expected[name])
    assert found["0.1"].domain == farthest
    assert found["0.1"].moved == pytest.approx(expected[farthest], rel=1e-9)
    assert Shift.between(Moments.of(x), Moments.of(x)).layer.wasserstein2 == 0


@given(st.integers(0, 2**31), st.integers(1, 12), st.floats(0.01, 100))
def test_one_cloud_lies_close_and_two_lie_apart_whatever_the_unit(seed: int, channels: int, unit: float) -> None:
    rng = np.random.default_rng(seed)
    cloud = rng.normal(size=(128, channels))
    distance, _ = apart(cloud * unit + 7 * unit)
    assert distance < 3.8
    cloud[:50] += 8
    distance, second = apart(cloud * unit)
    assert distance > 5
    assert second[:50].all() != second[50:].all()
    assert second[:50].all() or not second[:50].any()


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "expected"), [("gaussian_noise", 1), ("contrast", 1), ("as_it_is", 0)])
def test_a_real_network_on_mixed_images(shift: str, expected: int) -> None:
    from renorm.bench.beds import ResNet20

    pytest.importorskip("imagecorruptions")
    bed = ResNet20(shared("nets.py").parent, 64, 64)
    parts = [torch.cat(bed.pool(kind, seed=k, classes=10).unlabelled()) for k, kind in enumerate(("as_it_is", shift))]
    assert len(mixed(diagnose(bed.model(), shuffled(*parts), passes=3))) == expected
