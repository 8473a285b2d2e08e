"""The external shuffle: no cell is lost or doubled, every bucket is a fair sample, and the seed decides alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from scfm.data import shuffle
from scfm.data.shuffle import Buckets
from scfm.data.store import CellBlock


def cells(first: int, n: int) -> CellBlock:
    """Cell i holds the value i + 1 in i % 4 genes, so that rows and values can be told apart."""
    lengths = np.arange(first, first + n) % 4
    values = np.repeat(np.arange(first, first + n) + 1, lengths).astype(np.uint32)
    genes = np.concatenate([np.arange(length) for length in lengths]).astype(np.uint32)
    return CellBlock(np.concatenate([[0], np.cumsum(lengths)]), genes, values)


def shuffled(
    directory: Path, n_cells: int, block: int, cells_per_bucket: int, n_buckets: int, seed: int | None
) -> list[NDArray[np.int64]]:
    """Return the cells of each bucket, after checking that every cell still has its own values."""
    directory.mkdir()
    buckets = Buckets(directory, cells_per_bucket, n_buckets, seed)
    for first in range(0, n_cells, block):
        n = min(block, n_cells - first)
        buckets.add(cells(first, n), {"cell": np.arange(first, first + n)})
    n_filled = buckets.close()
    found = []
    for part, codes in buckets.shards():
        cell = codes["cell"]
        np.testing.assert_array_equal(np.diff(part.offsets), cell % 4)
        np.testing.assert_array_equal(part.values, np.repeat(cell + 1, cell % 4))
        found.append(cell)
    assert len(found) == n_filled
    assert not list(directory.iterdir())
    return found


@pytest.mark.parametrize("held", [1, 100, 10**6])
@pytest.mark.parametrize("block", [1, 7, 64])
def test_every_cell_comes_back_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int, block: int) -> None:
    monkeypatch.setattr(shuffle, "VALUES_HELD", held)
    found = shuffled(tmp_path / "b", 200, block, 50, 4, seed=0)
    assert sorted(np.concatenate(found).tolist()) == list(range(200))


def test_without_seed_the_order_is_kept(tmp_path: Path) -> None:
    found = shuffled(tmp_path / "b", 130, 17, 50, 1, seed=None)
    assert [len(bucket) for bucket in found] == [50, 50, 30]
    assert np.concatenate(found).tolist() == list(range(130))


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    once, again, other = (
        np.concatenate(shuffled(tmp_path / name, 300, 40, 100, 3, seed)).tolist()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert once == again != other
    assert once != list(range(300))


def test_buckets_are_of_one_size_and_a_fair_sample_of_sorted_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shuffle, "VALUES_HELD", 300)
    found = shuffled(tmp_path / "b", 4000, 100, 500, 8, seed=0)
    assert [len(bucket) for bucket in found] == [500] * 8
    for bucket in found:
        # Cells came in order, so the mean of a fair sample of 500 lies within five standard errors of the middle.
        assert abs(bucket.mean() - 1999.5) < 5 * 4000 / np.sqrt(12 * 500)
        first, second = bucket[:250], bucket[250:]
        assert abs(first.mean() - second.mean()) < 5 * 4000 / np.sqrt(12 * 125)


def test_many_buckets_come_back_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    found = shuffled(tmp_path / "b", 120, 120, 1, 1, seed=None)
    assert [bucket.tolist() for bucket in found] == [[i] for i in range(120)]
