"""Raw cells in the order of training, batch by batch: for models that make their own tokens."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
from numpy.typing import NDArray

from scfm.compiled import compiled
from scfm.data.ahead import Stages, groups_of, made_ahead
from scfm.data.order import CellOrder
from scfm.data.reading import Reader
from scfm.data.store import CellBlock, CellStore, Rows


def raw_batches(
    store: CellStore, order: CellOrder, epoch: int, reader: Reader | None = None, start: int = 0, threads: int = 1
) -> Generator[tuple[NDArray[np.int64], CellBlock], None, None]:
    """Yield global batch `start`, `start + 1`, ... of an epoch: its store rows, (n,), and these cells in that order.

    Args:
        store: where the cells lie.
        order: which cells make a batch.
        epoch: of the order.
        reader: how cells that lie in files come into memory; None reads the store where it is.
        start: number of the first batch.
        threads: threads that decode cells, ahead of those that are used.
    """
    stages = None if reader is None else Stages(order, epoch, reader)

    def decoded(ks: range) -> tuple[NDArray[np.int64], CellBlock]:
        rows, _ = order.drawn(epoch, ks)
        return rows, _in_order(store if stages is None else stages.of(ks.start), rows)

    made = made_ahead(groups_of(order, start), decoded, threads, batches=1)
    try:
        for ks, (rows, cells) in made:
            if stages is not None:
                stages.delivered(ks[-1])
            for at in range(0, len(rows), order.cells_per_batch):
                batch = rows[at : at + order.cells_per_batch]
                yield batch, cells.between(at, at + len(batch))
    finally:
        made.close()
        if stages is not None:
            stages.close()


def _in_order(cells: Rows, rows: NDArray[np.int64]) -> CellBlock:
    """Return cells of any blocks as one block, in the order of `rows`."""
    parts = list(cells.parts(rows))
    if len(parts) == 1:
        block, mine, places = parts[0]
        in_turn = np.arange(block.n_cells)
        own = block.genes.base is None  # else they lie in memory that the next stage is read into
        if own and np.array_equal(mine, in_turn) and np.array_equal(places, in_turn):  # packed cells are decoded so
            return block
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(cells.n_genes(rows), out=offsets[1:])
    genes = np.empty(offsets[-1], np.result_type(*(block.genes.dtype for block, _, _ in parts)))
    values = np.empty(offsets[-1], np.result_type(*(block.values.dtype for block, _, _ in parts)))
    for block, mine, places in parts:
        _copy(block.offsets, block.genes, block.values, places, offsets[mine], genes, values)
    return CellBlock(offsets, genes, values)


@compiled
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
