"""The order in which cells are read: a pure function of (seed, epoch, batch), with nothing to store and O(1) seek."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scfm.data.random import BLOCKS, ROTATION, WINDOWS, below, permuted, stream
from scfm.errors import ScfmError


@dataclass(frozen=True)
class CellOrder:
    """Global batches of a fixed number of cells; no cell comes twice in an epoch.

    Shuffled, an epoch rotates the rows by a random amount, cuts them into blocks, permutes the blocks, and permutes
    the cells within windows of blocks; the cells that do not fill a last batch wait for another epoch. Unshuffled, rows
    come as given and the last batch may be smaller.

    Attributes:
        rows: the store rows to read, a range or (n,) int64.
        cells_per_batch: cells in a global batch, over all ranks.
        seed: what the order depends on, besides the epoch.
        shuffle: whether rows are permuted.
        block: rows read from one place.
        window: blocks whose cells mix.
    """

    rows: range | NDArray[np.int64]
    cells_per_batch: int
    seed: int
    shuffle: bool = True
    block: int = 64
    window: int = 1024

    def __post_init__(self) -> None:
        if self.shuffle and len(self.rows) < self.cells_per_batch:
            raise ScfmError(
                f"data.cells_per_batch: {self.cells_per_batch} cells per batch, but only {len(self.rows)} cells to "
                f"read; set data.cells_per_batch to at most {len(self.rows)}"
            )

    def __len__(self) -> int:
        """Return the global batches of an epoch."""
        whole, rest = divmod(len(self.rows), self.cells_per_batch)
        return whole if self.shuffle or not rest else whole + 1

    def batch(self, epoch: int, k: int) -> NDArray[np.int64]:
        """Return the store rows of global batch k of an epoch, (cells_per_batch,) int64; IndexError past the end."""
        if not 0 <= k < len(self):
            raise IndexError(f"batch {k} of an epoch of {len(self)}")
        first = k * self.cells_per_batch
        positions = np.arange(first, min(first + self.cells_per_batch, len(self.rows)), dtype=np.int64)
        if self.shuffle:
            positions = self._shuffled(epoch, positions)
        if isinstance(self.rows, range):
            return self.rows.start + positions * self.rows.step
        return self.rows[positions]

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
        blocks = permuted(slots[whole] // self.block, n_blocks, self._key(epoch, 0, BLOCKS))
        slots[whole] = blocks * self.block + slots[whole] % self.block
        rotation = below(self._key(epoch, 0, ROTATION) >> 32, n)
        return (slots + rotation) % n

    def _key(self, epoch: int, part: int, purpose: int) -> np.uint64:
        # numba returns a plain int, and would take a small one for signed
        return np.uint64(stream(self.seed, epoch, part, purpose))
