"""Which cells train and which are held out."""

from __future__ import annotations

import numpy as np

from scfm.training.run import hold_out


def test_shuffled_shards_are_split_by_two_ranges() -> None:
    assert hold_out(100, 0.1, seed=0, shuffled=True) == (range(90), range(90, 100))


def test_cells_kept_in_order_are_drawn() -> None:
    """The last rows of unshuffled shards are all of the last source."""
    train, valid = hold_out(1000, 0.1, seed=0, shuffled=False)
    assert (len(train), len(valid)) == (900, 100)
    assert sorted([*train, *valid]) == list(range(1000))
    assert valid.min() < 100
    np.testing.assert_array_equal(valid, hold_out(1000, 0.1, seed=0, shuffled=False)[1])
