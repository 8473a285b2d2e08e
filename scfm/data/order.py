"""The order in which cells are read: a pure function of (seed, epoch, batch), with nothing to store and O(1) seek."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from scfm.data.random import BLOCKS, ROTATION, WINDOWS, below, permuted, stream
from scfm.data.rows import SomeRows, rows_at
from scfm.errors import ScfmError

BLOCK = 32  # neighbouring cells that are read together
WINDOW = 512  # blocks whose cells mix: two windows are held at a time, 50 MB each where a cell takes 3 KB


class Mixing(NamedTuple):
    """How cells mix: those of `window` blocks, each of `block` neighbouring cells that are read together."""

    block: int
    window: int


def mixing_of(shuffled: bool) -> Mixing:
    """Return how cells mix that were shuffled when they were written, or not; as many are held at a time.

    Neighbours that were shuffled are a fair sample of all cells, so they come in few large blocks, which cost a disk
    less (BENCHMARKS.md).
    """
    return Mixing(256, 64) if shuffled else Mixing(BLOCK, WINDOW)


class Order(Protocol):
    """Which cells make a global batch."""

    @property
    def cells_per_batch(self) -> int: ...

    def __len__(self) -> int: ...

    def drawn(self, epoch: int, ks: range) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Return the store rows of some global batches in a row, and the keys of their random draws, (n,).

        All batches have `cells_per_batch` cells, but the last of an epoch may have fewer.
        """

    def stages_of(self, k: int) -> range:
        """Return the stages that hold the cells of global batch k."""

    def rows_of_stage(self, epoch: int, stage: int) -> NDArray[np.int64]:
        """Return the store rows of a stage, ascending, each once."""


def enough_cells(n_cells: int, cells_per_batch: int) -> None:
    """Raise ScfmError where cells do not fill one global batch."""
    if n_cells < cells_per_batch:
        raise ScfmError(
            f"data.cells_per_batch: {cells_per_batch} cells per batch, but only {n_cells} cells to "
            f"read; set data.cells_per_batch to at most {n_cells}"
        )


@dataclass(frozen=True)
class CellOrder:
    """Global batches of a fixed number of cells; no cell comes twice in an epoch.

    Shuffled, an epoch rotates the rows by a random amount, cuts them into blocks, permutes the blocks, and permutes
    the cells within windows of blocks; the cells that do not fill a last batch wait for another epoch. Unshuffled, rows
    come as given and the last batch may be smaller.

    Attributes:
        rows: the store rows to read.
        cells_per_batch: cells in a global batch, over all ranks.
        seed: what the order depends on, besides the epoch.
        shuffle: whether rows are permuted.
        block: rows read from one place.
        window: blocks whose cells mix.
        region: neighbouring cells that come together in an epoch, because fetching others costs much; 0 is all cells.
    """

    rows: SomeRows
    cells_per_batch: int
    seed: int
    shuffle: bool = True
    block: int = BLOCK
    window: int = WINDOW
    region: int = 0

    def __post_init__(self) -> None:
        if self.shuffle:
            enough_cells(len(self.rows), self.cells_per_batch)

    @cached_property
    def cells_per_stage(self) -> int:
        """How many positions of an epoch are read together: a window, or unshuffled as many whole batches."""
        window = self.block * self.window
        return window if self.shuffle else max(1, window // self.cells_per_batch) * self.cells_per_batch

    def stages_of(self, k: int) -> range:
        """Return the stages that hold the cells of global batch k; `rows_of_stage` says which rows these are."""
        first = k * self.cells_per_batch
        last = min(first + self.cells_per_batch, len(self.rows)) - 1
        return range(self._stage(first), self._stage(last) + 1)

    def rows_of_stage(self, epoch: int, stage: int) -> NDArray[np.int64]:
        """Return the store rows that come at the positions of a stage, sorted, (cells,) int64."""
        n, first = len(self.rows), stage * self.cells_per_stage
        last = n if stage == self._stage(n - 1) else first + self.cells_per_stage
        if not self.shuffle:
            return np.sort(rows_at(self.rows, np.arange(first, last)))
        n_blocks = n // self.block
        blocks = self._shuffled_blocks(epoch, np.arange(first // self.block, min(last // self.block, n_blocks)))
        slots = (blocks[:, None] * self.block + np.arange(self.block)).ravel()
        rest = np.arange(n_blocks * self.block, last)  # none but in the last stage
        return np.sort(rows_at(self.rows, self._rotated(epoch, np.concatenate([slots, rest]))))

    def _stage(self, position: int) -> int:
        whole = max(len(self.rows) // self.cells_per_stage, 1) - 1
        return min(position // self.cells_per_stage, whole)

    def __len__(self) -> int:
        """Return the global batches of an epoch."""
        whole, rest = divmod(len(self.rows), self.cells_per_batch)
        return whole if self.shuffle or not rest else whole + 1

    def batch(self, epoch: int, k: int) -> NDArray[np.int64]:
        """Return the store rows of global batch k of an epoch, (cells_per_batch,) int64; IndexError past the end."""
        return self.drawn(epoch, range(k, k + 1))[0]

    def drawn(self, epoch: int, ks: range) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Return the store rows of some global batches in a row, and the keys of their random draws: the rows.

        Raises IndexError past the end.
        """
        if not 0 <= ks.start < ks.stop <= len(self):
            raise IndexError(f"batch {ks[-1] if ks else ks.start} of an epoch of {len(self)}")
        first, last = ks.start * self.cells_per_batch, min(ks.stop * self.cells_per_batch, len(self.rows))
        positions = np.arange(first, last, dtype=np.int64)
        if self.shuffle:
            positions = self._shuffled(epoch, positions)
        rows = rows_at(self.rows, positions)
        return rows, rows.astype(np.uint64)

    def _shuffled(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the place among the rows of each position of the epoch."""
        n, cells_per_window = len(self.rows), self.block * self.window
        last = max(n // cells_per_window, 1) - 1  # the last window takes what is left, so that none is short
        window_of = np.minimum(positions // cells_per_window, last)
        slots = np.empty_like(positions)
        for w in range(window_of[0], window_of[-1] + 1):
            first, inside = w * cells_per_window, window_of == w
            size = n - first if w == last else cells_per_window
            slots[inside] = first + permuted(positions[inside] - first, size, self._key(epoch, w, WINDOWS))

        n_blocks = n // self.block
        # the rows after the last whole block keep their place; the last window mixes them with the others
        whole = slots < n_blocks * self.block
        slots[whole] = self._shuffled_blocks(epoch, slots[whole] // self.block) * self.block + slots[whole] % self.block
        return self._rotated(epoch, slots)

    def _shuffled_blocks(self, epoch: int, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        n_blocks = len(self.rows) // self.block
        size = max(self.region // self.block, 1)
        if not self.region or size >= n_blocks:
            return permuted(blocks, n_blocks, self._key(epoch, 0, BLOCKS))
        # regions are permuted, and blocks within each; the blocks after the last whole region come last
        n_regions, shuffled = n_blocks // size, np.empty_like(blocks)
        region_of = blocks // size
        for region in np.unique(region_of):
            here, key = region_of == region, self._key(epoch, 2 + int(region), BLOCKS)
            image = (
                permuted(np.array([region]), n_regions, self._key(epoch, 1, BLOCKS)) if region < n_regions else region
            )
            inside = min(size, n_blocks - int(region) * size)
            shuffled[here] = image * size + permuted(blocks[here] - region * size, inside, key)
        return shuffled

    def _rotated(self, epoch: int, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        n = len(self.rows)
        return (slots + below(self._key(epoch, 0, ROTATION) >> 32, n)) % n

    def _key(self, epoch: int, part: int, purpose: int) -> np.uint64:
        # numba returns a plain int, and would take a small one for signed
        return np.uint64(stream(self.seed, epoch, part, purpose))
