"""Where cells lie: sparse rows in one or more blocks, with obs codes beside them.

Shards on disk and an AnnData in memory both become a `CellStore`; everything downstream reads only that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from scfm.data.vocabulary import Vocabulary

ValueKind = Literal["counts", "normalised"]

PART = 4096  # cells decoded at a time where all are read in turn


@dataclass(frozen=True)
class CellBlock:
    """Rows as in a CSR matrix whose columns are vocabulary ids: the form in which cells of any codec are read.

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

    def lengths(self, places: NDArray[np.int64]) -> NDArray[np.int32]:
        return (self.offsets[places + 1] - self.offsets[places]).astype(np.int32, copy=False)

    def gather(self, places: NDArray[np.int64]) -> tuple[CellBlock, NDArray[np.int64]]:
        return self, places

    def between(self, first: int, last: int) -> CellBlock:
        """Return rows `first` to `last - 1`; nothing but their offsets is copied."""
        offsets = self.offsets[first : last + 1]
        inside = slice(offsets[0], offsets[-1])
        return CellBlock(offsets - offsets[0], self.genes[inside], self.values[inside])


class Block(Protocol):
    """Rows stored together, in any codec."""

    @property
    def n_cells(self) -> int: ...

    def lengths(self, places: NDArray[np.int64]) -> NDArray[np.int32]:
        """Return the number of non-zero genes of the rows at some places, (n,)."""

    def gather(self, places: NDArray[np.int64]) -> tuple[CellBlock, NDArray[np.int64]]:
        """Return a block that holds the rows at some places, (n,), and their places in it."""


class Rows(Protocol):
    """Cells that can be read by row: a store, or a part of it that is in memory."""

    def n_genes(self, rows: NDArray[np.int64]) -> NDArray[np.int32]: ...

    def parts(self, rows: NDArray[np.int64]) -> Iterator[tuple[CellBlock, NDArray[np.int64], NDArray[np.int64]]]: ...


@dataclass(frozen=True)
class InFile:
    """Where a mapped block lies.

    Attributes:
        path: the shard.
        n_bytes: size of the shard.
        starts: the byte of the file at which each of the block's large arrays begins.
    """

    path: Path
    n_bytes: int
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Lost:
    """Rows that are left out, and why."""

    rows: range
    why: str


@dataclass(frozen=True, eq=False)
class ManyCodes:
    """Codes that lie in several arrays, one after the other, and are read where they are asked for.

    Rows are asked for as of a numpy array: by numbers, a mask or a slice. `np.asarray` reads all.
    """

    arrays: Sequence[Any]  # numpy's, or what can be asked for rows like one

    @cached_property
    def _first_rows(self) -> NDArray[np.int64]:
        return np.cumsum([0, *(len(array) for array in self.arrays)], dtype=np.int64)

    @cached_property
    def dtype(self) -> np.dtype:
        return np.result_type(np.int16, *{array.dtype for array in self.arrays})

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    @property
    def in_memory(self) -> bool:
        """Whether all arrays are there, or mapped: then asking costs nothing but the codes asked for."""
        return all(isinstance(array, np.ndarray) for array in self.arrays)

    def __getitem__(self, rows: NDArray | Sequence[int] | slice) -> NDArray[np.integer]:
        if isinstance(rows, slice) and rows.step in (None, 1):
            return self._between(*rows.indices(len(self))[:2])
        rows = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows)
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        found = np.empty(len(rows), self.dtype)
        array_of = np.searchsorted(self._first_rows, rows, side="right") - 1
        order = np.argsort(array_of, kind="stable")
        arrays, firsts = np.unique(array_of[order], return_index=True)
        for a, here in zip(arrays.tolist(), np.split(order, firsts[1:]), strict=True):
            found[here] = self.arrays[a][rows[here] - self._first_rows[a]]
        return found

    def _between(self, first: int, last: int) -> NDArray[np.integer]:
        begin, end = np.searchsorted(self._first_rows, [first, max(last, first)], side="right") - 1
        starts = zip(self.arrays[begin : end + 1], self._first_rows[begin:], strict=False)
        parts = [np.asarray(array)[max(first - start, 0) : max(last - start, 0)] for array, start in starts]
        return np.concatenate([np.empty(0, np.int16), *parts]).astype(self.dtype, copy=False)

    def __eq__(self, other: object) -> NDArray[np.bool_]:  # type: ignore[override]
        return np.asarray(self) == other

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> NDArray:
        return np.concatenate([np.empty(0, np.int16), *map(np.asarray, self.arrays)]).astype(
            dtype or self.dtype, copy=False
        )


Codes = NDArray[np.integer] | ManyCodes


@dataclass(frozen=True)
class ObsColumn:
    """A categorical obs column: (N,) integer codes (-1 for missing) and the category names."""

    codes: Codes
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
        files: where each block lies, if the blocks are mapped files.
        lost: rows that exist in name only, for their shard is damaged and the caller wished to go on without it.
        shuffled: whether the rows stand in random order, so that neighbours are a fair sample of all.
    """

    vocabulary: Vocabulary
    value_kind: ValueKind
    blocks: Sequence[Block]
    obs: dict[str, ObsColumn] = field(default_factory=dict)
    cell_names: NDArray[np.object_] | None = None
    files: Sequence[InFile] = ()
    lost: Sequence[Lost] = ()
    shuffled: bool = False

    @cached_property
    def first_rows(self) -> NDArray[np.int64]:
        """(B + 1,) first row of each block, and the number of cells."""
        return np.concatenate([[0], np.cumsum([block.n_cells for block in self.blocks])]).astype(np.int64)

    @property
    def n_cells(self) -> int:
        return int(self.first_rows[-1])

    @property
    def lost_rows(self) -> NDArray[np.int64]:
        """All rows that are lost, ascending."""
        return np.concatenate([np.empty(0, np.int64), *(np.asarray(lost.rows, np.int64) for lost in self.lost)])

    def locate(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the block of each row, and the row's place in it."""
        block = np.searchsorted(self.first_rows, rows, side="right") - 1
        return block, rows - self.first_rows[block]

    def n_genes(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """Return the number of non-zero genes of each row."""
        counts = np.empty(len(rows), np.int32)
        for b, cells, places in self._by_block(rows):
            counts[cells] = self.blocks[b].lengths(places)
        return counts

    def parts(self, rows: NDArray[np.int64]) -> Iterator[tuple[CellBlock, NDArray[np.int64], NDArray[np.int64]]]:
        """Yield blocks that together hold the rows, which of the rows each holds, and their places in it."""
        for b, cells, places in self._by_block(rows):
            block, inside = self.blocks[b].gather(places)
            yield block, cells, inside

    def in_turn(self) -> Iterator[CellBlock]:
        """Yield all rows in their order, a few thousand at a time."""
        for block in self.blocks:
            for first in range(0, block.n_cells, PART):
                places = np.arange(first, min(first + PART, block.n_cells))
                part, inside = block.gather(places)
                yield part.between(int(inside[0]), int(inside[-1]) + 1)

    def _by_block(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        block_of, places = self.locate(rows)
        order = np.argsort(block_of, kind="stable")
        cuts = (np.flatnonzero(np.diff(block_of[order])) + 1).tolist()
        for begin, end in pairwise([0, *cuts, len(rows)] if len(rows) else []):
            cells = order[begin:end]
            yield int(block_of[cells[0]]), cells, places[cells]


def only_genes(store: CellStore, entries: NDArray[np.int64]) -> CellStore:
    """Return the cells of a store with nothing but some genes, (n,) vocabulary ids; in memory.

    The vocabulary and the number of each gene stay; a cell that expresses none of them is an empty one.
    """
    kept = np.zeros(store.vocabulary.n_genes, bool)
    kept[entries] = True
    blocks = []
    for part in store.in_turn():
        inside = kept[part.genes]
        before = np.concatenate([[0], np.cumsum(inside)])  # kept values before each one
        blocks.append(CellBlock(before[part.offsets], part.genes[inside], part.values[inside]))
    return replace(store, blocks=blocks, files=())
