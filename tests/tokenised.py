"""Cells of a small vocabulary as tokens, for tests of what a token is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scfm.data.store import CellBlock, CellStore, ValueKind
from scfm.data.tokens import TokenConfig, Tokeniser
from scfm.data.vocabulary import Gene, Vocabulary

N_GENES = 300
VOCABULARY = Vocabulary.from_genes(Gene.of(None, f"G{i:03d}") for i in range(N_GENES))


def store_of(dense: np.ndarray, blocks: int = 1) -> CellStore:
    """A store of these cells, cut into blocks."""
    parts = []
    for part in np.array_split(dense, blocks):
        rows, genes = part.nonzero()
        offsets = np.searchsorted(rows, np.arange(len(part) + 1)).astype(np.int32)
        parts.append(CellBlock(offsets, genes.astype(np.uint16), part[rows, genes]))
    kind: ValueKind = "normalised" if dense.dtype.kind == "f" else "counts"
    return CellStore(VOCABULARY, kind, parts)


@dataclass
class Tokens:
    genes: np.ndarray
    values: np.ndarray
    targets: np.ndarray
    n_unknown: int


def tokens_of(config: TokenConfig, store: CellStore, rows: list[int], epoch: int = 0) -> list[Tokens]:
    """Tokenise some cells keyed by their row, written back to back behind seven tokens of room."""
    tokeniser = Tokeniser(config, VOCABULARY, store.value_kind)
    asked = np.array(rows, np.int64)
    keys = asked.astype(np.uint64)
    lengths, n_unknown = tokeniser.plan(store, asked, keys, epoch)
    starts = 7 + np.cumsum(lengths, dtype=np.int64) - lengths
    n_tokens = 7 + lengths.sum()
    genes = np.full(n_tokens, -9, np.int32)
    values, targets = np.full(n_tokens, -9, np.float32), np.full(n_tokens, -9, np.float32)
    tokeniser.fill(store, asked, keys, epoch, starts, lengths, n_unknown, genes, values, targets)
    assert (genes[:7] == -9).all(), "tokens were written before the first cell"
    assert (genes[7:] >= 0).all(), "some token was left out"
    return [
        Tokens(genes[at : at + n], values[at : at + n], targets[at : at + n], int(unknown))
        for at, n, unknown in zip(starts, lengths, n_unknown, strict=True)
    ]
