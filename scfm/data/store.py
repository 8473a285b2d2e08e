"""Where cells lie: sparse rows in one or more blocks, with obs codes beside them.

Shards on disk and an AnnData in memory both become a `CellStore`; everything downstream reads only that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from scfm.data.vocabulary import Vocabulary

ValueKind = Literal["counts", "normalised"]


@dataclass(frozen=True)
class CellBlock:
    """Rows stored together, as in a CSR matrix whose columns are vocabulary ids.

    Attributes:
        offsets: (n + 1,) int32 or int64 start of each row in `genes` and `values`.
        genes: (nnz,) unsigned vocabulary ids, ascending within a row, each at most once.
        values: (nnz,) unsigned counts, or float32 where the store is normalised; never zero.
    """

    offsets: NDArray[np.integer]
    genes: NDArray[np.unsignedinteger]
    values: NDArray

    @property
    def n_cells(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class ObsColumn:
    """A categorical obs column: (N,) integer codes (-1 for missing) and the category names."""

    codes: NDArray[np.integer]
    categories: list[str]


@dataclass(frozen=True)
class CellStore:
    """Cells of one vocabulary, as blocks of sparse rows.

    Attributes:
        vocabulary: what the gene ids mean.
        value_kind: raw `counts`, or `normalised` values, of which quantile bins keep only the order within a cell.
        blocks: the rows, block after block.
        obs: categorical columns carried along, by name.
        cell_names: (N,) obs names where known.
    """

    vocabulary: Vocabulary
    value_kind: ValueKind
    blocks: list[CellBlock]
    obs: dict[str, ObsColumn] = field(default_factory=dict)
    cell_names: NDArray[np.object_] | None = None

    @cached_property
    def first_rows(self) -> NDArray[np.int64]:
        """(B + 1,) first row of each block, and the number of cells."""
        return np.concatenate([[0], np.cumsum([block.n_cells for block in self.blocks])]).astype(np.int64)

    @property
    def n_cells(self) -> int:
        return int(self.first_rows[-1])

    def locate(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the block of each row, and the row's place in it."""
        block = np.searchsorted(self.first_rows, rows, side="right") - 1
        return block, rows - self.first_rows[block]

    def n_genes(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """Return the number of non-zero genes of each row."""
        counts = np.empty(len(rows), np.int32)
        block_of, place = self.locate(rows)
        for b in np.unique(block_of):
            at, offsets = block_of == b, self.blocks[b].offsets
            counts[at] = offsets[place[at] + 1] - offsets[place[at]]
        return counts
