"""From the sparse rows of a store to tokens: bins, sampled genes, known and unknown ones, written into flat arrays.

A cell's tokens depend on its values, its key, the seed and the epoch, and on nothing else: not on its batch mates, not
on the number of threads or processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from scfm.compiled import compiled
from scfm.data.binning import bin_counts, bin_reals
from scfm.data.log_binning import log2_of_counts, log2_of_reals
from scfm.data.masking import (
    Scratch,
    count_unknown,
    keep,
    scratch_of,
    show,
    split,
    split_expressed,
    streams_of,
)
from scfm.data.random import CHOICE, HIDDEN, SHOWN, TIES
from scfm.data.store import CellBlock, Rows, ValueKind
from scfm.data.vocabulary import Vocabulary
from scfm.errors import ScfmError

Specials = tuple[int, float, float]  # id of <cls>, its value, the value that hides
Plans = tuple[NDArray, NDArray, NDArray]  # per cell: first token, tokens, unknown genes
Streams = tuple[NDArray, NDArray, NDArray]  # per cell: draws of the genes, of those hidden, of those shown all the same
Every = tuple[
    NDArray, NDArray
]  # the genes that all cells have, if so, and the place of each vocabulary gene among them
Hiding = tuple[bool, int]  # whether only expressed genes are hidden; of 2**32 hidden ones, how many show their value
FEW_BINS = 512


@dataclass(frozen=True)
class TokenConfig:
    """How cells become tokens; the fields mean what they mean in the recipe's `data` section."""

    genes: Literal["expressed", "all"] = "expressed"
    max_genes: int = 1199
    values: Literal["binned", "log2", "raw"] = "binned"
    n_bins: int = 51
    tie_policy: Literal["left", "random"] = "left"
    mask_ratios: Sequence[float] = field(default_factory=lambda: (0.25, 0.5, 0.75))
    mask_candidates: Literal["all", "expressed"] = "all"
    mask_kept: float = 0.0
    cls_value: float = -2.0
    mask_value: float = -1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 3 <= self.n_bins <= 65536:
            raise ScfmError(f"data.n_bins: {self.n_bins} must lie between 3 and 65536")
        if not self.mask_ratios or not all(0 <= ratio < 1 for ratio in self.mask_ratios):
            raise ScfmError(f"data.mask_ratios: {list(self.mask_ratios)} must name at least one ratio, each in [0, 1)")
        if not 0 <= self.mask_kept < 1:
            raise ScfmError(f"data.mask_kept: {self.mask_kept} must lie in [0, 1)")

    @property
    def bins(self) -> int | None:
        """How many bins a value can fall into; None for raw values, which have none."""
        return None if self.values == "raw" else self.n_bins

    @property
    def hides(self) -> bool:
        """Whether any gene is unknown."""
        return any(ratio > 0 for ratio in self.mask_ratios)


class Tokeniser:
    """Writes the tokens of cells: `<cls>`, the known genes, then the unknown ones, each in ascending id.

    Args:
        config: how cells become tokens.
        vocabulary: what the gene ids mean.
        value_kind: raw counts, or normalised values; log2 takes these as log2(1 + expression per 10,000) already.
        gene_conditions: name -> (len(vocabulary),) condition index of every gene and special token.
        read: (n,) ascending ids of the genes that `genes: all` means; those of the vocabulary where not given. The
            cells must hold no others (`scfm.data.store.only_genes`): bins are of a cell's values that are read.

    Attributes:
        longest: most tokens that a cell can have.
        levels: (V,) all that a token's value can be, ascending; None where that is not few.
    """

    def __init__(
        self,
        config: TokenConfig,
        vocabulary: Vocabulary,
        value_kind: ValueKind,
        gene_conditions: Mapping[str, NDArray[np.int64]] | None = None,
        read: NDArray[np.int64] | None = None,
    ) -> None:
        self.config = config
        self.vocabulary = vocabulary
        self.value_kind = value_kind
        self.gene_conditions = dict(gene_conditions or {})
        for name, table in self.gene_conditions.items():
            if len(table) != len(vocabulary):
                raise ScfmError(f"gene condition {name}: {len(table)} entries for a vocabulary of {len(vocabulary)}")
        self._quantiles = np.linspace(0, 1, config.n_bins - 1)
        self._ratios = np.asarray(config.mask_ratios, np.float64)
        read = np.arange(vocabulary.n_genes) if read is None else read
        self._place = np.full(vocabulary.n_genes, -1)  # of each gene among those that are read
        self._place[read] = np.arange(len(read))
        self._every_gene = read if config.genes == "all" else read[:0]
        self.longest = min(config.max_genes, len(read)) + 1
        self.levels: NDArray[np.float32] | None = None
        if config.bins is not None and config.bins <= FEW_BINS:
            seen = [*range(config.n_bins), config.cls_value, config.mask_value]
            self.levels = np.unique(np.asarray(seen, np.float32))

    def plan(
        self, store: Rows, rows: NDArray[np.int64], keys: NDArray[np.uint64], epoch: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the tokens of each cell, `<cls>` included, and how many of its genes are unknown, (n,) int32 each."""
        if self.config.genes == "all":
            available = np.full(len(rows), len(self._every_gene), np.int32)
        else:
            available = store.n_genes(rows)
        kept = np.minimum(available, np.int32(self.config.max_genes))
        candidates, only_expressed = kept, self.config.mask_candidates == "expressed"
        if only_expressed and self.config.hides:
            candidates = self._expressed(store, rows, streams_of(keys, self.config.seed, epoch, CHOICE), kept)
        n_unknown = count_unknown(candidates, self._ratios, only_expressed, keys, self.config.seed, epoch)
        return kept + np.int32(1), n_unknown

    def _expressed(
        self, store: Rows, rows: NDArray[np.int64], choice_streams: NDArray[np.uint64], kept: NDArray[np.int32]
    ) -> NDArray[np.int32]:
        """Return how many of the kept genes of each cell have a value that is not 0, (n,)."""
        counts = np.empty(len(rows), np.int32)
        for block, cells, places in store.parts(rows):
            if self.config.values == "log2":
                starts, read = self._log2_bins(block, places)
            else:  # stored values are not 0, and their quantile bins are none either
                starts, read = block.offsets[places].astype(np.int64), block.values
            at = (block.offsets, block.genes, places)
            every = (self._every_gene, self._place)
            counts[cells] = _count_expressed(*at, starts, read, every, kept[cells], choice_streams[cells])
        return counts

    def fill(
        self,
        store: Rows,
        rows: NDArray[np.int64],
        keys: NDArray[np.uint64],
        epoch: int,
        starts: NDArray[np.int64],
        lengths: NDArray[np.int32],
        n_unknown: NDArray[np.int32],
        genes: NDArray[np.int32],
        values: NDArray[np.float32],
        targets: NDArray[np.float32],
    ) -> None:
        """Write each cell's tokens from `starts[i]` on, as many as `plan` said.

        Args:
            store, rows, keys, epoch: as given to `plan`.
            starts: (n,) first token of each cell in the three arrays below.
            lengths, n_unknown: what `plan` returned.
            genes: (T,) ids.
            values: (T,) bins, or the values of the store; `cls_value` at `<cls>`, `mask_value` at unknown genes but for
                the share `mask_kept` of them.
            targets: (T,) the true ones; may be `values` itself where nothing is hidden.
        """
        config = self.config
        tie_streams, *draws = (
            streams_of(keys, config.seed, epoch, purpose) for purpose in (TIES, CHOICE, HIDDEN, SHOWN)
        )
        specials = (self.vocabulary.cls, config.cls_value, config.mask_value)
        hiding = (config.mask_candidates == "expressed", round(config.mask_kept * 2**32))
        for block, cells, places in store.parts(rows):
            read_starts, read = self._read(block, places, tie_streams[cells])
            plans = (starts[cells], lengths[cells], n_unknown[cells])
            of_cells = (draws[0][cells], draws[1][cells], draws[2][cells])
            at = (block.offsets, block.genes, places)
            out = (genes, values, targets)
            every = (self._every_gene, self._place)
            _write(*at, read_starts, read, every, plans, of_cells, specials, hiding, *out)

    def _read(
        self, block: CellBlock, places: NDArray[np.int64], tie_streams: NDArray[np.uint64]
    ) -> tuple[NDArray[np.int64], NDArray]:
        """Return the values of some cells of a block as tokens have them, and before them where each cell's start."""
        if self.config.values == "raw":
            return block.offsets[places].astype(np.int64), block.values
        if self.config.values == "log2":
            return self._log2_bins(block, places)
        starts, bins = _room_for_bins(block, places)
        bin_rows = bin_counts if self.value_kind == "counts" else bin_reals
        spread = self.config.tie_policy == "random"
        bin_rows(block.offsets, block.values, places, self._quantiles, spread, tie_streams, starts, bins)
        return starts, bins

    def _log2_bins(self, block: CellBlock, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
        """As `_read`, for log2."""
        starts, bins = _room_for_bins(block, places)
        bin_rows = log2_of_counts if self.value_kind == "counts" else log2_of_reals
        bin_rows(block.offsets, block.values, places, self.config.n_bins, starts, bins)
        return starts, bins

    def conditions_of(self, genes: NDArray[np.int32]) -> dict[str, NDArray[np.int64]]:
        """Return name -> (T,) condition index of each token."""
        return {name: table[genes] for name, table in self.gene_conditions.items()}


def _room_for_bins(block: CellBlock, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
    """Return where the bins of each cell start, and room for all of them."""
    sizes = block.offsets[places + 1] - block.offsets[places]
    return np.cumsum(sizes, dtype=np.int64) - sizes, np.empty(sizes.sum(), np.uint16)


@compiled
def _write_cell(
    ids: NDArray,
    read: NDArray,
    unknown: int,
    draws: tuple[int, int, int],
    specials: Specials,
    hiding: Hiding,
    scratch: Scratch,
    genes: NDArray,
    values: NDArray,
    targets: NDArray,
) -> None:
    """Fill the tokens of one cell: `<cls>`, then a random part of the genes as known, and another as unknown."""
    cls, cls_value, mask_value = specials
    only_expressed, shown = hiding
    _, first, second = scratch
    genes[0], values[0], targets[0] = cls, cls_value, cls_value
    known = len(genes) - 1 - unknown
    if known == len(ids):
        for t in range(known):
            genes[1 + t], values[1 + t], targets[1 + t] = ids[t], read[t], read[t]
        return
    if only_expressed:
        split_expressed(read, known, unknown, draws[0], draws[1], scratch)
    else:
        split(len(ids), known, unknown, draws[0], scratch)
    # what is the same for both arrays, or for all genes, is written in loops of their own, which vectorise
    for j in range(known):
        t = first[j]
        genes[1 + j], values[1 + j] = ids[t], read[t]
    targets[1 : 1 + known] = values[1 : 1 + known]
    genes, values, targets = genes[1 + known :], values[1 + known :], targets[1 + known :]
    for j in range(unknown):
        t = second[j]
        genes[j], targets[j] = ids[t], read[t]
    values[:] = mask_value
    if shown:
        show(values, targets, second, shown, draws[2])


@compiled
def _write(
    offsets: NDArray,
    ids: NDArray,
    rows: NDArray,
    read_starts: NDArray,
    read: NDArray,
    every: Every,
    plans: Plans,
    streams: Streams,
    specials: Specials,
    hiding: Hiding,
    genes: NDArray,
    values: NDArray,
    targets: NDArray,
) -> None:
    """Write cells from their expressed genes, or from every gene where there are such; what is not expressed is 0."""
    every_gene, place = every
    starts, lengths, n_unknown = plans
    choice_streams, hidden_streams, shown_streams = streams
    scratch = scratch_of(max((offsets[rows + 1] - offsets[rows]).max(), len(every_gene)), lengths.max())
    every_value = np.empty(len(every_gene), read.dtype)
    for i in range(len(rows)):
        row_ids = ids[offsets[rows[i]] : offsets[rows[i] + 1]]
        row = read[read_starts[i] : read_starts[i] + len(row_ids)]
        out = slice(starts[i], starts[i] + lengths[i])
        to = genes[out], values[out], targets[out]
        draws = choice_streams[i], hidden_streams[i], shown_streams[i]
        if len(every_gene):
            _spread(row_ids, row, place, every_value)
            _write_cell(every_gene, every_value, n_unknown[i], draws, specials, hiding, scratch, *to)
        else:
            _write_cell(row_ids, row, n_unknown[i], draws, specials, hiding, scratch, *to)


@compiled
def _spread(row_ids: NDArray, row: NDArray, place: NDArray, every_value: NDArray) -> None:
    """Write the values of a cell's expressed genes among zeros for all others."""
    every_value[:] = 0
    for t in range(len(row)):
        every_value[place[row_ids[t]]] = row[t]


@compiled
def _count_expressed(
    offsets: NDArray,
    ids: NDArray,
    rows: NDArray,
    read_starts: NDArray,
    read: NDArray,
    every: Every,
    kept: NDArray[np.int32],
    choice_streams: NDArray[np.uint64],
) -> NDArray[np.int32]:
    """Return how many of the genes that `_write` keeps of each cell have a value that is not 0."""
    every_gene, place = every
    counts = np.empty(len(rows), np.int32)
    scratch = scratch_of(max((offsets[rows + 1] - offsets[rows]).max(), len(every_gene)), kept.max() + 1)
    every_value = np.empty(len(every_gene), read.dtype)
    for i in range(len(rows)):
        row_ids = ids[offsets[rows[i]] : offsets[rows[i] + 1]]
        row = read[read_starts[i] : read_starts[i] + len(row_ids)]
        if kept[i] == max(len(row), len(every_gene)):
            counts[i] = np.count_nonzero(row)
        elif len(every_gene):
            _spread(row_ids, row, place, every_value)
            counts[i] = keep(every_value, kept[i], choice_streams[i], scratch)
        else:
            counts[i] = keep(row, kept[i], choice_streams[i], scratch)
    return counts
