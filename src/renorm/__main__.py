"""`python -m renorm` is `renorm`."""

import sys

from renorm.cli import main

if __name__ == "__main__":
    sys.exit(main())
