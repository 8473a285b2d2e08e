"""From the sparse rows of a store to tokens: bins, sampled genes, known and unknown ones, written into flat arrays.

A cell's tokens depend on its values, its key, the seed and the epoch, and on nothing else: not on its batch mates, not
on the number of threads or processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numba import njit
from numpy.typing import NDArray

from scfm.data.binning import bin_counts, bin_reals
from scfm.data.random import CHOICE, RATIO, TIES, below, draw32, stream
from scfm.data.store import CellBlock, Rows, ValueKind
from scfm.data.vocabulary import Vocabulary
from scfm.errors import ScfmError

Specials = tuple[int, float, float]  # id of <cls>, its value, the value that hides
Plans = tuple[NDArray, NDArray, NDArray, NDArray]  # per cell: first token, tokens, unknown genes, stream of draws
FEW_BINS = 512
Scratch = tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32]]


@dataclass(frozen=True)
class TokenConfig:
    """How cells become tokens; the fields mean what they mean in the recipe's `data` section."""

    genes: Literal["expressed", "all"] = "expressed"
    max_genes: int = 1199
    values: Literal["binned", "log2", "raw"] = "binned"
    n_bins: int = 51
    tie_policy: Literal["left", "random"] = "left"
    mask_ratios: Sequence[float] = field(default_factory=lambda: (0.25, 0.5, 0.75))
    cls_value: float = -2.0
    mask_value: float = -1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 3 <= self.n_bins <= 65536:
            raise ScfmError(f"data.n_bins: {self.n_bins} must lie between 3 and 65536")
        if not self.mask_ratios or not all(0 <= ratio < 1 for ratio in self.mask_ratios):
            raise ScfmError(f"data.mask_ratios: {list(self.mask_ratios)} must name at least one ratio, each in [0, 1)")

    @property
    def hides(self) -> bool:
        """Whether any gene is unknown."""
        return any(ratio > 0 for ratio in self.mask_ratios)


class Tokeniser:
    """Writes the tokens of cells: `<cls>`, the known genes, then the unknown ones, each in ascending id.

    Args:
        config: how cells become tokens.
        vocabulary: what the gene ids mean.
        value_kind: raw counts, which are binned by counting, or normalised values.
        gene_conditions: name -> (len(vocabulary),) condition index of every gene and special token.

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
        self.longest = min(config.max_genes, vocabulary.n_genes) + 1
        self.levels: NDArray[np.float32] | None = None
        if config.values == "binned" and config.n_bins <= FEW_BINS:
            seen = [*range(config.n_bins), config.cls_value, config.mask_value]
            self.levels = np.unique(np.asarray(seen, np.float32))

    def plan(
        self, store: Rows, rows: NDArray[np.int64], keys: NDArray[np.uint64], epoch: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the tokens of each cell, `<cls>` included, and how many of its genes are unknown, (n,) int32 each."""
        if self.config.genes == "all":
            available = np.full(len(rows), self.vocabulary.n_genes, np.int32)
        else:
            available = store.n_genes(rows)
        kept = np.minimum(available, np.int32(self.config.max_genes))
        return kept + np.int32(1), _count_unknown(kept, self._ratios, keys, self.config.seed, epoch)

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
            values: (T,) bins, or the values of the store; `cls_value` at `<cls>`, `mask_value` at unknown genes.
            targets: (T,) the true ones; may be `values` itself where nothing is hidden.
        """
        config = self.config
        tie_streams = _streams(keys, config.seed, epoch, TIES)
        choice_streams = _streams(keys, config.seed, epoch, CHOICE)
        specials = (self.vocabulary.cls, config.cls_value, config.mask_value)
        every_gene = np.arange(self.vocabulary.n_genes if config.genes == "all" else 0)
        for block, cells, places in store.parts(rows):
            sizes = block.offsets[places + 1] - block.offsets[places]
            plans = (starts[cells], lengths[cells], n_unknown[cells], choice_streams[cells])
            if config.values == "raw":
                read, read_starts = block.values, block.offsets[places].astype(np.int64)
            else:
                read_starts = np.cumsum(sizes, dtype=np.int64) - sizes
                read = self._bins(block, places, tie_streams[cells], read_starts, sizes.sum())
            at = (block.offsets, block.genes, places)
            _write(*at, read_starts, read, every_gene, plans, specials, genes, values, targets)

    def _bins(
        self,
        block: CellBlock,
        places: NDArray[np.int64],
        tie_streams: NDArray[np.uint64],
        starts: NDArray[np.int64],
        n_values: int,
    ) -> NDArray[np.uint16]:
        """Return the bins of some cells of a block, those of cell i from starts[i] on."""
        bins = np.empty(n_values, np.uint16)
        bin_rows = bin_counts if self.value_kind == "counts" else bin_reals
        spread = self.config.tie_policy == "random"
        bin_rows(block.offsets, block.values, places, self._quantiles, spread, tie_streams, starts, bins)
        return bins

    def conditions_of(self, genes: NDArray[np.int32]) -> dict[str, NDArray[np.int64]]:
        """Return name -> (T,) condition index of each token."""
        return {name: table[genes] for name, table in self.gene_conditions.items()}


@njit(nogil=True, cache=True)
def _streams(keys: NDArray[np.uint64], seed: int, epoch: int, purpose: int) -> NDArray[np.uint64]:
    streams = np.empty(len(keys), np.uint64)
    for i in range(len(keys)):
        streams[i] = stream(seed, epoch, keys[i], purpose)
    return streams


@njit(nogil=True, cache=True)
def _count_unknown(
    kept: NDArray[np.int32], ratios: NDArray[np.float64], keys: NDArray[np.uint64], seed: int, epoch: int
) -> NDArray[np.int32]:
    """Return int(genes * ratio) of each cell, its ratio drawn from the given ones."""
    unknown = np.empty(len(kept), np.int32)
    for i in range(len(kept)):
        drawn = below(draw32(stream(seed, epoch, keys[i], RATIO), 0), len(ratios))
        unknown[i] = int(kept[i] * ratios[drawn])
    return unknown


@njit(nogil=True, cache=True)
def _split(
    n: int,
    known: int,
    unknown: int,
    choice_stream: int,
    chances: NDArray[np.uint32],
    first: NDArray[np.uint32],
    second: NDArray[np.uint32],
) -> None:
    """Draw which of n genes are known and which unknown, and list their places, ascending, in `first` and `second`.

    One pass decides each gene by the room that is left, so that the numbers come out exactly (selection sampling:
    Knuth, The Art of Computer Programming, 3.4.2, algorithm S). The draws come first, in a loop that vectorises. Every
    gene is written to both lists and stays only where its list moves on, because a branch would be mispredicted half
    the time; so a list needs one element of slack.
    """
    for t in range(n):
        chances[t] = below(draw32(choice_stream, t), n - t)
    room_known, room = known, known + unknown
    at_known, at_unknown = 0, 0
    for t in range(n):
        chance = int(chances[t])
        is_known, is_kept = int(chance < room_known), int(chance < room)
        first[at_known], second[at_unknown] = t, t
        room_known -= is_known
        room -= is_kept
        at_known += is_known
        at_unknown += is_kept - is_known


@njit(nogil=True, cache=True)
def _scratch(most_genes: int, most_tokens: int) -> Scratch:
    """Return the arrays that `_split` works in: the chances of a cell's genes, and the lists of its tokens."""
    lists = np.empty((2, most_tokens), np.uint32)
    return np.empty(most_genes, np.uint32), lists[0], lists[1]


@njit(nogil=True, cache=True)
def _write_cell(
    ids: NDArray,
    read: NDArray,
    unknown: int,
    choice_stream: int,
    specials: Specials,
    scratch: Scratch,
    genes: NDArray,
    values: NDArray,
    targets: NDArray,
) -> None:
    """Fill the tokens of one cell: `<cls>`, then a random part of the genes as known, and another as unknown."""
    cls, cls_value, mask_value = specials
    chances, first, second = scratch
    genes[0], values[0], targets[0] = cls, cls_value, cls_value
    known = len(genes) - 1 - unknown
    if known == len(ids):
        for t in range(known):
            genes[1 + t], values[1 + t], targets[1 + t] = ids[t], read[t], read[t]
        return
    _split(len(ids), known, unknown, choice_stream, chances, first, second)
    for j in range(known):
        t = first[j]
        genes[1 + j], values[1 + j], targets[1 + j] = ids[t], read[t], read[t]
    genes, values, targets = genes[1 + known :], values[1 + known :], targets[1 + known :]
    for j in range(unknown):
        t = second[j]
        genes[j], values[j], targets[j] = ids[t], mask_value, read[t]


@njit(nogil=True, cache=True)
def _write(
    offsets: NDArray,
    ids: NDArray,
    rows: NDArray,
    read_starts: NDArray,
    read: NDArray,
    every_gene: NDArray,
    plans: Plans,
    specials: Specials,
    genes: NDArray,
    values: NDArray,
    targets: NDArray,
) -> None:
    """Write cells from their expressed genes, or from `every_gene` where it has any; what is not expressed is 0."""
    starts, lengths, n_unknown, streams = plans
    scratch = _scratch(max((offsets[rows + 1] - offsets[rows]).max(), len(every_gene)), lengths.max())
    every_value = np.empty(len(every_gene), read.dtype)
    for i in range(len(rows)):
        row_ids = ids[offsets[rows[i]] : offsets[rows[i] + 1]]
        row = read[read_starts[i] : read_starts[i] + len(row_ids)]
        out = slice(starts[i], starts[i] + lengths[i])
        to = genes[out], values[out], targets[out]
        if len(every_gene):
            every_value[:] = 0
            for t in range(len(row)):
                every_value[row_ids[t]] = row[t]
            _write_cell(every_gene, every_value, n_unknown[i], streams[i], specials, scratch, *to)
        else:
            _write_cell(row_ids, row, n_unknown[i], streams[i], specials, scratch, *to)
