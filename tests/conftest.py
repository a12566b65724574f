"""What holds for every test: one thread, no network, the same random numbers, and global state given back."""

from __future__ import annotations

import os

# Before torch is imported: test processes run side by side, and more threads than cores make all of them slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KERAS_BACKEND", "torch")

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.every_raise import EveryRaise

# Examples are slow when the machine is busy, not when the code is wrong. Under CI the same examples every time.
hypothesis.settings.register_profile("renorm", deadline=None, max_examples=50, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("renorm")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-raise",
        action="store_true",
        help="fail when a raise in src/renorm is reached by no test (for runs of the whole suite)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(EveryRaise(config))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _same_start_and_nothing_left_behind() -> Iterator[None]:
    """Start every test from one seed, and fail the test that leaves torch's global switches changed."""
    torch.manual_seed(0)
    before = _switches()
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # joined for a wrapper; others would meet a SyncBN that looks for ranks
    assert _switches() == before, "the test, or the code under it, changed a global switch of torch"


def _switches() -> dict[str, object]:
    return {
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }
