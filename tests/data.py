"""Where the tests find real data: files too large, or not ours, to stand in the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("RENORM_DATA") or Path(__file__).parents[2] / "shared" / "data")


def shared(name: str) -> Path:
    """The real data file `name`, for example "vww1000.npz" or "weights/resnet8_cifar10.pt".

    Looked for in the folder RENORM_DATA, else in `../shared/data` beside the repository; the test that asks is skipped
    where it is absent.
    """
    path = DATA / name
    if not path.exists():
        pytest.skip(f"needs real data: {name} is not in {DATA} (set RENORM_DATA)")
    return path
