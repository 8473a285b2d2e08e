"""One pass over the codes and lengths of all cells, and one over the values of all cells or of a sample.

Memory does not grow with the number of cells: what is kept are histograms, and a count per gene and per category.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scfm.compiled import compiled
from scfm.data.hashing import load_hashes
from scfm.data.random import mix64
from scfm.data.store import PART, CellStore
from scfm.inspecting.histogram import CUT, END_WHOLE, FIRST_WHOLE, N_BINS, N_WHOLE, bins_of

RUN = 64  # neighbouring cells of a sample: read together, they cost little more than one
MOST_GROUPS = 1000  # categories for which quantiles are kept: two histograms of 8 KB each
MOST_PAIRS = 2**20
CODES = 100_000  # cells whose codes are in memory at once
HASHES = 2**20

Advance = Callable[[int], object]


@dataclass
class Groups:
    """The cells of each category of an obs column.

    Attributes:
        name: of the column.
        categories: K names.
        cells: (K,) cells.
        held_out: (K,) of these, the cells that are held out.
        missing: cells without a value.
        genes: (K, N_WHOLE) histograms of expressed genes per cell; None where there are too many categories.
        counts: (K, N_WHOLE) histograms of counts per cell, of the sampled cells; None for normalised values too.
    """

    name: str
    categories: list[str]
    cells: NDArray[np.int64]
    held_out: NDArray[np.int64]
    missing: int = 0
    genes: NDArray[np.uint32] | None = None
    counts: NDArray[np.uint32] | None = None


@dataclass
class Measured:
    """What was measured of a shard directory; V genes.

    Attributes:
        cells: cells in all.
        genes_per_cell: (V + 1,) cells that express so many genes.
        groups: by obs column.
        pairs: (S, K) cells of each source and category, by obs column other than source.
        sampled: cells whose values were read.
        run: they were drawn in runs of so many neighbours; 0 where all cells were read.
        gene_cells: (V,) sampled cells that express each gene.
        gene_sums: (V,) sum of its values over them.
        values: (N_BINS,) histogram of their values.
        totals: (N_WHOLE,) histogram of their counts per cell.
        largest: the largest value.
        equal_profiles: cells whose profile another cell has that is counted already; None where hashes are missing.
    """

    cells: int
    genes_per_cell: NDArray[np.int64]
    groups: dict[str, Groups]
    pairs: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    sampled: int = 0
    run: int = 0
    gene_cells: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    gene_sums: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    values: NDArray[np.int64] = field(default_factory=lambda: np.zeros(N_BINS, np.int64))
    totals: NDArray[np.int64] = field(default_factory=lambda: np.zeros(N_WHOLE, np.int64))
    largest: float = 0.0
    equal_profiles: int | None = None


def measure(
    store: CellStore, manifest: dict[str, Any], hashes: Path, sample: int, advance: Advance = lambda cells: None
) -> Measured:
    """Measure a store of mapped shards.

    Args:
        store: as `open_shards` returns it.
        manifest: of its directory.
        hashes: its `cells.hash`.
        sample: cells whose values are read, 0 for all.
        advance: called with the number of cells that a step was about, twice for each cell that is sampled.

    Raises ScfmError that names a damaged cell.
    """
    held_out = (manifest.get("held_out") or {}).get("cells", 0)
    measured = _measure_codes(store, store.n_cells - held_out, advance)
    _measure_values(store, measured, sample, advance)
    measured.equal_profiles = count_equal(load_hashes(hashes)) if hashes.is_file() else None
    return measured


def n_sampled(store: CellStore, sample: int) -> int:
    """Return how many cells are read for a sample that asks for so many."""
    return sum(len(places) for _, places in _sampled_places(store, sample))


def count_equal(hashes: NDArray[np.uint64]) -> int:
    """Return how many of sorted hashes equal the one before them."""
    return sum(
        int((np.diff(hashes[first : first + HASHES + 1].astype(np.uint64)) == 0).sum())
        for first in range(0, len(hashes), HASHES)
    )


def _measure_codes(store: CellStore, held_out_from: int, advance: Advance) -> Measured:
    groups = {}
    for name, column in store.obs.items():
        n = len(column.categories)
        zeros = np.zeros(n, np.int64), np.zeros(n, np.int64)
        groups[name] = Groups(name, column.categories, *zeros)
        if n <= MOST_GROUPS:
            groups[name].genes = np.zeros((n, N_WHOLE), np.uint32)
    measured = Measured(store.n_cells, np.zeros(store.vocabulary.n_genes + 1, np.int64), groups)
    sources = groups["source"].categories if "source" in groups else []
    for name, group in groups.items():
        if name != "source" and 0 < len(sources) * len(group.categories) <= MOST_PAIRS:
            measured.pairs[name] = np.zeros((len(sources), len(group.categories)), np.int64)
    for b, first, last in _stretches(store, CODES):
        places = np.arange(first, last) - store.first_rows[b]
        sizes = store.blocks[b].lengths(places)
        measured.genes_per_cell += np.bincount(sizes, minlength=len(measured.genes_per_cell))
        bins = _whole_bins(sizes)
        codes = {name: np.asarray(store.obs[name].codes[first:last], np.int64) for name in groups}
        start = int(np.clip(held_out_from - first, 0, last - first))
        for name, group in groups.items():
            n = len(group.categories)
            of = codes[name]
            group.cells += np.bincount(of[of >= 0], minlength=n)
            group.held_out += np.bincount(of[start:][of[start:] >= 0], minlength=n)
            group.missing += int((of < 0).sum())
            if group.genes is not None:
                _count_pairs(of, bins, group.genes)
            if name in measured.pairs:
                _count_pairs(codes["source"], of, measured.pairs[name])
        advance(last - first)
    return measured


def _measure_values(store: CellStore, measured: Measured, sample: int, advance: Advance) -> None:
    n_genes = store.vocabulary.n_genes
    measured.gene_cells, measured.gene_sums = np.zeros(n_genes, np.int64), np.zeros(n_genes)
    measured.run = RUN if 0 < sample < store.n_cells else 0
    counted = store.value_kind == "counts"
    for group in measured.groups.values():
        if counted and group.genes is not None:
            group.counts = np.zeros_like(group.genes)
    largest = np.zeros(1)
    for b, places in _sampled_places(store, sample):
        block, inside = store.blocks[b].gather(places)
        totals = np.zeros(len(places))
        _count_values(
            block.offsets,
            block.genes,
            block.values,
            inside,
            measured.gene_cells,
            measured.gene_sums,
            measured.values,
            totals,
            largest,
        )
        measured.sampled += len(places)
        if counted:
            bins = _whole_bins(totals)
            measured.totals += np.bincount(bins[totals > 0], minlength=N_WHOLE)
            rows = store.first_rows[b] + places
            for name, group in measured.groups.items():
                if group.counts is not None:
                    _count_pairs(np.asarray(store.obs[name].codes[rows], np.int64), bins, group.counts)
        advance(len(places))
    measured.largest = float(largest[0])


def _whole_bins(numbers: NDArray) -> NDArray[np.int64]:
    """Return the bins of whole numbers per cell; a cell that has none counts with those that have one."""
    return np.clip(bins_of(np.maximum(numbers, 1)), FIRST_WHOLE, END_WHOLE - 1) - FIRST_WHOLE


def _stretches(store: CellStore, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield all rows as (block, first row, end), no more than `size` at a time."""
    for b, (start, end) in enumerate(itertools.pairwise(store.first_rows.tolist())):
        for first in range(start, end, size):
            yield b, first, min(first + size, end)


def _sampled_places(store: CellStore, sample: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield (block, places in it) of the cells to read, a few thousand at a time.

    The rows are cut into equal stretches, and from each one run is drawn, so that a sample of cells that were not
    shuffled is spread over all of them. A run ends where its block does.
    """
    n = store.n_cells
    if not 0 < sample < n:
        for b, first, last in _stretches(store, PART):
            yield b, np.arange(first, last) - store.first_rows[b]
        return
    n_runs = max(1, -(-sample // RUN))
    edges = np.arange(n_runs + 1, dtype=np.int64) * n // n_runs
    room = np.maximum(edges[1:] - edges[:-1] - RUN + 1, 1)
    draws = np.array([mix64(np.uint64(run)) for run in range(n_runs)], np.uint64)
    starts = edges[:-1] + (draws % room.astype(np.uint64)).astype(np.int64)
    ends = np.minimum(starts + RUN, edges[1:])
    blocks = np.searchsorted(store.first_rows, starts, side="right") - 1
    ends = np.minimum(ends, store.first_rows[blocks + 1])
    for b in np.unique(blocks):
        of_block = np.flatnonzero(blocks == b)
        for some in np.split(of_block, range(PART // RUN, len(of_block), PART // RUN)):
            rows = np.concatenate([np.arange(starts[run], ends[run]) for run in some])
            yield int(b), rows - store.first_rows[b]


@compiled
def _count_pairs(rows: NDArray[np.int64], columns: NDArray[np.int64], table: NDArray) -> None:
    """Add one to the table for each pair of row and column, neither of which is -1."""
    for i in range(len(rows)):
        if rows[i] >= 0 and columns[i] >= 0:
            table[rows[i], columns[i]] += 1


@compiled
def _count_values(
    offsets: NDArray[np.integer],
    genes: NDArray[np.unsignedinteger],
    values: NDArray,
    places: NDArray[np.int64],
    gene_cells: NDArray[np.int64],
    gene_sums: NDArray[np.float64],
    histogram: NDArray[np.int64],
    totals: NDArray[np.float64],
    largest: NDArray[np.float64],
) -> None:
    number = np.empty(1, np.float32)
    bits = number.view(np.int32)
    for i in range(len(places)):
        total = 0.0
        for at in range(offsets[places[i]], offsets[places[i] + 1]):
            value = float(values[at])
            gene_cells[genes[at]] += 1
            gene_sums[genes[at]] += value
            number[0] = value
            histogram[min(bits[0] >> CUT, N_BINS - 1)] += 1
            total += value
            largest[0] = max(largest[0], value)
        totals[i] = total
