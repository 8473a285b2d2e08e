"""Quantile bins of many cells at once, beside numpy's quantile and digitize on one."""

from __future__ import annotations

import numpy as np
import pytest

from scfm.data.binning import TABLE, _edges_of_counts, bin_counts, bin_reals


def bins_of(row: np.ndarray, n_bins: int, spread_ties: bool = False, stream: int = 0) -> np.ndarray:
    """Bin one cell by the kernel that fits its values."""
    kernel = bin_reals if row.dtype.kind == "f" else bin_counts
    bins = np.empty(len(row), np.uint16)
    quantiles = np.linspace(0, 1, n_bins - 1)
    one = np.zeros(1, np.int64)
    kernel(
        np.array([0, len(row)], np.int32), row, one, quantiles, spread_ties, np.array([stream], np.uint64), one, bins
    )
    return bins


def limits_of(row: np.ndarray, n_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest bin of each value, by numpy."""
    edges = np.quantile(row.astype(np.float64), np.linspace(0, 1, n_bins - 1))
    highest = np.digitize(row, edges)
    return np.minimum(np.digitize(row, edges, right=True) + 1, highest), highest


@pytest.fixture(params=[np.uint8, np.uint16, np.uint32])
def counts(request: pytest.FixtureRequest) -> np.ndarray:
    """A cell of 1,500 genes, most of them with one count, a few with many."""
    generator = np.random.default_rng(0)
    deep = generator.lognormal(0, 2.5, 1500)
    return np.clip(deep.astype(np.int64), 1, np.iinfo(request.param).max).astype(request.param)


@pytest.mark.parametrize("n_bins", [3, 7, 51, 300])
def test_counts_fall_where_numpy_puts_them(counts: np.ndarray, n_bins: int) -> None:
    assert bins_of(counts, n_bins).tolist() == limits_of(counts, n_bins)[1].tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 50, 51, 1500, 70_000])
@pytest.mark.parametrize("shift", [0, 1])
def test_reals_fall_where_numpy_puts_them(size: int, shift: int) -> None:
    row = np.random.default_rng(size).lognormal(size=size).astype(np.float32) - np.float32(shift)  # 1: both signs
    assert bins_of(row, 51).tolist() == limits_of(row, 51)[1].tolist()


def test_both_kernels_agree(counts: np.ndarray) -> None:
    assert bins_of(counts, 51).tolist() == bins_of(counts.astype(np.float32), 51).tolist()


@pytest.mark.parametrize("size", [1, 2, 10, 49, 50, 51, 1200, 1526])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_edges_are_bit_equal_to_numpys(size: int, scale: float) -> None:
    row = np.ceil(np.random.default_rng(size).exponential(scale, size)).astype(np.uint32)
    quantiles, edges = np.linspace(0, 1, 50), np.empty(50)
    held = np.bincount(row[row < TABLE], minlength=TABLE).astype(np.int32)
    _edges_of_counts(held, np.sort(row[row >= TABLE]).astype(np.int64), size, quantiles, edges)
    assert edges.tobytes() == np.quantile(row, quantiles).tobytes()


def test_left_puts_ties_into_the_highest_bin_they_may_take() -> None:
    assert bins_of(np.full(9, 4, np.uint8), 51).tolist() == [50] * 9


def test_random_ties_spread_over_all_bins_they_may_take(counts: np.ndarray) -> None:
    lowest, highest = limits_of(counts, 51)
    bins = np.stack([bins_of(counts, 51, spread_ties=True, stream=stream) for stream in range(300)])
    assert (bins >= lowest).all()
    assert (bins <= highest).all()
    ones = counts == 1
    shares = np.bincount(bins[:, ones].ravel(), minlength=51)[lowest[ones][0] : highest[ones][0] + 1] / ones.sum() / 300
    assert np.allclose(shares, 1 / len(shares), rtol=0.05)


def test_random_ties_of_reals_are_those_of_counts(counts: np.ndarray) -> None:
    assert bins_of(counts, 51, True, 8).tolist() == bins_of(counts.astype(np.float32), 51, True, 8).tolist()


def test_random_ties_repeat_with_their_stream(counts: np.ndarray) -> None:
    assert bins_of(counts, 51, True, 5).tolist() == bins_of(counts, 51, True, 5).tolist()
    assert bins_of(counts, 51, True, 5).tolist() != bins_of(counts, 51, True, 6).tolist()


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_rows_are_binned_each_by_itself_and_empty_ones_skipped(dtype: type) -> None:
    rows = [[3, 1, 2], [], [900, 900, 5, 1], [7]]
    offsets = np.cumsum([0] + [len(row) for row in rows]).astype(np.int32)
    values = np.array([value for row in rows for value in row], dtype)
    kernel = bin_counts if dtype == np.uint16 else bin_reals
    bins = np.full(9, 99, np.uint16)
    asked, starts = np.array([3, 1, 2]), np.array([5, 6, 0])
    kernel(offsets, values, asked, np.linspace(0, 1, 10), False, np.zeros(3, np.uint64), starts, bins)
    expected = [*limits_of(np.array(rows[2]), 11)[1], 99, limits_of(np.array(rows[3]), 11)[1][0], 99, 99, 99]
    assert bins.tolist() == expected
