"""Some rows of a store, named in little memory."""

from __future__ import annotations

import numpy as np
import pytest

from scfm.data.rows import AllBut, rows_at, without


@pytest.mark.parametrize("left_out", [[], [0], [9], [3, 4, 8], [0, 1, 9], list(range(9)), list(range(10))])
def test_all_rows_but_some(left_out: list[int]) -> None:
    rows = without(10, np.array(left_out, np.int64))
    expected = [row for row in range(10) if row not in left_out]
    assert list(rows) == np.asarray(rows).tolist() == expected
    assert len(rows) == len(expected)
    places = np.arange(len(rows))[::-1]
    assert rows_at(rows, places).tolist() == expected[::-1]


def test_rows_without_the_last_are_a_range() -> None:
    assert without(10, np.array([], np.int64)) == range(10)
    assert without(10, np.array([7, 8, 9])) == range(7)
    assert isinstance(without(10, np.array([7, 8])), AllBut)


def test_rows_of_a_range_and_of_an_array() -> None:
    assert rows_at(range(5, 20, 3), np.array([0, 2])).tolist() == [5, 11]
    assert rows_at(np.array([8, 1, 5]), np.array([2, 0])).tolist() == [5, 8]
