"""Expression values of a source: what is wrong with them, and the same values by vocabulary id."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numba import uint64
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from scfm.compiled import compiled
from scfm.data.store import CellBlock, ValueKind
from scfm.errors import ScfmError

LARGEST_COUNT = 2**32 - 1


class Fault(IntEnum):
    """What keeps a value from being a raw count, the worst first."""

    NOT_FINITE = 0
    NEGATIVE = 1
    TOO_LARGE = 2
    FRACTION = 3


@compiled
def _first_faults(values: NDArray) -> NDArray[np.int64]:
    first = np.full(4, -1)
    for at in range(len(values)):
        value = values[at]
        if not np.isfinite(value):
            fault = 0
        elif value < 0:
            fault = 1
        elif value > LARGEST_COUNT:
            fault = 2
        elif value != np.floor(value):
            fault = 3
        else:
            continue
        if first[fault] < 0:
            first[fault] = at
    return first


def find_faults(values: NDArray) -> dict[Fault, int]:
    """Return where each kind of fault stands first in `values` (nnz,), worst kind first; every value is looked at."""
    return {fault: int(at) for fault, at in zip(Fault, _first_faults(_plain(values)), strict=True) if at >= 0}


def _plain(values: NDArray) -> NDArray:
    """Return bool as uint8 and float16 as float32, which numba cannot compile for; all else as it is."""
    return values.astype({"bool": np.uint8, "float16": np.float32}.get(values.dtype.name, values.dtype), copy=False)


# A de Bruijn sequence: multiplied by a power of two, its top six bits differ for each of the 64 powers.
DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
BIT_OF = np.zeros(64, np.int64)
BIT_OF[[((1 << bit) * int(DE_BRUIJN) >> 58) & 63 for bit in range(64)]] = np.arange(64)


@compiled
def _map_rows(
    indptr: NDArray,
    columns: NDArray,
    values: NDArray,
    gene_of_column: NDArray[np.int32],
    offsets: NDArray[np.int64],
    genes: NDArray,
    mapped: NDArray,
) -> tuple[int, float]:
    n_genes = gene_of_column.max() + 1
    sums = np.zeros(n_genes, np.float64)
    marks = np.zeros((n_genes + 63) >> 6, np.uint64)
    filled, largest = 0, 0.0
    for row in range(len(indptr) - 1):
        for at in range(indptr[row], indptr[row + 1]):
            gene = gene_of_column[columns[at]]
            if gene >= 0 and values[at] != 0:
                sums[gene] += values[at]
                marks[gene >> 6] |= uint64(1) << uint64(gene & 63)
        # Sweeping a bitmap of the genes seen sorts them in linear time; columns follow no order of the vocabulary.
        for word in range(len(marks)):
            left = marks[word]
            while left:
                lowest = left & (~left + uint64(1))
                gene = (word << 6) + BIT_OF[(lowest * DE_BRUIJN) >> uint64(58)]
                genes[filled] = gene
                mapped[filled] = sums[gene]
                largest = max(largest, sums[gene])
                sums[gene] = 0.0
                filled += 1
                left ^= lowest
            marks[word] = 0
        offsets[row + 1] = filled
    return filled, largest


def to_vocabulary(cells: csr_matrix, gene_of_column: NDArray[np.int32], value_kind: ValueKind) -> CellBlock:
    """Return checked cells (n, columns) by vocabulary id: ids ascending, columns of one gene summed, zeros left out.

    Args:
        cells: finite, non-negative values.
        gene_of_column: (columns,) vocabulary id of each column, -1 for a column to leave out; not all -1.
        value_kind: counts become unsigned integers, normalised values float32.

    Returns:
        A block of n cells with int64 offsets; ids and counts take the narrowest unsigned type that holds them.

    Raises ScfmError where the summed counts of a gene are above 2**32 - 1.
    """
    offsets = np.zeros(cells.shape[0] + 1, np.int64)
    genes = np.empty(cells.nnz, np.min_scalar_type(int(gene_of_column.max())))
    mapped = np.empty(cells.nnz, np.uint32 if value_kind == "counts" else np.float32)
    filled, largest = _map_rows(cells.indptr, cells.indices, _plain(cells.data), gene_of_column, offsets, genes, mapped)
    if value_kind == "counts" and largest > LARGEST_COUNT:
        raise ScfmError(
            f"the columns of one gene add up to {largest:,.0f}, more than a count can be ({LARGEST_COUNT:,})"
        )
    if value_kind == "counts":
        mapped = mapped[:filled].astype(np.min_scalar_type(int(largest)))
    return CellBlock(offsets, genes[:filled], mapped[:filled])


def narrowest(values: NDArray) -> NDArray:
    """Return unsigned integers in the narrowest type that holds them all; float32 as it is."""
    if values.dtype == np.float32:
        return values
    largest = int(values.max(initial=0))
    return values.astype(np.min_scalar_type(largest), copy=False)


def joined(blocks: Sequence[CellBlock]) -> CellBlock:
    """Return the rows of several blocks, one after the other, as one block; the widest of their types holds them."""
    starts = np.cumsum([0, *(len(block.genes) for block in blocks)])
    offsets = [block.offsets[1:] + start for block, start in zip(blocks, starts[:-1], strict=True)]
    return CellBlock(
        np.concatenate([np.zeros(1, np.int64), *offsets]),
        np.concatenate([block.genes for block in blocks]),
        np.concatenate([block.values for block in blocks]),
    )


def take_cells(block: CellBlock, rows: NDArray[np.int64]) -> CellBlock:
    """Return the given rows of a block, in the given order, as a new block."""
    lengths = np.diff(block.offsets)[rows]
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    genes = np.empty(offsets[-1], block.genes.dtype)
    values = np.empty(offsets[-1], block.values.dtype)
    _copy_rows(block.offsets, block.genes, block.values, rows, offsets, genes, values)
    return CellBlock(offsets, genes, values)


@compiled
def _copy_rows(
    starts: NDArray,
    genes: NDArray,
    values: NDArray,
    rows: NDArray[np.int64],
    offsets: NDArray[np.int64],
    genes_out: NDArray,
    values_out: NDArray,
) -> None:
    for i in range(len(rows)):
        start, stop = starts[rows[i]], starts[rows[i] + 1]
        genes_out[offsets[i] : offsets[i + 1]] = genes[start:stop]
        values_out[offsets[i] : offsets[i + 1]] = values[start:stop]
