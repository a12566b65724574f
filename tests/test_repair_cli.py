"""`renorm repair`: what it writes for a rounded and for a merged model, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from renorm.models import load_model
from tests.test_cli import NETS, Ran, refused, renorm

__all__ = ["renorm"]  # a fixture


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's file, its weights, the same rounded to a coarse grid, and labelled images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    model = load_model("nets.py:net")
    images = np.random.default_rng(0).integers(0, 256, (48, 8, 8, 3)).astype(np.uint8)
    with torch.no_grad():
        logits = model(torch.from_numpy(images).movedim(3, 1) / 255)
        model[8].bias[0] += (logits[:, 1] - logits[:, 0]).median()  # both classes equally often
        labels = model(torch.from_numpy(images).movedim(3, 1) / 255).argmax(1)  # which the source gets right
    np.savez(tmp_path / "near.npz", images=images, labels=labels.numpy())
    np.savez(tmp_path / "plain.npz", images=images)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "whole.safetensors")
    for name, value in state.items():
        if value.dim() == 4:
            step = value.abs().amax() / 2
            state[name] = (value / step).round() * step + 0.3 * step
    save_file(state, tmp_path / "rounded.safetensors")
    return tmp_path


COMMAND = "repair nets.py:net plain.npz --checkpoint rounded.safetensors --sources whole.safetensors -o out.safetensors"


def test_a_rounded_model_gets_its_sources_moments_and_is_written(folder: Path, renorm: Callable[[str], Ran]) -> None:
    ran = renorm(f"{COMMAND} --check near.npz --format json")
    assert ran.code == 0, ran.err
    result = ran.json["result"]
    assert result["recalibrated"] == ["1", "4"]
    assert result["rescaled"] == ["8"]
    assert result["scores"]["after"] > result["scores"]["before"] + 0.1
    rounded, written = load_file("rounded.safetensors"), load_file("out.safetensors")
    assert torch.equal(written["0.weight"], rounded["0.weight"])
    assert not torch.equal(written["1.running_var"], rounded["1.running_var"])


def test_two_sources_are_named_with_a_comma(folder: Path, renorm: Callable[[str], Ran]) -> None:
    ran = renorm(COMMAND.replace("--sources ", "--sources whole.safetensors,"))
    assert ran.code == 0, ran.err
    assert "3 layers have their sources' moments again" in ran.out


def test_what_does_worse_is_not_written(folder: Path, renorm: Callable[[str], Ran]) -> None:
    words = COMMAND.replace("rounded", "whole").replace("--sources whole", "--sources rounded")
    ran = renorm(f"{words} --check near.npz")
    assert ran.code == 1, ran.err
    assert "Nothing was written: on the labelled data it would do worse." in " ".join(ran.out.split())
    assert not Path("out.safetensors").exists()


def test_bad_input_writes_nothing(folder: Path, renorm: Callable[[str], Ran]) -> None:
    refused(renorm(f"{COMMAND} --check plain.npz"), "--check compares errors, and plain.npz has no labels")
    refused(renorm(COMMAND.replace("whole", "absent")), "absent.safetensors")
    refused(renorm(COMMAND.replace(" --sources whole.safetensors", "")), "renorm repair needs --sources")
    assert not Path("out.safetensors").exists()
