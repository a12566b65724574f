"""The suites behind `renorm bench`: one file per suite; data and results stay outside the package."""
