"""The command line. Nothing here imports torch before a command runs."""

from renorm.cli.main import main as main

__all__ = ["main"]
