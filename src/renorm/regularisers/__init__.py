"""What keeps fine-tuning near its source, one per file: `from renorm.regularisers import L2SP` finds the class in its file."""

from typing import Any


def __getattr__(name: str) -> Any:
    from renorm.regularisers.base import catalogue

    for regulariser in catalogue().values():
        if regulariser.__name__ == name:
            return regulariser
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
