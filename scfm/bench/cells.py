"""Synthetic cells for benchmarks: as many genes as 10x cells have, spread alike, and counts that are mostly 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from scfm.data.store import CellBlock, CellStore, ObsColumn
from scfm.data.vocabulary import SPECIALS, Gene, Vocabulary

DISTINCT_CELLS = 8192
CATEGORIES = 4


def synthetic_vocabulary(genes: int) -> Vocabulary:
    """Return a vocabulary of genes that do not exist."""
    return Vocabulary([Gene.of(None, f"G{i:06d}") for i in range(genes)] + [Gene(special) for special in SPECIALS])


def synthetic_block(generator: np.random.Generator, cells: int, genes: int, vocabulary: int) -> CellBlock:
    """Return random cells.

    Depth is lognormal from cell to cell as in 10x data; 70 % of the counts are 1, and a few genes have hundreds.

    Args:
        generator: of the random numbers.
        cells: number of cells.
        genes: mean number of expressed genes in a cell.
        vocabulary: number of genes to choose from.
    """
    spread = 0.43
    sizes = np.clip(generator.lognormal(np.log(genes) - spread**2 / 2, spread, cells), 1, vocabulary).astype(int)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    ids: NDArray[np.uint32] = np.concatenate(
        [np.sort(generator.choice(vocabulary, size, replace=False)) for size in sizes]
    ).astype(np.uint32)
    counts = generator.geometric(0.7, len(ids))
    abundant = generator.random(len(ids)) < 0.005
    counts[abundant] += generator.geometric(0.01, abundant.sum())
    return CellBlock(offsets.astype(np.int32), ids, counts.astype(np.uint32))


def synthetic_store(cells: int, genes: int, vocabulary: int, obs: Sequence[str] = ()) -> CellStore:
    """Return cells in memory.

    At most 8,192 differ, and stand there again and again: their tokens are masked anew each time, and the memory stays
    small.

    Args:
        cells: number of cells.
        genes: mean number of expressed genes in a cell.
        vocabulary: number of genes.
        obs: categorical columns that every cell gets a random value in.
    """
    generator = np.random.default_rng(0)
    times, rest = divmod(cells, DISTINCT_CELLS)
    block = synthetic_block(generator, min(cells, DISTINCT_CELLS), genes, vocabulary)
    blocks = [block] * times
    if rest:
        end = block.offsets[rest]
        blocks.append(CellBlock(block.offsets[: rest + 1], block.genes[:end], block.values[:end]))
    names = [f"category {i}" for i in range(CATEGORIES)]
    columns = {name: ObsColumn(generator.integers(0, CATEGORIES, cells), names) for name in obs}
    return CellStore(synthetic_vocabulary(vocabulary), "counts", blocks, columns, shuffled=True)
