"""log: what no value can carry goes to the logger `renorm`; whoever runs the program decides what becomes of it."""

from __future__ import annotations

import ast
import errno
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from renorm.cli import main
from renorm.log import LOGGER
from renorm.models import load_model
from renorm.runs import Run

PACKAGE = Path(__file__).parents[1] / "src" / "renorm"
NETS = """
import warnings
from torch import nn

def net():
    warnings.warn("the weights of 2019", stacklevel=2)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


def test_importing_renorm_leaves_logging_as_it_was() -> None:
    script = (
        "import logging, renorm; one = logging.getLogger('renorm'); root = logging.getLogger()\n"
        "assert (one.handlers, one.level, one.propagate, one.disabled) == ([], logging.NOTSET, True, False)\n"
        "assert root.level == logging.WARNING and not any('renorm' in repr(h) for h in root.handlers)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_one_logger_and_no_other_way_to_warn() -> None:
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                asked = ast.unparse(node.func)
                assert asked != "warnings.warn", f"{file.name}:{node.lineno}: say it in a value, or to log.LOGGER"
                others = bool(node.args) and isinstance(node.args[0], ast.Constant) and node.args[0].value != "renorm"
                assert asked != "logging.getLogger" or others or file.name == "log.py", f"{file.name}:{node.lineno}"


def test_random_weights_are_heard(caplog: pytest.LogCaptureFixture) -> None:
    load_model("torchvision:shufflenet_v2_x0_5")
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "torchvision:shufflenet_v2_x0_5: weights are random (seed 0): give a checkpoint, or ask for the pretrained ones"
    ]


def test_a_folder_that_cannot_be_locked_is_heard(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("renorm.runs.lock", refuse)
    Run(tmp_path / "run", {}).close()
    (record,) = caplog.records
    assert record.name == "renorm"
    assert record.getMessage().endswith("run cannot be locked (No locks available): start no second run in it")


def test_the_command_line_says_warnings_in_one_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a library warns of, too: here a model's own code, and Pillow, of an image of 100 megapixels."""
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS)
    Path("photos").mkdir()
    for k in range(2):
        Image.fromarray(np.full((16, 16, 3), 100 * k, np.uint8)).save(f"photos/{k}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 16 - 1)
    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code = main(["recalibrate", "nets.py:net", "photos", "-o", "new.safetensors", "--quiet"])
    said = capsys.readouterr().err.splitlines()
    assert code == 0
    assert all(line.startswith("renorm: warning: ") for line in said)
    assert any("the weights of 2019" in line and "UserWarning" in line for line in said)
    assert any("could be decompression bomb" in line for line in said)
    assert warnings.showwarning is before
    assert LOGGER.handlers == []
    assert logging.getLogger().handlers == [h for h in logging.getLogger().handlers if "renorm" not in repr(h)]
