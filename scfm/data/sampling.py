"""Sampling by group: rare tissues or small sources come more often, in an order that is as pure as a plain one.

Every group has an order of its own over its own cells, and is read to its end before any of its cells comes again.
Which group comes next follows from the shares alone: the draws of a group are spread evenly over time, so that every
batch has its share of every group, nearer than random draws come to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from scfm.compiled import compiled
from scfm.data.groups import Groups, shares_of
from scfm.data.order import BLOCK, WINDOW, enough_cells
from scfm.data.random import BLOCKS, ROTATION, WINDOWS, below, feistel, stream
from scfm.data.rows import SomeRows
from scfm.data.store import CellStore
from scfm.errors import ScfmError

TIMES = 40  # bits of a cell's key that are its row; above them stands how often it was read before


@dataclass(frozen=True)
class SampledOrder:
    """Global batches of a fixed number of cells, of which every group has its share.

    An epoch is as many batches as it takes to read as many cells as there are: those of rare groups come several
    times in it, and those of others not at all. Groups go on where the last epoch left them: at the end of every epoch
    each cell of a group has been read as often as any other, or once more or less. So in an epoch with q draws from a
    group of n cells none comes more than ceil(q / n) + 1 times.

    Attributes:
        groups: the cells by group.
        shares: (G,) share of each group in what is read, in all 1.
        cells_per_batch: cells in a global batch, over all ranks.
        seed: what the order depends on, besides the epoch.
        block: neighbouring cells of a group that are read together.
        window: blocks, of all groups together, whose cells mix.
    """

    groups: Groups
    shares: NDArray[np.float64]
    cells_per_batch: int
    seed: int
    block: int = BLOCK
    window: int = WINDOW

    def __post_init__(self) -> None:
        enough_cells(len(self.groups), self.cells_per_batch)

    def __len__(self) -> int:
        """Return the global batches of an epoch."""
        return len(self.groups) // self.cells_per_batch

    def batch(self, epoch: int, k: int) -> NDArray[np.int64]:
        """Return the store rows of global batch k of an epoch, (cells_per_batch,) int64; IndexError past the end."""
        return self.drawn(epoch, range(k, k + 1))[0]

    def drawn(self, epoch: int, ks: range) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Return the store rows of some global batches in a row, and the keys of their random draws.

        A cell that comes again has another key, and so other genes and another mask. Raises IndexError past the end.
        """
        if not 0 <= ks.start < ks.stop <= len(self):
            raise IndexError(f"batch {ks[-1] if ks else ks.start} of an epoch of {len(self)}")
        batches = [self._drawn(epoch, k // self._batches_per_stage, k, k + 1) for k in ks]  # by group within a batch
        rows, keys = zip(*batches, strict=True)
        return np.concatenate(rows), np.concatenate(keys)

    def stages_of(self, k: int) -> range:
        """Return the stages that hold the cells of global batch k; `rows_of_stage` says which rows these are."""
        stage = k // self._batches_per_stage
        return range(stage, stage + 1)

    def rows_of_stage(self, epoch: int, stage: int) -> NDArray[np.int64]:
        """Return the store rows of the batches of a stage, sorted, each once, (cells,) int64."""
        return np.unique(self._drawn(epoch, stage, *self._batches_of(stage))[0])

    @cached_property
    def _batches_per_stage(self) -> int:
        return max(1, self.block * self.window // self.cells_per_batch)

    @cached_property
    def _delays(self) -> NDArray[np.float64]:
        """When each group is drawn first, as a share of the time between two of its draws, (G,)."""
        return np.array([_uniform(self.seed, group) for group in range(len(self.shares))])

    def _batches_of(self, stage: int) -> tuple[int, int]:
        first = stage * self._batches_per_stage
        return first, min(first + self._batches_per_stage, len(self))

    def _draws_before(self, epoch: int, k: int) -> NDArray[np.int64]:
        """Return how often each group is drawn before global batch k of an epoch, since training began, (G,)."""
        return _draws_of_groups((epoch * len(self) + k) * self.cells_per_batch, self.shares, self._delays)

    def _drawn(self, epoch: int, stage: int, k: int, until: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        stage_begin, stage_end = (self._draws_before(epoch, batch) for batch in self._batches_of(stage))
        begin, end = self._draws_before(epoch, k), self._draws_before(epoch, until)
        n_stages = -(-len(self) // self._batches_per_stage)
        window_number = epoch * n_stages + stage
        groups, numbers, times = _numbers(
            self.seed, window_number, stage_begin, stage_end, begin, end, self.groups.sizes, self.block
        )
        rows = self.groups.find(groups, numbers)
        return rows, rows.astype(np.uint64) + (times << np.uint64(TIMES))


@dataclass(frozen=True)
class Sampling:
    """What a recipe says about sampling, for the cells that it trains on.

    Attributes:
        groups: the cells by group.
        shares: (G,) share of each group in what is read.
        key: the recipe's words: the order depends on them.
        said: what comes of them, for the log.
    """

    groups: Groups
    shares: NDArray[np.float64]
    key: str
    said: str

    @classmethod
    def of(
        cls,
        store: CellStore,
        rows: SomeRows,
        column: str,
        power: float,
        weights: Mapping[str, float],
        most_repeats: float,
        region: int,
    ) -> Sampling:
        """Return how some rows of a store are sampled.

        Args:
            store: the cells.
            rows: those that are trained on.
            column, power, weights, most_repeats: `data.sample_by`, `sample_power`, `sample_weights`, `sample_repeats`.
            region: as `CellOrder` has it.

        Raises ScfmError where the cells have no such column or group, or not all shards fit into the cache.
        """
        if region:
            raise ScfmError(
                "data.sample_by: groups are read from all shards at a time, and the cache does not hold them; raise "
                "data.cache_gb to more than twice the size of the shards, or copy them to a local disk"
            )
        groups = Groups(store, column, rows)
        shares = shares_of(groups, power, weights, most_repeats)
        names, sizes = groups.names, groups.sizes
        times = shares * len(groups) / sizes
        largest, rarest = int(sizes.argmax()), int(times.argmax())
        said = (
            f"cells are sampled by {column}, {len(shares):,} groups: {names[largest]} is "
            f"{sizes[largest] / len(groups):.1%} of the cells and {shares[largest]:.1%} of what is read; the "
            f"{sizes[rarest]:,} cells of {names[rarest]} come most often, {times[rarest]:.3g} times an epoch"
        )
        key = f"by {column} to the power {power:g}, at most {most_repeats:g} times, weights {dict(weights)}"
        return cls(groups, shares, key, said)


@compiled
def _uniform(seed: int, group: int) -> float:
    return (stream(seed, 0, group, WINDOWS) >> np.uint64(11)) / 2.0**53


@compiled
def _draws_of_groups(total: int, shares: NDArray[np.float64], delays: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return how many of the first `total` draws fall to each group, (G,).

    Draw j of a group is due at (j + delay) / share; draws come in the order in which they are due, and of those that
    are due together the first group's first. So this counts the draws that are due before a moment, which is searched.
    """
    low, high = max(float(total - len(shares) - 1), 0.0), float(total + len(shares) + 2)
    while True:
        middle = (low + high) / 2
        if middle <= low or middle >= high:
            break
        if _due(middle, shares, delays).sum() <= total:
            low = middle
        else:
            high = middle
    counts, after = _due(low, shares, delays), _due(high, shares, delays)
    missing = total - counts.sum()
    for group in range(len(shares)):
        take = min(missing, after[group] - counts[group])
        counts[group] += take
        missing -= take
    return counts


@compiled
def _due(moment: float, shares: NDArray[np.float64], delays: NDArray[np.float64]) -> NDArray[np.int64]:
    counts = np.empty(len(shares), np.int64)
    for group in range(len(shares)):
        counts[group] = max(int(np.ceil(shares[group] * moment - delays[group])), 0)
    return counts


@compiled
def _numbers(
    seed: int,
    window: int,
    window_begin: NDArray[np.int64],
    window_end: NDArray[np.int64],
    begin: NDArray[np.int64],
    end: NDArray[np.int64],
    sizes: NDArray[np.int64],
    block: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]:
    """Return the group of each draw, the number in it of the cell drawn, and how often that was drawn before, (n,).

    Args:
        seed: of the order.
        window: number of the window, counted since training began.
        window_begin, window_end: (G,) the draws of each group that mix.
        begin, end: (G,) the draws that are asked for, within these.
        sizes: (G,) cells of each group.
        block: neighbouring cells that are read together.
    """
    n = (end - begin).sum()
    groups, numbers, times = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.uint64)
    i = 0
    for group in range(len(sizes)):
        size, first = sizes[group], window_begin[group]
        n_blocks = size // block
        mixing = stream(seed, window, group, WINDOWS)
        for draw in range(begin[group], end[group]):
            mixed = first + feistel(draw - first, window_end[group] - first, mixing)
            turn, number = mixed // size, mixed % size
            if number < n_blocks * block:  # the cells after the last whole block keep their place
                number = feistel(number // block, n_blocks, stream(seed, turn, group, BLOCKS)) * block + number % block
            rotation = below(stream(seed, turn, group, ROTATION) >> np.uint64(32), size)
            groups[i], numbers[i], times[i] = group, (number + rotation) % size, turn
            i += 1
    return groups, numbers, times
