"""Complaints from public threads, rebuilt: the doctor names the cause first, and its fix mends it."""

from __future__ import annotations

import pytest

from renorm.bench.threads import THREADS


@pytest.mark.slow
@pytest.mark.parametrize("name", THREADS)
def test_the_cause_stands_first_and_the_mend_helps(name: str) -> None:
    if name == "SyncBN lost activations":
        pytest.importorskip("timm")
    thread = THREADS[name]
    told = thread.rebuild(1)
    assert told.first is not None
    assert told.first.rule in thread.rules, str(told.first)
    assert (told.first.fix_ is None) == thread.by_hand
    assert told.after < 0.8 * told.before
