"""Normal scores of the ranks of the genes within a cell, kept sparse: genes that are not seen share one score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix


@dataclass(frozen=True)
class ShiftedRows:
    """The matrix `sparse + shift[:, None]`, (n cells, G genes), without ever making it dense.

    Attributes:
        sparse: (n, G) what each entry has beyond the shift of its row.
        shift: (n,) one value per cell.
    """

    sparse: csr_matrix
    shift: NDArray[np.floating]

    @property
    def shape(self) -> tuple[int, int]:
        return self.sparse.shape

    def columns(self, genes: NDArray[np.int64]) -> ShiftedRows:
        """Return the given genes only, (n, len(genes))."""
        return ShiftedRows(self.sparse[:, genes].tocsr(), self.shift)

    def times(self, vectors: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return the matrix times (G,) or (G, k)."""
        return self.sparse @ vectors + _outer(self.shift, vectors.sum(axis=0))

    def transposed_times(self, vectors: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return the transposed matrix times (n,) or (n, k)."""
        return self.sparse.T @ vectors + self.shift @ vectors

    def lengths(self) -> NDArray[np.floating]:
        """Return the Euclidean length of each row, (n,)."""
        genes = self.shape[1]
        squares = np.asarray(self.sparse.multiply(self.sparse).sum(axis=1)).ravel()
        sums = np.asarray(self.sparse.sum(axis=1)).ravel()
        return np.sqrt(np.maximum(squares + 2 * self.shift * sums + genes * self.shift**2, 0))

    def column_squares(self) -> NDArray[np.floating]:
        """Return the sum of squares of each column, (G,)."""
        squares = np.asarray(self.sparse.multiply(self.sparse).sum(axis=0)).ravel()
        return squares + 2 * (self.sparse.T @ self.shift) + (self.shift**2).sum()

    def column_moments(self) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """Return mean and variance (over n) of each column, (G,) each."""
        level = float(self.shift.mean())
        centred = ShiftedRows(self.sparse, self.shift - level)  # or squares cancel where shifts are alike
        n = self.shape[0]
        mean = centred.transposed_times(np.ones(n)) / n
        return mean + level, np.maximum(centred.column_squares() / n - mean**2, 0)

    def dense(self) -> NDArray[np.floating]:
        return self.sparse.toarray() + self.shift[:, None]


def _outer(shift: NDArray[np.floating], sums: NDArray[np.floating]) -> NDArray[np.floating]:
    return shift * sums if np.ndim(sums) == 0 else np.outer(shift, sums)


def rank_scores(expression: csr_matrix) -> ShiftedRows:
    """Return each cell's normal scores: the normal quantile of rank / (G + 1), scaled to a row of unit length.

    Ranks run over all G genes of a cell, equal values share their average rank; so all genes of count zero have one
    score, the row's shift. Only the order of the values matters: counts, fractions and logs of them give the same.
    Nothing is learned from other cells. Formula: Souza and Mehta, arXiv 2602.16696 (first used by scTOP).

    Args:
        expression: (n, G) values of at least 0.
    """
    from scipy.special import ndtri
    from scipy.stats import rankdata

    kept = csr_matrix(expression, dtype=np.float64, copy=True)
    kept.eliminate_zeros()
    n, genes = kept.shape
    # an average of whole ranks is a multiple of one half: every possible score, looked up by twice its rank
    quantiles = ndtri(np.arange(1, 2 * genes + 1) / (2 * (genes + 1)))
    shift = np.zeros(n)
    for row in range(n):
        seen = slice(kept.indptr[row], kept.indptr[row + 1])
        unseen = genes - (seen.stop - seen.start)
        twice = np.rint(2 * (unseen + rankdata(kept.data[seen]))).astype(np.int64)
        scores = quantiles[twice - 1]
        of_unseen = quantiles[unseen] if unseen else 0.0  # twice their average rank is unseen + 1
        # a cell without any count has all genes at the median, score 0: it has no direction to scale to
        length = np.sqrt((scores**2).sum() + unseen * of_unseen**2) or 1.0
        kept.data[seen] = (scores - of_unseen) / length
        shift[row] = of_unseen / length
    return ShiftedRows(kept, shift)
