"""renorm's names: imported when asked for, the same in every order, known to pickle and to star imports."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import renorm
from renorm import public

PACKAGE = Path(renorm.__file__).parent
TWICE = sorted(name for name in renorm.__all__ if (PACKAGE / f"{name}.py").exists())


def fresh(code: str) -> list[str]:
    """What `code` prints in a new Python, by lines."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_help_needs_no_torch() -> None:
    for words in ("--help", "--version", "doctr"):
        code = f"import sys; from renorm.cli import main; code = main({words.split()!r}); print(code, 'torch' in sys.modules)"
        assert fresh(code)[-1] == f"{2 if words == 'doctr' else 0} False"


def test_a_name_that_a_room_bears_too_is_never_the_room() -> None:
    assert {"observe", "fold", "export", "profile", "watch"} <= set(TWICE)
    before = "; ".join(f"import renorm.{name}" for name in TWICE)
    both = "; ".join(f"print('{name}', renorm.{name}.__module__, callable(renorm.{name}))" for name in TWICE)
    expected = [f"{name} renorm.{name} True" for name in TWICE]
    for first in (before, "import renorm", "from renorm.doctor import diagnose", "import renorm.public"):
        assert fresh(f"{first}\nimport renorm\n{both}") == expected, first


def test_every_name_is_the_one_of_its_room_and_survives_pickling() -> None:
    for name in renorm.__all__:
        value = getattr(renorm, name)
        assert value is getattr(public, name)
        assert pickle.loads(pickle.dumps(value)) is value
    assert set(renorm.__all__) == {name for name in vars(public) if not name.startswith("_")}
    assert set(renorm.__all__) <= set(dir(renorm))


def test_a_star_import_brings_every_name_and_rooms_are_found_when_asked_for() -> None:
    lines = fresh(
        "from renorm import *\nimport renorm\nprint(observe is renorm.observe, renorm.layers.Frozen.__name__)"
    )
    assert lines == ["True Frozen"]


def test_a_name_that_renorm_has_not_is_refused() -> None:
    with pytest.raises(AttributeError, match="module 'renorm' has no attribute 'recalibrat'"):
        getattr(renorm, "recalibrat")  # noqa: B009
    with pytest.raises(AttributeError, match="module 'renorm' has no attribute '__wrapped__'"):
        getattr(renorm, "__wrapped__")  # noqa: B009


def test_a_result_whose_room_alone_was_imported_has_its_faces() -> None:
    code = (
        "from torch import nn\nfrom renorm.doctor import diagnose\n"
        "print('no batch norm' in diagnose(nn.Linear(2, 2))._repr_html_())"
    )
    assert fresh(code) == ["True"]
