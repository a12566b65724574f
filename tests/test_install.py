"""The wheel is the product: built without the network, installed alone, it tells the whole story by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def run(*words: str | Path, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run this Python with `words`, with no input; `path` is all that PYTHONPATH holds."""
    environment = {**os.environ, "PYTHONPATH": str(path or ""), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(
        command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=500
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir")
    built = run("-m", "pip", "wheel", ROOT, *options, folder, cwd=folder)
    assert built.returncode == 0, built.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    done = run("-m", "pip", "install", wheel, "--no-deps", "--no-index", "--quiet", "--target", folder, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_holds_the_package_and_its_licence_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"renorm"}
    assert "renorm/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    files = (path for path in (ROOT / "src/renorm").rglob("*") if path.is_file() and path.suffix != ".pyc")
    source = {path.relative_to(ROOT / "src").as_posix() for path in files}  # templates and translations too
    assert source <= set(names)


def test_the_core_needs_few_packages_and_pins_none(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    needs = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    core = {need for need in needs if "extra ==" not in need}
    assert len(core) <= 10
    assert not [need for need in core if "==" in need or "<" in need]


def test_the_installed_package_tells_its_story_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    where = run("-c", "import renorm; print(renorm.__file__)", cwd=tmp_path, path=installed)
    assert Path(where.stdout.strip()).is_relative_to(installed), where.stderr

    done = run("-m", "renorm", "demo", "--format", "json", cwd=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert set(told) == {"schema", "version", "command", "model", "data", "result"}
    assert told["command"] == "demo"
    assert list(tmp_path.iterdir()) == [], "the demo leaves nothing behind"

    targets = told["result"]["targets"]
    contrast, inverted = targets["low contrast"], targets["inverted"]
    assert contrast["accepted"]
    assert contrast["after"]["value"] > contrast["before"]["value"] + 0.3
    assert not inverted["accepted"]
    assert inverted["why"]
    assert inverted["after"]["value"] == inverted["before"]["value"]
    assert all(target["undo_exact"] for target in targets.values())


def test_the_console_script_answers(installed: Path, tmp_path: Path) -> None:
    code = "import sys; from renorm.cli import main; sys.exit(main(['--help']))"
    done = run("-c", code, cwd=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr
    assert "recalibrate" in done.stdout
    assert (installed / "bin" / "renorm").exists()
