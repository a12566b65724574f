"""Label shift made from a labelled set: only some of its classes remain, by a seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from renorm.errors import UsageError

__all__ = ["some_classes"]


def some_classes(labels: NDArray[np.integer], count: int, *, seed: int) -> NDArray[np.intp]:
    """The positions, in order, of the images that belong to `count` classes drawn by `seed`.

    The draw hangs on the seed and on which classes there are, not on how many images each has: two parts of one data
    set keep the same classes.

    Raises:
        UsageError: fewer than one class or more than there are.
    """
    present = np.unique(labels)
    if not 1 <= count <= len(present):
        raise UsageError(f"{count} classes of {len(present)} were asked for; ask for 1 to {len(present)}")
    kept = np.random.default_rng([seed, count]).permutation(present)[:count]
    return np.flatnonzero(np.isin(labels, kept))
