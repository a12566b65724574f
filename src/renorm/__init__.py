"""renorm makes pretrained networks work on new data by getting their normalisation layers right.

Names are imported when they are asked for, so that `renorm --help` need not wait for torch. A name that a room bears too
(`renorm.observe`) is what the room offers under it, never the room, whatever was imported before.
"""

# ruff: noqa: F403, F405 (what __all__ lists is in renorm.public, where ruff does not look)

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from renorm.faces import registered_by

if TYPE_CHECKING:
    from renorm.public import *

__version__ = "0.1.0"
__all__ = [
    "Adaptation",
    "Adapter",
    "Advice",
    "Affine",
    "BatchError",
    "Columns",
    "Conversion",
    "Diagnosis",
    "Exported",
    "FineTuned",
    "Folded",
    "Freeze",
    "Gap",
    "Guard",
    "Lean",
    "Moments",
    "NoBatchNorm",
    "Observation",
    "Observed",
    "Plan",
    "Policy",
    "Profile",
    "RenormError",
    "Repaired",
    "Score",
    "Served",
    "Shift",
    "Site",
    "Split",
    "Stream",
    "Watch",
    "adapt_",
    "advise",
    "apply_policy_",
    "check_groups",
    "cite",
    "convert_",
    "diagnose",
    "diagnose_file",
    "evaluate",
    "export",
    "find_sites",
    "finetune_",
    "fold",
    "freeze_",
    "frozen",
    "lean_",
    "load_adapter_",
    "load_folded_",
    "observe",
    "parameter_groups",
    "policies",
    "policy_table",
    "profile",
    "recalibrate_",
    "recommend",
    "repair_",
    "save_adapter",
    "serve_adapters",
    "split",
    "unfreeze_",
    "verify",
    "watch",
]


class _Package(ModuleType):
    """A package that imports what it is asked for, and knows which of its names are more than rooms."""

    def __getattr__(self, name: str) -> Any:
        if name in __all__:
            value = getattr(import_module("renorm.public"), name)
        elif name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        else:
            return import_module(f"{__name__}.{name}")
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Python binds a room here by its name once it is imported
        super().__setattr__(name, getattr(value, name) if isinstance(value, ModuleType) and name in __all__ else value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
registered_by("renorm.report.notebook")
