"""What holds for every contract over the zoo."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import zoo


@pytest.fixture(autouse=True)
def _leave_the_group_that_a_case_may_have_joined() -> Iterator[None]:
    yield
    zoo.leave_group()
