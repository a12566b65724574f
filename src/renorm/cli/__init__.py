"""The command line. `renorm --help` must be quick, so nothing here imports torch before a command runs."""

from renorm.cli.main import main as main

__all__ = ["main"]
