"""The command line. Nothing here imports torch before a command runs; `import renorm`, which stands before it, does."""

from renorm.cli.main import main as main

__all__ = ["main"]
