"""Expression values: faults are found wherever they stand, and mapping to a vocabulary loses nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from scfm.data.expression import Fault, find_faults, joined, take_cells, to_vocabulary
from scfm.data.store import CellBlock
from scfm.errors import ScfmError


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_each_fault_is_found_where_it_stands_first(dtype: type) -> None:
    values = np.array([1, 0.5, -2, np.nan, 0.25, np.inf, -3], dtype)
    assert find_faults(values) == {Fault.NOT_FINITE: 3, Fault.NEGATIVE: 2, Fault.FRACTION: 1}
    assert list(find_faults(values)) == [Fault.NOT_FINITE, Fault.NEGATIVE, Fault.FRACTION]


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.uint16, np.int32, np.int64, np.float32, np.float64])
def test_whole_numbers_of_any_type_are_counts(dtype: type) -> None:
    assert find_faults(np.array([0, 1, 1, 100], dtype)) == {}


def test_integers_can_be_negative_or_too_large() -> None:
    assert find_faults(np.array([1, -1, 2**32])) == {Fault.NEGATIVE: 1, Fault.TOO_LARGE: 2}
    assert find_faults(np.array([2**32 - 1])) == {}


def reference(dense: NDArray, gene_of_column: NDArray[np.int32], n_genes: int) -> NDArray:
    summed = np.zeros((len(dense), n_genes))
    for column, gene in enumerate(gene_of_column):
        if gene >= 0:
            summed[:, gene] += dense[:, column]
    return summed


def dense_of(block: CellBlock, n_genes: int) -> NDArray:
    return csr_matrix((block.values, block.genes, block.offsets), (block.n_cells, n_genes)).toarray()


@settings(deadline=None)  # the first call compiles
@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.sampled_from(["counts", "normalised"]))
def test_mapped_cells_equal_a_dense_sum_over_columns(seed: int, n_genes: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    dense = rng.integers(0, 3, (7, 2 * n_genes)) * rng.choice([1, 1000], (7, 2 * n_genes))
    if kind == "normalised":
        dense = dense * 0.25
    gene_of_column = rng.integers(-1, n_genes, 2 * n_genes).astype(np.int32)
    gene_of_column[0] = n_genes - 1
    block = to_vocabulary(csr_matrix(dense), gene_of_column, "counts" if kind == "counts" else "normalised")
    np.testing.assert_array_equal(dense_of(block, n_genes), reference(dense, gene_of_column, n_genes))
    narrow = np.min_scalar_type(int(block.values.max(initial=0)))
    assert block.values.dtype == (narrow if kind == "counts" else np.float32)
    assert (block.values > 0).all()
    for start, stop in zip(block.offsets[:-1], block.offsets[1:], strict=True):
        assert (np.diff(block.genes[start:stop].astype(int)) > 0).all()


def test_stored_zeros_and_repeated_entries_are_settled() -> None:
    cells = csr_matrix((np.array([0.0, 2.0, 3.0]), np.array([0, 1, 1]), np.array([0, 3])), (1, 2))
    block = to_vocabulary(cells, np.array([0, 1], np.int32), "counts")
    assert (block.genes.tolist(), block.values.tolist()) == ([1], [5])


def test_a_sum_that_no_count_can_hold_is_an_error() -> None:
    cells = csr_matrix(np.array([[2**32 - 1, 1]]))
    with pytest.raises(ScfmError, match=r"add up to 4,294,967,296"):
        to_vocabulary(cells, np.array([0, 0], np.int32), "counts")


def test_taken_cells_are_the_rows_asked_for_in_that_order() -> None:
    dense = np.random.default_rng(0).integers(0, 2, (6, 20))
    cells = csr_matrix(dense)
    block = CellBlock(cells.indptr, cells.indices.astype(np.uint16), cells.data.astype(np.uint8))
    taken = take_cells(block, np.array([5, 0, 0, 3]))
    np.testing.assert_array_equal(dense_of(taken, 20), dense[[5, 0, 0, 3]])
    assert (taken.genes.dtype, taken.values.dtype) == (np.uint16, np.uint8)
    assert take_cells(block, np.array([], np.int64)).n_cells == 0


def test_joined_blocks_are_their_rows_one_after_the_other_in_the_widest_type() -> None:
    parts = [np.random.default_rng(seed).integers(0, largest, (4, 20)) for seed, largest in ((1, 200), (2, 800))]
    cells = [csr_matrix(part) for part in parts]
    types = (np.uint8, np.uint16)
    blocks = [CellBlock(c.indptr, c.indices.astype(t), c.data.astype(t)) for c, t in zip(cells, types, strict=True)]
    block = joined(blocks)
    np.testing.assert_array_equal(dense_of(block, 20), np.concatenate(parts))
    assert (block.genes.dtype, block.values.dtype) == (np.uint16, np.uint16)
