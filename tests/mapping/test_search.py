"""Exact neighbours in bounded memory: the same answer in any block size, with faiss and without, ties in row order."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from scfm.mapping import search
from scfm.mapping.search import faiss_is_installed, nearest


def unit_vectors(n: int, width: int = 16, seed: int = 0) -> NDArray[np.float16]:
    vectors = np.random.default_rng(seed).normal(size=(n, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def by_sorting(queries: NDArray, stored: NDArray, k: int) -> tuple[NDArray, NDArray]:
    """All distances in float64, sorted with ties by row."""
    squared = ((queries[:, None].astype(float) - stored[None].astype(float)) ** 2).sum(-1)
    rows = np.argsort(squared, axis=1, kind="stable")[:, :k]
    return np.sqrt(np.take_along_axis(squared, rows, 1)), rows


def with_repeats(seed: int = 1) -> NDArray[np.float16]:
    """Stored vectors of which each third is met many times, so that ties reach over the k-th place and over blocks."""
    stored = unit_vectors(300, seed=seed)
    stored[::3] = stored[np.random.default_rng(seed).integers(0, 4, 100)]
    return stored


@pytest.fixture(params=["numpy", pytest.param("faiss", marks=pytest.mark.peer)])
def engine(request: pytest.FixtureRequest) -> bool:
    if request.param == "faiss" and not faiss_is_installed():
        pytest.skip("no faiss: pip install 'scfm[mapping]'")
    return request.param == "faiss"


@pytest.mark.parametrize("rows_at_once", [7, 64, 1000])
@pytest.mark.parametrize("k", [1, 10, 60])
def test_neighbours_are_those_of_a_full_sort_ties_by_row(
    engine: bool, rows_at_once: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "ROWS_AT_ONCE", rows_at_once)
    monkeypatch.setattr(search, "QUERIES_AT_ONCE", 9)
    monkeypatch.setattr(search, "PAIRS_AT_ONCE", 50)
    stored = with_repeats()
    queries = np.concatenate([unit_vectors(20, seed=2), stored[:6]])
    distances, rows = nearest(queries, [stored[:110], stored[110:111], stored[111:]], k, with_faiss=engine)
    expected, expected_rows = by_sorting(queries, stored, k)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(distances, expected.astype(np.float32))


def test_vectors_closer_than_float32_products_can_tell_are_told_apart() -> None:
    # 1e-3 apart: squared distances of 1e-6, far below the rounding of 2 - 2 * product in float32 at this width
    one = unit_vectors(1, width=512)
    stored = np.repeat(one, 40, axis=0)
    steps = np.random.default_rng(0).permutation(40)
    stored[np.arange(40), steps] = np.nextafter(stored[np.arange(40), steps], np.float16(2))
    expected, expected_rows = by_sorting(one, stored, 5)
    distances, rows = nearest(one, [stored], 5, with_faiss=False)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(distances, expected.astype(np.float32))


def test_a_cell_passes_over_its_own_group() -> None:
    stored = with_repeats()
    own = np.arange(300)
    _, rows = nearest(stored, [stored], 4, apart=(own, own))
    assert not (rows == own[:, None]).any()
    halves = own % 2
    distances, rows = nearest(stored, [stored], 4, apart=(halves, halves))
    assert (rows % 2 != halves[:, None]).all()
    expected, _ = by_sorting(stored[:1], stored[1::2], 4)
    np.testing.assert_array_equal(distances[:1], expected.astype(np.float32))


def test_fewer_than_k_are_marked() -> None:
    stored = unit_vectors(3)
    distances, rows = nearest(stored[:1], [stored], 5, apart=(np.array([0]), np.array([0, 1, 2])))
    assert (rows[0, 2:] == -1).all()
    assert np.isinf(distances[0, 2:]).all()
    assert set(rows[0, :2]) == {1, 2}
