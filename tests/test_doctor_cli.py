"""`renorm doctor` as a gate and a workshop: what fails, what is left out, what is mended and written, SARIF."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from renorm.checkpoints import read_weights
from renorm.rules.base import catalogue
from tests.test_cli import Ran, folder, refused, renorm

__all__ = ["folder", "renorm"]  # fixtures

SICK = """
import nets, torch

def lost():
    model = nets.net()
    model[4].reset_running_stats()
    return model

def momentum():
    model = nets.net()
    model[1].momentum = 0.99
    return model

def poisoned():
    model = nets.net()
    model[1].running_var[0] = float("nan")
    model[4].running_mean[1] = float("inf")
    return model
"""
Run = Callable[[str], Ran]


@pytest.fixture
def sick(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (folder / "sick.py").write_text(SICK)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(__import__("sys").modules, "nets", raising=False)
    return folder


@pytest.mark.parametrize(("model", "codes"), [("momentum", (0, 1, 0)), ("lost", (1, 1, 0))])
def test_the_exit_code_is_what_fail_on_says(sick: Path, renorm: Run, model: str, codes: tuple[int, ...]) -> None:
    for level, code in zip(("error", "warning", "never"), codes, strict=True):
        assert renorm(f"doctor sick.py:{model} --fail-on {level}").code == code


def test_an_ignored_rule_does_not_count_and_its_reason_is_told(sick: Path, renorm: Run) -> None:
    ran = renorm("doctor sick.py:lost --ignore.BN105 on-purpose")
    assert ran.code == 0, ran.err
    assert "BN105 is ignored: on-purpose" in ran.out
    assert "Nothing new" in ran.out
    result = renorm("doctor sick.py:lost --ignore.BN105=on-purpose --format json").json["result"]
    assert result["ignored"] == [{"rule": "BN105", "site": "4", "reason": "on-purpose"}]
    assert result["findings"] == []
    refused(renorm("doctor sick.py:lost --ignore.BN999 x"), "no rule 'BN999'")
    (sick / "run.yaml").write_text("ignore:\n  BN105: on purpose\n")
    assert renorm("doctor sick.py:lost --config run.yaml").code == 0


def test_a_layer_that_lies_far_is_called_far_though_its_finding_is_ignored(sick: Path, renorm: Run) -> None:
    ran = renorm("doctor nets.py:net far.npz --ignore.BN301 known --ignore.BN302 known --ignore.BN303 known")
    (line,) = (line for line in ran.out.splitlines() if line.split()[:1] == ["1"])
    assert line.split()[-1] == "far"
    assert "Data shift" not in ran.out


def test_a_baseline_holds_what_was_known(sick: Path, renorm: Run) -> None:
    (sick / "before.json").write_text(renorm("doctor sick.py:lost --format json").out)
    ran = renorm("doctor sick.py:lost --baseline before.json")
    assert ran.code == 0
    assert "Nothing new" in ran.out
    assert "sound statistics" not in ran.out
    assert "1 finding is in the baseline" in ran.out
    assert renorm("doctor sick.py:momentum --baseline before.json").code == 1
    refused(renorm("doctor sick.py:lost --baseline nets.py"), "--baseline takes a report")


@pytest.mark.parametrize("model", ["lost", "poisoned"])
def test_what_is_mended_is_written_and_loads_healthy(sick: Path, renorm: Run, model: str) -> None:
    ran = renorm(f"doctor sick.py:{model} near.npz --fix -o new.safetensors")
    assert ran.code == 0, ran.out
    assert "mended, and written to new.safetensors" in ran.out
    assert renorm("doctor nets.py:net near.npz --checkpoint new.safetensors").code == 0
    made = read_weights(sick / "new.safetensors").provenance
    assert made is not None
    assert made["command"] == f"renorm doctor sick.py:{model} near.npz --fix -o new.safetensors"
    refused(renorm(f"doctor sick.py:{model} near.npz --fix -o new.safetensors"), "stands there already")


def test_what_weights_cannot_hold_is_said_and_no_file_is_written(sick: Path, renorm: Run) -> None:
    ran = renorm("doctor sick.py:momentum --fix -o new.pt --format json")
    assert ran.code == 0, ran.err
    assert ran.json["result"]["output"] is None
    assert ran.json["result"]["mended"] == []
    notes = " ".join(ran.json["result"]["notes"])
    assert "cannot hold these" in notes
    assert "new.pt was not written" in notes
    assert not (sick / "new.pt").exists()


def test_fixing_needs_a_place_to_write(sick: Path, renorm: Run) -> None:
    refused(renorm("doctor sick.py:lost --fix"), "--fix needs -o OUT")
    refused(renorm("doctor sick.py:lost -o x.pt"), "--fix needs -o OUT")
    refused(renorm("doctor sick.py:lost --fix -o x.bin"), ".safetensors")


def test_sarif(sick: Path, renorm: Run) -> None:
    ran = renorm("doctor sick.py:poisoned --format sarif")
    assert ran.code == 1
    found: Any = json.loads(ran.out)
    assert found["version"] == "2.1.0"
    (run,) = found["runs"]
    ids = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert ids == list(catalogue())
    assert {result["ruleId"] for result in run["results"]} == {"BN108"}
    for result in run["results"]:
        assert ids[result["ruleIndex"]] == result["ruleId"]
        assert result["level"] == "error"
        assert result["message"]["text"]
        (location,) = result["locations"]
        assert location["logicalLocations"][0]["fullyQualifiedName"].startswith("sick.py:poisoned::")
    assert json.loads(renorm("doctor nets.py:net --format sarif").out)["runs"][0]["results"] == []


def test_the_ranks_of_a_run_are_compared_by_their_files(sick: Path, renorm: Run) -> None:
    import nets  # type: ignore[import-not-found]
    import torch

    state = nets.net().state_dict()
    for rank, offset in enumerate((0.0, 5.0)):
        moved = {n: t + offset if n == "1.running_mean" else t for n, t in state.items()}
        torch.save(moved, sick / f"rank{rank}.pt")
    ran = renorm("doctor --checkpoint rank0.pt --ranks rank*.pt --format json")
    assert [f["rule"] for f in ran.json["result"]["findings"] if f["rule"] == "BN204"] == ["BN204"]
    ran = renorm(
        "doctor nets.py:net --checkpoint rank0.pt --ranks rank1.pt --fix -o pooled.pt --format json --fail-on error"
    )
    assert {"rule": "BN204", "site": "1"} in ran.json["result"]["mended"]
    pooled = read_weights(sick / "pooled.pt").state["1.running_mean"]
    assert torch.allclose(pooled, state["1.running_mean"] + 2.5)
    refused(renorm("doctor nets.py:net --ranks none*.pt"), "names no file")


def test_a_folded_model_is_compared(sick: Path, renorm: Run) -> None:
    (sick / "tools.py").write_text(
        "import nets\nfrom torch import nn\n\n"
        "def dropped():\n    model = nets.net()\n    model[1] = nn.Identity()\n    return model\n"
    )
    assert renorm("fold nets.py:net near.npz -o folded.safetensors").code == 0
    words = "doctor nets.py:net near.npz --fail-on never --format json --folded"
    for folded, rules in (("folded.safetensors", []), ("tools.py:dropped", ["BN503"])):
        told = renorm(f"{words} {folded}").json["result"]["findings"]
        assert [f["rule"] for f in told if f["rule"] == "BN503"] == rules
    refused(renorm("doctor nets.py:net --folded folded.safetensors"), "needs DATA")


def test_passes_are_kept_to_and_what_is_left_out_is_said(sick: Path, renorm: Run) -> None:
    ran = renorm("doctor nets.py:net near.npz --passes 1 --fail-on never --format json")
    assert {"BN301", "BN310"} <= set(ran.json["result"]["skipped"])
    assert "more than 1 passes" in renorm("doctor nets.py:net near.npz --passes 1 --fail-on never").out


def test_the_group_of_each_sample_is_its_domain(sick: Path, renorm: Run) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    light = rng.integers(0, 256, (60, 8, 8, 3)).astype(np.uint8)
    np.savez("two.npz", images=np.concatenate([light, light // 3]), camera=np.repeat(["door", "gate"], 60))
    words = "doctor nets.py:net two.npz --format json --fail-on never"
    found = [f for f in renorm(f"{words} --group camera").json["result"]["findings"] if f["rule"] == "BN306"]
    assert found
    assert any(name in found[0]["message"] for name in ("door", "gate"))
