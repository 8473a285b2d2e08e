"""Held-out cells that were trained on are counted."""

from __future__ import annotations

import numpy as np
import pytest

from scfm.errors import ScfmError
from scfm.evaluation.leakage import count_leakage


def hashes(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def test_seen_cells_are_counted_each_time_they_occur() -> None:
    found = count_leakage(hashes(5, 2**64 - 1, 7, 5), hashes(1, 5, 9, 2**64 - 1))
    assert (found.cells, found.seen) == (4, 3)
    assert str(found) == "3 of 4 held-out cells (75.0%) were in the training data"


def test_nothing_seen_reads_as_such() -> None:
    assert count_leakage(hashes(5, 7), hashes()).seen == 0
    assert str(count_leakage(hashes(5, 7), hashes(6))) == "none of 2 held-out cells was in the training data"


def test_unsorted_training_hashes_are_refused() -> None:
    with pytest.raises(ScfmError, match="not sorted"):
        count_leakage(hashes(5), hashes(9, 1))
