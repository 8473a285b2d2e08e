"""Has the model seen the held-out cells before? Counted by the hashes of their expression profiles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scfm.data.hashing import overlap
from scfm.errors import ScfmError


@dataclass(frozen=True)
class Leakage:
    """How many held-out cells have a profile that the model was trained on."""

    cells: int
    seen: int

    def __str__(self) -> str:
        if not self.seen:
            return f"none of {self.cells:,} held-out cells was in the training data"
        return (
            f"{self.seen:,} of {self.cells:,} held-out cells ({self.seen / self.cells:.1%}) were in the training data"
        )


def count_leakage(test_hashes: NDArray[np.uint64], training_hashes: NDArray[np.uint64]) -> Leakage:
    """Count held-out cells whose profile hash (n_test,) is among the sorted training hashes (n,), as `cells.hash` has.

    Raises ScfmError where the training hashes are not sorted.
    """
    if (training_hashes[1:] < training_hashes[:-1]).any():
        raise ScfmError("training hashes are not sorted, as those of cells.hash are; the file is damaged")
    return Leakage(len(test_hashes), int(overlap(training_hashes, test_hashes).sum()))
