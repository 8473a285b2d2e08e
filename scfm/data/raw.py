"""Raw cells in the order of training, batch by batch: for models that make their own tokens."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
from numba import njit
from numpy.typing import NDArray

from scfm.data.ahead import Stages
from scfm.data.order import CellOrder
from scfm.data.reading import Reader
from scfm.data.store import CellBlock, CellStore, Rows

TOGETHER = 512  # cells decoded at once; a call for each small batch would cost more than its cells


def raw_batches(
    store: CellStore, order: CellOrder, epoch: int, reader: Reader | None = None, start: int = 0
) -> Generator[tuple[NDArray[np.int64], CellBlock], None, None]:
    """Yield global batch `start`, `start + 1`, ... of an epoch: its store rows, (n,), and these cells in that order.

    Args:
        store: where the cells lie.
        order: which cells make a batch.
        epoch: of the order.
        reader: how cells that lie in files come into memory; None reads the store where it is.
        start: number of the first batch.
    """
    stages = None if reader is None else Stages(order, epoch, reader)
    at_once = max(1, TOGETHER // order.cells_per_batch)
    try:
        first = start
        while first < len(order):
            last = first + 1
            # batches of other stages wait: a group would hold the cells of one stage longer, and copy all of them
            while (
                last < min(first + at_once, len(order))
                and order.stages_of(last) == order.stages_of(first)
                and len(order.stages_of(first)) == 1
            ):
                last += 1
            batches = [order.batch(epoch, k) for k in range(first, last)]
            rows = np.concatenate(batches)
            cells = _in_order(store if stages is None else stages.of(first), rows)
            at = 0
            for k, batch in enumerate(batches, first):
                yield batch, cells.between(at, at + len(batch))
                at += len(batch)
                if stages is not None:
                    stages.delivered(k)
            first = last
    finally:
        if stages is not None:
            stages.close()


def _in_order(cells: Rows, rows: NDArray[np.int64]) -> CellBlock:
    """Return cells of any blocks as one block, in the order of `rows`."""
    sizes = cells.n_genes(rows)
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    parts = list(cells.parts(rows))
    block, mine, places = parts[0]
    all_in_turn = np.arange(block.n_cells)
    if np.array_equal(mine, all_in_turn) and np.array_equal(places, all_in_turn):  # packed cells were decoded so
        return block
    genes = np.empty(offsets[-1], np.result_type(*(block.genes.dtype for block, _, _ in parts)))
    values = np.empty(offsets[-1], np.result_type(*(block.values.dtype for block, _, _ in parts)))
    for block, mine, places in parts:
        _copy(block.offsets, block.genes, block.values, places, offsets[mine], genes, values)
    return CellBlock(offsets, genes, values)


@njit(nogil=True, cache=True)
def _copy(
    offsets: NDArray[np.integer],
    genes: NDArray[np.unsignedinteger],
    values: NDArray,
    places: NDArray[np.int64],
    starts: NDArray[np.int64],
    to_genes: NDArray[np.unsignedinteger],
    to_values: NDArray,
) -> None:
    """Copy the rows at some places to where each starts in the last two arrays."""
    for i in range(len(places)):
        first, n = int(offsets[places[i]]), int(offsets[places[i] + 1]) - int(offsets[places[i]])
        to_genes[starts[i] : starts[i] + n] = genes[first : first + n]
        to_values[starts[i] : starts[i] + n] = values[first : first + n]
