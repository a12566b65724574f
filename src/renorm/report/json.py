"""The face for machines: one envelope around every command's numbers.

    {
      "schema":  "renorm/1",        changes its number when a key changes its meaning or goes; new keys may come
      "version": "0.1.0",           of renorm
      "command": "doctor",
      "model":   "timm:resnet18",   as it was asked for
      "data":    "photos/",         as it was asked for; "" where a command needs none
      "result":  {...}              the command's numbers, as `result` in this folder's file about it makes them,
                                    and "notes", a list of sentences on how model and data were read
    }

Numbers that are not finite become null: JSON has no word for them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from renorm.report.base import Report

SCHEMA = "renorm/1"


def render(report: Report, *, version: str) -> str:
    """`report` as one JSON text, valid under RFC 8259, keys in the envelope's order."""
    envelope = {
        "schema": SCHEMA,
        "version": version,
        "command": report.command,
        "model": report.model,
        "data": report.data,
        "result": {**report.result, "notes": report.notes},
    }
    return json.dumps(plain(envelope), indent=2, ensure_ascii=False, allow_nan=False)


def plain(value: Any) -> Any:
    """`value` in JSON's own types: tensors and tuples as lists, numbers that are not finite as None.

    Raises TypeError for anything else, so that no object's repr ever becomes part of the schema.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no place in a report")
