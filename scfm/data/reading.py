"""How the bytes of shards reach memory: by memory map, or by reads of whole runs of cells, several in flight.

A map costs nothing where the data stay in the page cache. Where they do not, it waits for one page after another, and
each wait reads far more than the cell; then runs of neighbouring cells are read into buffers of the process instead.
Either way the order of the cells is known, so both begin before the cells are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from scfm.data.packed import PackedBlock
from scfm.data.spans import FileSpans, ask_for, read_spans
from scfm.data.store import Block, CellBlock, CellStore, Rows
from scfm.errors import ScfmError

HOLE = 8  # cells that are read although nobody wants them, rather than read what is before and behind them apart

Runs = NDArray[np.int64]  # (n, 3): block, first place in it, place after the last; by block


@dataclass(frozen=True)
class Loaded:
    """Some rows of a store, in memory.

    Attributes:
        rows: (m,) the rows, ascending.
        at: (m,) the row of `cells` that holds each.
        cells: a store of nothing but these rows.
        memory: what its arrays lie in.
    """

    rows: NDArray[np.int64]
    at: NDArray[np.int64]
    cells: CellStore
    memory: list[NDArray[np.uint8]]

    def n_genes(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        return self.cells.n_genes(self._at(rows))

    def parts(self, rows: NDArray[np.int64]) -> Iterator[tuple[CellBlock, NDArray[np.int64], NDArray[np.int64]]]:
        return self.cells.parts(self._at(rows))

    def _at(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        place = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        if (self.rows[place] != rows).any():
            raise KeyError("a row that was not loaded")
        return self.at[place]


class Several:
    """Rows of which some lie here and some there.

    Args:
        parts: the rows that are somewhere, ascending, and the cells there.
    """

    def __init__(self, parts: Sequence[tuple[NDArray[np.int64], Rows]]) -> None:
        self._parts = parts

    def n_genes(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        counts = np.empty(len(rows), np.int32)
        for part, cells in self._split(rows):
            counts[cells] = part.n_genes(rows[cells])
        return counts

    def parts(self, rows: NDArray[np.int64]) -> Iterator[tuple[CellBlock, NDArray[np.int64], NDArray[np.int64]]]:
        for part, mine in self._split(rows):
            for block, cells, places in part.parts(rows[mine]):
                yield block, mine[cells], places

    def _split(self, rows: NDArray[np.int64]) -> Iterator[tuple[Rows, NDArray[np.int64]]]:
        left = np.arange(len(rows))
        for there, part in self._parts:
            found = np.isin(rows[left], there)
            if found.any():
                yield part, left[found]
            left = left[~found]


class Reader(Protocol):
    """Brings cells of a store into memory."""

    def load(self, rows: NDArray[np.int64]) -> Rows:
        """Return some rows, ascending, ready to be read."""

    def release(self, loaded: Rows) -> None:
        """Let go of what `load` returned; nobody reads it any more."""


class MapReader:
    """Reads cells where they are mapped, and has the kernel fetch those that come next."""

    def __init__(self, store: CellStore) -> None:
        self.store = store

    def load(self, rows: NDArray[np.int64]) -> Rows:
        """Ask for the pages of ascending rows, and return the store. Raises ScfmError that names a file cut off."""
        for b, runs, _ in _by_block(found := _runs(self.store, rows)):
            for at, sizes in _spans(self.store, b, found[runs]):
                ask_for(self.store.files[b].path, at, sizes)
        return self.store

    def release(self, loaded: Rows) -> None:
        """Nothing is held."""


class RunReader:
    """Reads runs of neighbouring cells into memory, several at a time.

    Args:
        store: cells that lie in files.
    """

    def __init__(self, store: CellStore) -> None:
        self.store = store
        self._spare: list[NDArray[np.uint8]] = []

    def load(self, rows: NDArray[np.int64]) -> Loaded:
        """Read ascending rows. Raises ScfmError that names a file which cannot be read or ends too early."""
        runs = _runs(self.store, rows)
        kinds: dict[tuple[type, ...], list[int]] = {}
        for b in np.unique(runs[:, 0]).tolist():
            kinds.setdefault(_kind(self.store.blocks[b]), []).append(b)
        groups = [runs[np.isin(runs[:, 0], members)] for members in kinds.values()]
        files: list[FileSpans] = []
        memory: list[NDArray[np.uint8]] = []
        blocks = [self._room(group, files, memory) for group in groups]
        read_spans(files)
        ordered = np.concatenate([np.empty((0, 3), np.int64), *groups])
        found = np.repeat(self.store.first_rows[ordered[:, 0]], ordered[:, 2] - ordered[:, 1]) + _places(ordered)
        order = np.argsort(found, kind="stable")
        return Loaded(found[order], order, CellStore(self.store.vocabulary, self.store.value_kind, blocks), memory)

    def release(self, loaded: Rows) -> None:
        """Take back the memory of rows that nobody reads any more, for the next ones: fresh pages cost time."""
        assert isinstance(loaded, Loaded)
        self._spare = [*self._spare, *loaded.memory][-4:]

    def _room(self, runs: Runs, files: list[FileSpans], memory: list[NDArray[np.uint8]]) -> Block:
        """Return a block for runs of one kind, and add its memory and what it is read from to what there is."""
        lengths, places = runs[:, 2] - runs[:, 1], _places(runs)
        spans, starts = np.empty((len(runs), 2), np.int64), np.empty(len(places), np.int64)
        for b, of_runs, of_cells in _by_block(runs):
            index = _arrays(self.store.blocks[b])[0]
            spans[of_runs] = index[runs[of_runs, 1:]]
            starts[of_cells] = index[places[of_cells]]
        sizes = spans[:, 1] - spans[:, 0]
        bases = np.cumsum(sizes) - sizes
        joined = np.append(starts + np.repeat(bases - spans[:, 0], lengths), sizes.sum())
        kinds = [array.dtype for array in _arrays(self.store.blocks[runs[0, 0]])[1]]
        rooms = [self._empty(int(joined[-1]) * kind.itemsize) for kind in kinds]
        memory += rooms
        for b, of_runs, _ in _by_block(runs):
            path, here = self.store.files[b].path, _spans(self.store, b, runs[of_runs])
            for room, kind, (at, n_bytes) in zip(rooms, kinds, here, strict=True):
                files.append(FileSpans(path, at, n_bytes, room, bases[of_runs] * kind.itemsize))
        arrays = [room[: joined[-1] * kind.itemsize].view(kind) for room, kind in zip(rooms, kinds, strict=True)]
        return _rebuilt(self.store, runs, joined, arrays)

    def _empty(self, n_bytes: int) -> NDArray[np.uint8]:
        fitting = [spare for spare in self._spare if n_bytes <= len(spare)]
        if not fitting:
            return np.empty(n_bytes + n_bytes // 8, np.uint8)
        memory = min(fitting, key=len)
        self._spare = [spare for spare in self._spare if spare is not memory]
        return memory


def _runs(store: CellStore, rows: NDArray[np.int64]) -> Runs:
    """Return the runs of neighbouring cells that hold ascending rows; small holes are part of a run.

    Raises ScfmError where a file is not as long as when it was mapped: touching the map would then end the process.
    """
    block_of, places = store.locate(rows)
    for b in np.unique(block_of):
        file = store.files[b]
        size = file.path.stat().st_size if file.path.exists() else 0
        if size != file.n_bytes:
            raise ScfmError(f"{file.path}: {size:,} bytes, but {file.n_bytes:,} when it was opened; copy it again")
    cuts = np.flatnonzero((np.diff(rows) > HOLE + 1) | (np.diff(block_of) > 0)) + 1
    first, last = np.append(0, cuts)[: len(rows)], np.append(cuts, len(rows))[: len(rows)] - 1
    return np.stack([block_of[first], places[first], places[last] + 1], axis=1)


def _places(runs: Runs) -> NDArray[np.int64]:
    """Return the place in its block of every cell of some runs, (cells,)."""
    lengths = runs[:, 2] - runs[:, 1]
    return np.arange(lengths.sum()) + np.repeat(runs[:, 1] - np.cumsum(lengths) + lengths, lengths)


def _by_block(runs: Runs) -> Iterator[tuple[int, slice, slice]]:
    """Yield each block of some runs, which of the runs are in it, and which of their cells."""
    begins = np.flatnonzero(np.diff(runs[:, 0], prepend=-1))
    cells = np.append(0, np.cumsum(runs[:, 2] - runs[:, 1]))
    for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), len(runs)], strict=True):
        yield int(runs[begin, 0]), slice(begin, end), slice(int(cells[begin]), int(cells[end]))


def _arrays(block: Block) -> tuple[NDArray[np.integer], list[NDArray]]:
    """Return the start of each cell, (n + 1,), in the arrays that hold its values, and these arrays."""
    if isinstance(block, PackedBlock):
        return block.starts, [block.data]
    assert isinstance(block, CellBlock)
    return block.offsets, [block.genes, block.values]


def _spans(store: CellStore, b: int, runs: Runs) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield, for each array of a block, the first byte in its file and the number of bytes of some of its runs."""
    index, arrays = _arrays(store.blocks[b])
    bounds = index[runs[:, 1:]].astype(np.int64)
    for array, start in zip(arrays, store.files[b].starts, strict=True):
        yield start + bounds[:, 0] * array.itemsize, (bounds[:, 1] - bounds[:, 0]) * array.itemsize


def _kind(block: Block) -> tuple[type, ...]:
    """Return what blocks must have in common to share arrays."""
    return (type(block), *(array.dtype.type for array in _arrays(block)[1]))


def _rebuilt(store: CellStore, runs: Runs, starts: NDArray[np.int64], arrays: list[NDArray]) -> Block:
    blocks = {b: block for b, _, _ in _by_block(runs) if isinstance(block := store.blocks[b], PackedBlock)}
    if not blocks:
        return CellBlock(starts, *arrays)
    places = _places(runs)
    return replace(
        next(iter(blocks.values())),
        starts=starts,
        sizes=np.concatenate([blocks[b].sizes[places[of_cells]] for b, _, of_cells in _by_block(runs)]),
        data=arrays[0],
        genes=np.result_type(*{block.genes for block in blocks.values()}),
        values=np.result_type(*{block.values for block in blocks.values()}),
        name_of=_names(blocks, runs),
    )


def _names(blocks: Mapping[int, PackedBlock], runs: Runs) -> Callable[[int], str]:
    ends = np.cumsum(runs[:, 2] - runs[:, 1])

    def name_of(place: int) -> str:
        b, _, last = runs[np.searchsorted(ends, place, side="right")].tolist()
        return blocks[b].name_of(last - int(ends[ends > place][0]) + place)

    return name_of
