"""Files, folders and sets that ship with a package → batches. One file per source; `load.py` picks."""

from renorm.datasets.base import Dataset as Dataset
from renorm.datasets.load import load_data as load_data
