"""Shuffling more cells than fit in memory: deal them into buckets on disk, then permute each bucket in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scfm.data.expression import joined, take_cells
from scfm.data.store import CellBlock

VALUES_HELD = 2**23

Codes = dict[str, NDArray[np.integer]]


@dataclass
class Buckets:
    """Cells on their way into shards, one bucket for each shard.

    Shuffled, every stretch of cells is dealt evenly over all buckets, so each is a fair sample of the whole and sizes
    differ by one cell; kept in order, a bucket is filled before the next is begun.

    Attributes:
        directory: where the buckets lie; an existing directory.
        cells_per_bucket: size of a bucket where the order is kept.
        n_buckets: number of buckets, where cells are shuffled.
        seed: of the shuffling; None keeps the order.
    """

    directory: Path
    cells_per_bucket: int
    n_buckets: int
    seed: int | None
    n_cells: int = field(default=0, init=False)
    _held: list[tuple[CellBlock, Codes]] = field(default_factory=list, init=False)

    def add(self, block: CellBlock, codes: Mapping[str, NDArray[np.integer]]) -> None:
        """Take cells in, with their obs codes (n,)."""
        self._held.append((block, dict(codes)))
        if sum(len(block.genes) for block, _ in self._held) >= VALUES_HELD:
            self._deal()

    def shards(self) -> Iterator[tuple[CellBlock, Codes]]:
        """Yield the cells of each bucket, once all are added, and remove it from disk."""
        for path in sorted(self.directory.iterdir()):
            block, codes = _read(path)
            path.unlink()
            if self.seed is not None:
                rows = np.random.default_rng([self.seed, int(path.stem)]).permutation(block.n_cells)
                block, codes = take_cells(block, rows), {name: column[rows] for name, column in codes.items()}
            yield block, codes

    def close(self) -> int:
        """Deal the cells that are still held, and return the number of buckets that hold any."""
        if self._held:
            self._deal()
        return len(list(self.directory.iterdir()))

    def _deal(self) -> None:
        block, codes = _together(self._held)
        self._held = []
        place = self.n_cells + np.arange(block.n_cells)
        if self.seed is None:
            bucket = place // self.cells_per_bucket
        else:
            # The first cell's number keys the draw, so that no two stretches are dealt alike.
            bucket = np.random.default_rng([self.seed, 0, self.n_cells]).permutation(place) % self.n_buckets
        self.n_cells += block.n_cells
        order = np.argsort(bucket, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(bucket[order])) + 1):
            part = take_cells(block, rows)
            with (self.directory / f"{bucket[rows[0]]:08d}").open("ab") as file:
                np.save(file, np.diff(part.offsets))
                np.save(file, part.genes)
                np.save(file, part.values)
                for name, column in codes.items():
                    np.save(file, np.array(name))
                    np.save(file, column[rows])
                np.save(file, np.array(""))


def _read(path: Path) -> tuple[CellBlock, Codes]:
    parts, size = [], path.stat().st_size
    with path.open("rb") as file:
        while file.tell() < size:
            lengths, genes, values = np.load(file), np.load(file), np.load(file)
            codes: Codes = {}
            while name := str(np.load(file)):
                codes[name] = np.load(file)
            parts.append((CellBlock(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), genes, values), codes))
    return _together(parts)


def _together(parts: list[tuple[CellBlock, Codes]]) -> tuple[CellBlock, Codes]:
    codes = {name: np.concatenate([codes[name] for _, codes in parts]) for name in parts[0][1]}
    return joined([block for block, _ in parts]), codes
