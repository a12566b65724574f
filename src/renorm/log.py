"""The one logger, `renorm`: for what somebody should hear and no value can carry.

Functions that return a value say what they noticed in it (`.notes`, `.why`, findings). The logger has the rest, such as what
`load_model` noticed of a module that it returns bare. renorm sets no level and adds no handler: where the program says
nothing of logging, Python prints warnings to stderr, and `logging.getLogger("renorm")` is where a program says otherwise.
"""

from __future__ import annotations

import logging

__all__ = ["LOGGER"]

LOGGER: logging.Logger = logging.getLogger("renorm")
