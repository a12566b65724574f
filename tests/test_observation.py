"""Moments without data: saved to the bit, merged as if one pass had read all, refused for any other model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from renorm.bench.beds import ResNet20, error
from renorm.cli import main
from renorm.errors import CheckpointError, FileExists, ModelError, UsageError
from renorm.observation import Observation
from renorm.observe import observe
from renorm.recalibrate import recalibrate_
from renorm.sites import find_sites
from tests.contracts.photograph import differences, photograph
from tests.data import shared
from tests.reference import moments as twin
from tests.zoo import lived


def net(seed: int = 0, width: int = 5) -> nn.Sequential:
    """Its first batch norm sees the input itself."""
    torch.manual_seed(seed)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2)]
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), *head)
    lived(model)
    return model


def images(count: int, *, seed: int = 0, mean: float = 0.0, sd: float = 1.0) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * sd + mean


def close(one: Observation, other: Observation, *, within: float) -> None:
    assert list(one) == list(other)
    for name in one:
        for ours, theirs in zip(one[name], other[name], strict=True):
            assert ours.count == theirs.count
            var = theirs.var + 1e-6  # a channel that is constant has rounding for a variance
            assert float(((ours.mean - theirs.mean) / var.sqrt()).abs().max()) <= within
            assert float(((ours.var - theirs.var) / var).abs().max()) <= within


# ── the law: merging is reading everything ──


@given(
    sizes=st.lists(st.integers(2, 12), min_size=2, max_size=4),
    means=st.lists(st.floats(-50, 50), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
def test_merged_under_running_equals_one_pass_over_all_the_data(
    sizes: list[int], means: list[float], seed: int
) -> None:
    model = net()
    data = [images(n, seed=seed + k, mean=means[k], sd=1 + k) for k, n in enumerate(sizes)]
    seen = [observe(model, [x], under="running") for x in data]
    both = seen[0]
    for part in seen[1:]:
        both = both.merge(part)
    everything = torch.cat(data)
    whole = observe(model, [everything], under="running")
    close(both, whole, within=1e-5)
    assert (both.samples, both.batches) == (sum(sizes), len(sizes))
    reference = twin.pooled([everything.double().numpy()])
    np.testing.assert_allclose(both["0"].values.mean, reference.mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(both["0"].values.var, reference.var, rtol=1e-5)
    assert both.caveat == ""


@given(order=st.permutations(range(4)), seed=st.integers(0, 1000))
def test_merging_in_any_order_and_grouping_gives_the_same(order: list[int], seed: int) -> None:
    model = net()
    parts = [observe(model, [images(3 + k, seed=seed + k, mean=k)], under="running") for k in range(4)]
    a, b, c, d = (parts[k] for k in order)
    close(a.merge(b).merge(c.merge(d)), parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3]), within=1e-9)


def test_merged_under_batch_equals_one_pass_over_the_batches_as_they_were_and_says_what_it_does_not() -> None:
    model = net()
    here, there = list(images(12).split(4)), list(images(10, seed=1, mean=8, sd=3).split(5))
    both = observe(model, here, under="batch").merge(observe(model, there, under="batch"))
    close(both, observe(model, here + there, under="batch"), within=1e-9)
    mixed = observe(model, [torch.cat([*here, *there])], under="batch")
    close(Observation({"0": both["0"]}, **about(both)), Observation({"0": mixed["0"]}, **about(mixed)), within=1e-5)
    gap = (both["3"].values.var / mixed["3"].values.var - 1).abs().max()
    assert gap > 0.05, (
        "batches that mix the sites give other moments behind the first batch norm, and the caveat says so"
    )
    assert "they equal only at the first batch norm" in both.caveat


def about(seen: Observation) -> dict[str, Any]:
    return {"under": seen.under, "samples": seen.samples, "batches": seen.batches}


def test_a_site_that_one_of_them_did_not_reach_is_the_others() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.high(x) if float(x.mean()) > 0 else self.low(x)

    model = Fork().eval()
    low, high = torch.randn(8, 2) - 9, torch.randn(8, 2) + 9
    one, two = (observe(model, [x], under="batch") for x in (low, high))
    assert (one.unvisited, two.unvisited) == (("high",), ("low",))
    both = one.merge(two)
    assert both.unvisited == ()
    assert torch.equal(both["high"].values.mean, two["high"].values.mean)
    assert one.merge(observe(model, [low + 1], under="batch")).unvisited == ("high",)


# ── files ──


def test_saved_and_loaded_it_is_equal_to_the_bit(tmp_path: Path) -> None:
    model = net()
    seen = observe(model, [images(7)], under="running")
    before = photograph(model)
    seen.save(tmp_path / "a.moments", model, command="renorm observe …", data="sha256:ab")
    assert differences(before, photograph(model)) == []
    back = Observation.load(tmp_path / "a.moments")
    assert list(back) == list(seen)
    for name in seen:
        for ours, theirs in zip(seen[name], back[name], strict=True):
            assert torch.equal(ours.mean, theirs.mean)
            assert torch.equal(ours.var, theirs.var)
            assert ours.count == theirs.count
    assert (back.under, back.samples, back.batches, back.unvisited) == ("running", 7, 1, ())
    (part,) = back.parts
    assert part["origin"]["data"] == "sha256:ab"
    assert part["origin"]["command"] == "renorm observe …"
    assert back.model == part["origin"]["model"]
    with pytest.raises(FileExists, match="stands there already"):
        back.save(tmp_path / "a.moments")
    back.save(tmp_path / "a.moments", force=True)
    assert Observation.load(tmp_path / "a.moments").parts == back.parts


def test_the_file_holds_no_sample(tmp_path: Path) -> None:
    model = net()
    observe(model, [images(50)], under="batch").save(tmp_path / "a.moments", model)
    with safe_open(tmp_path / "a.moments", framework="pt") as file:
        shapes = {name: tuple(file.get_tensor(name).shape) for name in file.keys()}
    assert shapes == {"counts": (2, 2)} | dict.fromkeys(
        ("values.mean", "values.var", "images.mean", "images.var"), (8,)
    )


def test_a_merged_file_remembers_its_parts_and_refuses_one_of_them_again(tmp_path: Path) -> None:
    model = net()
    for k, name in enumerate("ab"):
        observe(model, [images(5, seed=k)], under="batch").save(tmp_path / name, model)
    a, b = (Observation.load(tmp_path / name) for name in "ab")
    both = a.merge(b)
    both.save(tmp_path / "both")
    again = Observation.load(tmp_path / "both")
    assert [part["samples"] for part in again.parts] == [5, 5]
    for one, two in ((a, a), (again, b), (a, again)):
        with pytest.raises(UsageError, match=r"the same moments were to be merged twice .* Give each site's file once"):
            one.merge(two)


def test_moments_are_not_saved_without_their_model(tmp_path: Path) -> None:
    seen = observe(net(), [images(5)], under="batch")
    with pytest.raises(UsageError, match=r"to be saved without their model.*seen\.save\(path, model\)"):
        seen.save(tmp_path / "a.moments")
    assert list(tmp_path.iterdir()) == []


def tampered(change: Callable[[dict[str, Tensor], dict[str, Any]], None], folder: Path) -> Path:
    model, path = net(), folder / "bad.moments"
    observe(model, [images(5)], under="batch").save(path, model)
    with safe_open(path, framework="pt") as file:
        meta = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    told = {"sites": json.loads(meta["sites"]), "about": json.loads(meta["about"])}
    change(tensors, told)
    save_file(tensors, path, metadata={"format": meta["format"]} | {k: json.dumps(v) for k, v in told.items()})
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, m: t["values.var"].neg_(), "a variance below 0"),
        (lambda t, m: t["images.mean"].fill_(float("nan")), "not finite"),
        (lambda t, m: t.update(counts=t["counts"].float()), "not float64"),
        (lambda t, m: t["counts"].zero_(), "a count below 1"),
        (lambda t, m: t.pop("images.var"), "images.var"),
        (lambda t, m: m["sites"].update({"0": 4}), "split"),
        (lambda t, m: m["sites"].pop("0"), ""),
        (lambda t, m: m["about"].update(under="none"), "under is 'none'"),
        (lambda t, m: m["about"].pop("parts"), "parts"),
        (lambda t, m: m["about"].update(parts=[{}]), "digest"),
        (lambda t, m: m.update(about=[]), ""),
        (lambda t, m: m["about"].update(samples="many"), "many"),
    ],
)
def test_files_that_contradict_themselves_are_refused(change: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"contradict themselves \(.*{said}.*Make it again with renorm observe"):
        Observation.load(tampered(change, tmp_path))


def test_files_that_are_no_moments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"moments were to be read from .*gone: .*renorm observe"):
        Observation.load(tmp_path / "gone")
    (tmp_path / "torn").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match=r"moments were to be read from .*torn"):
        Observation.load(tmp_path / "torn")
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"its format is None and not 'renorm-moments-1'"):
        Observation.load(tmp_path / "weights.safetensors")


# ── refused with names ──


def test_moments_of_other_models_are_refused_by_name(tmp_path: Path) -> None:
    def measured(model: nn.Module, seed: int = 0, under: Any = "batch") -> Observation:
        path = tmp_path / "one.moments"
        observe(model, [images(5, seed=seed)], under=under).save(path, model, force=True)
        return Observation.load(path)

    mine = measured(net())
    with pytest.raises(ModelError, match=r"merged: '3' has 5 channels in one and 6 in the other"):
        mine.merge(measured(net(width=6), 1))
    with pytest.raises(ModelError, match=r"only one has a batch norm '3' \(1 sites differ\)"):
        mine.merge(measured(nn.Sequential(nn.BatchNorm2d(3)).eval(), 1))
    with pytest.raises(
        ModelError, match=r"the weights or the statistics they held differ \(fingerprints \w+ and \w+\)"
    ):
        mine.merge(measured(net(seed=1), 1))
    with pytest.raises(UsageError, match=r"under='batch' and under='running' were to be merged.*same --under"):
        mine.merge(measured(net(), 1, "running"))
    with pytest.raises(ModelError, match=r"batch norm '3' with 5 channels; this Sequential has 6 channels there"):
        recalibrate_(net(width=6), mine)
    with pytest.raises(ModelError, match=r"'3' with 5 channels; this Sequential has no norm layer of that name"):
        mine.check(nn.Sequential(nn.BatchNorm2d(3)))
    other = net(seed=1)
    before = photograph(other)
    with pytest.raises(ModelError, match=r"same layers and other weights .*\(fingerprint \w{12}, here \w{12}\)"):
        recalibrate_(other, mine)
    assert differences(before, photograph(other)) == []
    with pytest.raises(ModelError, match="same layers and other weights"):
        mine.save(tmp_path / "x", other)


# ── recalibrating from moments ──


@pytest.mark.parametrize("prior", ["auto", 0, 16])
def test_recalibrating_from_moments_is_recalibrating_from_the_data(prior: Any, tmp_path: Path) -> None:
    here, there = list(images(12, mean=3).split(4)), list(images(10, seed=1, mean=3, sd=2).split(5))
    model = net()
    observe(model, here, under="batch").save(tmp_path / "a", model)
    observe(model, there, under="batch").save(tmp_path / "b", model)
    both = Observation.load(tmp_path / "a").merge(Observation.load(tmp_path / "b"))
    from_moments, from_data = net(), net()
    before = photograph(from_moments)
    adaptation = recalibrate_(from_moments, both, prior)
    recalibrate_(from_data, here + there, prior)
    for name, tensor in from_data.state_dict().items():
        assert torch.allclose(tensor, from_moments.state_dict()[name], rtol=1e-6), name
    assert adaptation.samples == 22
    assert both.caveat in adaptation.notes
    adaptation.restore_()
    assert differences(before, photograph(from_moments)) == []


def test_check_still_judges() -> None:
    model = net()
    seen = observe(model, [images(40, mean=5)], under="batch")
    with torch.no_grad():
        gap = model(images(40)).diff(dim=1)
        model[6].bias[1] -= gap.median()  # both classes are then predicted
        labels = model(images(40)).argmax(1)
    adaptation = recalibrate_(model, seen, check=[(images(40), labels)], prior=0)
    assert not adaptation.accepted
    assert "accuracy went from 100.0%" in adaptation.why


def test_moments_behind_old_statistics_are_written_one_site_at_a_time() -> None:
    model = net()
    seen = observe(model, [images(20, mean=2)], under="running")
    before = photograph(model)
    with pytest.raises(
        UsageError, match=r"under='running' were to be written at 2 sites at once.*Observe with under='ba"
    ):
        recalibrate_(model, seen)
    assert differences(before, photograph(model)) == []
    recalibrate_(model, seen, prior=0, include="0")
    assert torch.allclose(model[0].running_mean.double(), seen["0"].values.mean)


def test_what_needs_the_batches_themselves_is_refused() -> None:
    model = net()
    seen = observe(model, [images(20)], under="batch")
    with pytest.raises(UsageError, match=r"the method 'equal_mix' needs the batches themselves and was given moments"):
        recalibrate_(model, seen, method="equal_mix")
    with pytest.raises(UsageError, match=r"tolerance=0\.1 says when to stop reading batches, and moments were given"):
        recalibrate_(model, seen, tolerance=0.1)


@pytest.mark.slow
def test_on_real_images_two_sites_mend_as_one_and_moments_behind_old_statistics_would_ruin() -> None:
    """ResNet-20 at low contrast, 300 images a site; the larger run gave 76.6 % error before, 34.8 merged, 34.4 mixed."""
    bed = ResNet20(shared("nets.py").parent, 400, 300)
    model, held_out = bed.model(), bed.held_out("contrast", seed=0)
    sites = [bed.pool("contrast", seed=k).first(200).unlabelled() for k in range(2)]

    def recalibrated(batches: Any) -> float:
        adaptation = recalibrate_(model, batches, prior=0)
        found = error(model, held_out)
        adaptation.restore_()
        return found

    merged = recalibrated(observe(model, sites[0], under="batch").merge(observe(model, sites[1], under="batch")))
    assert merged < error(model, held_out) - 30
    assert abs(merged - recalibrated([*sites[0], *sites[1]])) < 1e-6
    running = observe(model, sites[0], under="running").merge(observe(model, sites[1], under="running"))
    for site in find_sites(model):
        site.write_(running[site.name].values)
    assert error(model, held_out) > 80, "what recalibrate_ refuses to write"


# ── the command line ──

NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

def plain():
    return nn.Linear(3, 2)
"""


@pytest.fixture
def hospitals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    rng = np.random.default_rng(0)
    for name, scale in (("a", 1), ("b", 3)):
        np.savez(tmp_path / f"{name}.npz", images=(rng.integers(0, 256, (40, 8, 8, 3)) // scale).astype(np.uint8))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_sites_pool_their_moments_on_the_command_line(hospitals: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        assert main(f"observe nets.py:net {name}.npz -o {name}.moments".split()) == 0
        assert "and no sample of the data" in " ".join(capsys.readouterr().out.split())
    assert main("merge a.moments b.moments -o both.moments --format json".split()) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert (result["samples"], result["parts"], result["sites"]) == (80, 2, {"1": 4, "4": 4})
    assert "2 parts were measured under='batch'" in result["approximate"]
    assert main("recalibrate nets.py:net --moments both.moments -o new.safetensors".split()) == 0
    assert "they equal only at the first batch norm" in " ".join(capsys.readouterr().out.split())
    from renorm.checkpoints import read_weights

    made = read_weights(hospitals / "new.safetensors").provenance
    assert made is not None
    assert [part["samples"] for part in made["moments"]] == [40, 40]
    assert made["command"] == "renorm recalibrate nets.py:net -o new.safetensors --moments both.moments"
    assert main("observe nets.py:net a.npz -o few.moments --limit 3 --under running".split()) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "With 3 samples only, a mean still says much about each" in said
    assert "To recalibrate, observe with --under batch" in said


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("merge a.moments -o x.moments", ["pools two files or more; a.moments alone"]),
        ("merge -o x.moments", ["renorm merge needs FILES"]),
        ("merge a.moments a.moments -o x.moments", ["a.moments: the same moments", "twice"]),
        ("merge a.moments nowhere -o x.moments", ["nowhere", "renorm observe"]),
        ("merge a.moments b.moments", ["needs -o FILE"]),
        ("merge a.moments b.moments -o a.moments", ["stands there already"]),
        ("recalibrate nets.py:net -o x.pt", ["needs DATA or --moments FILE; neither was given"]),
        ("recalibrate nets.py:net a.npz --moments a.moments -o x.pt", ["both were given"]),
        ("recalibrate nets.py:net --moments a.npz -o x.pt", ["moments were to be read from a.npz"]),
        ("observe nets.py:plain a.npz -o x.moments", ["observe needs batch norm layers"]),
        ("observe nets.py:net a.npz", ["needs -o FILE"]),
    ],
)
def test_wrong_use_is_refused_in_one_screen(
    words: str, parts: list[str], hospitals: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        main(f"observe nets.py:net {name}.npz -o {name}.moments".split())
    capsys.readouterr()
    assert main(words.split()) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") <= 12
    for part in parts:
        assert part in said.err
    assert not list(hospitals.glob("x.*"))
