"""Exact nearest neighbours among many stored vectors, in blocks: bounded memory, and the same answer in any block size.

Vectors are float16. A block's distances are first computed in float32 as one matrix product, with faiss where it is
installed. All pairs that may belong to the k nearest, given the largest error that float32 sums can have, are then
computed again in float64 from the differences. So neither the blocks, nor the threads, nor faiss decide who is near,
and rows at the same distance come in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

QUERIES_AT_ONCE = 1024
ROWS_AT_ONCE = 4096
PAIRS_AT_ONCE = 2048
SPARE = 8  # neighbours asked of faiss beyond k, so that a tie at the k-th is seen

Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]


def faiss_is_installed() -> bool:
    """Say whether faiss can be imported."""
    return find_spec("faiss") is not None


def nearest(
    queries: NDArray[np.float16],
    parts: Sequence[NDArray[np.float16]],
    k: int,
    *,
    apart: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
    with_faiss: bool | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the k nearest stored vectors of each query: Euclidean distances (n, k), ascending, and rows (n, k).

    Rows count through all parts. Where there are fewer than k, the distance is infinite and the row -1.

    Args:
        queries: (n, D).
        parts: stored vectors, (m_i, D) each; memory-mapped ones are read block by block.
        k: neighbours.
        apart: group of each query (n,) and of each stored vector (all rows,): those of a query's own group are passed
            over. With row numbers as groups a stored vector never finds itself.
        with_faiss: whether faiss finds the candidates; if not given, where it is installed.
    """
    use_faiss = faiss_is_installed() if with_faiss is None else with_faiss
    distances = np.empty((len(queries), k), np.float32)
    rows = np.empty((len(queries), k), np.int64)
    for first in range(0, len(queries), QUERIES_AT_ONCE):
        some = slice(first, first + QUERIES_AT_ONCE)
        best = Best(queries[some], k)
        start = 0
        for part in parts:
            for begin in range(0, len(part), ROWS_AT_ONCE):
                block = np.asarray(part[begin : begin + ROWS_AT_ONCE])
                row = start + begin
                same = None
                if apart is not None:
                    same = apart[0][some, None] == apart[1][None, row : row + len(block)]
                best.take(block, row, same, use_faiss and same is None)
            start += len(part)
        distances[some], rows[some] = np.sqrt(best.squared), best.rows
    return distances, rows


class Best:
    """The k nearest rows found so far for some queries, by exact squared distance, then by row."""

    def __init__(self, queries: NDArray[np.float16], k: int) -> None:
        self.queries = np.ascontiguousarray(queries, np.float32)
        self.lengths = np.einsum("nd,nd->n", self.queries, self.queries)  # squared
        self.k = k
        self.squared = np.full((len(queries), k), np.inf)
        self.rows = np.full((len(queries), k), -1, np.int64)

    def take(self, block: NDArray[np.float16], row: int, same: NDArray[np.bool_] | None, use_faiss: bool) -> None:
        """Take the rows of a block, whose first one is `row`; `same` (n, m) are pairs that are passed over."""
        wide = block.astype(np.float32)
        lengths = np.einsum("md,md->m", wide, wide)
        # a float32 sum of D products is off by less than D roundings, in whatever order it is taken
        slack = (wide.shape[1] + 8) * np.finfo(np.float32).eps * (self.lengths + lengths.max(initial=0))
        near = self.near_by_faiss if use_faiss and len(block) > self.k + SPARE else self.near
        of, at = near(np.arange(len(self.queries)), wide, lengths, slack, same)
        for first in range(0, len(of), PAIRS_AT_ONCE):  # of a query's pairs it does not matter which come together
            pairs = slice(first, first + PAIRS_AT_ONCE)
            difference = self.queries[of[pairs]].astype(np.float64) - wide[at[pairs]]
            self.merge(of[pairs], at[pairs] + row, (difference * difference).sum(axis=1))

    def near(
        self,
        some: NDArray[np.int64],
        wide: NDArray[np.float32],
        lengths: NDArray[np.float32],
        slack: NDArray[np.float32],
        same: NDArray[np.bool_] | None,
    ) -> Pairs:
        """Return the pairs (query, row of the block) that may be among the k nearest, for some of the queries."""
        roughly = self.queries[some] @ wide.T
        roughly *= -2
        roughly += self.lengths[some, None]
        roughly += lengths
        if same is not None:
            roughly[same[some]] = np.inf
        limit = self.squared[some, -1] + slack[some]
        close = roughly <= limit[:, None]
        crowded = np.flatnonzero(close.sum(axis=1) > 2 * self.k)
        if len(crowded):  # more than can be kept: the block's own k-th is a closer limit
            own = np.partition(roughly[crowded], self.k - 1, axis=1)[:, self.k - 1] + 2 * slack[some[crowded]]
            close[crowded] = roughly[crowded] <= np.minimum(own, limit[crowded])[:, None]
        if same is not None:
            close &= ~same[some]
        of, at = np.nonzero(close)
        return some[of], at

    def near_by_faiss(
        self,
        some: NDArray[np.int64],
        wide: NDArray[np.float32],
        lengths: NDArray[np.float32],
        slack: NDArray[np.float32],
        same: NDArray[np.bool_] | None,
    ) -> Pairs:
        """As `near`, for all queries, with faiss; where its answer may leave out a tie, without."""
        import faiss

        roughly, at = faiss.knn(self.queries[some], wide, self.k + SPARE)
        limit = np.minimum(self.squared[some, -1] + slack[some], roughly[:, self.k - 1] + 2 * slack[some])
        of, place = np.nonzero((roughly <= limit[:, None]) & (roughly[:, -1:] > limit[:, None]))
        again = some[roughly[:, -1] <= limit]
        also_of, also_at = self.near(again, wide, lengths, slack, same)
        return np.concatenate([some[of], also_of]), np.concatenate([at[of, place], also_at])

    def merge(self, of: NDArray[np.int64], rows: NDArray[np.int64], squared: NDArray[np.float64]) -> None:
        """Keep the k nearest of what was found before and of these pairs."""
        queries = np.unique(of)
        of = np.concatenate([np.repeat(queries, self.k), of])
        rows = np.concatenate([self.rows[queries].ravel(), rows])
        squared = np.concatenate([self.squared[queries].ravel(), squared])
        order = np.lexsort((rows, squared, of))
        starts = np.searchsorted(of[order], queries)
        kept = order[starts[:, None] + np.arange(self.k)]
        self.rows[queries], self.squared[queries] = rows[kept], squared[kept]
