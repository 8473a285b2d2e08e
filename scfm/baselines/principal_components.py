"""Whitened principal components of standardised genes, from a matrix that stays sparse."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scfm.baselines.rank_scores import ShiftedRows


@dataclass(frozen=True)
class WhitenedComponents:
    """Genes to mean 0 and variance 1, rotated to principal components of variance 1, as the training cells have them.

    Attributes:
        mean: (G,) training means.
        rotation: (G, k) from centred genes to whitened components, the division by standard deviations included.
    """

    mean: NDArray[np.float64]
    rotation: NDArray[np.float64]

    @classmethod
    def fit(cls, cells: ShiftedRows, components: int, seed: int = 0) -> WhitenedComponents:
        """Find at most `components` directions; fewer where the cells or genes have no more.

        The few largest come from a Lanczos solver that only multiplies with the sparse matrix; most or all of them
        from a dense decomposition.
        """
        n, genes = cells.shape
        mean, variance = cells.column_moments()
        # a gene that never varies is 0 after centring whatever it is divided by
        scale = np.sqrt(np.where(variance > 1e-20 * (1 + mean**2), variance, 1))
        components = max(1, min(components, n - 1, genes))
        if components * DENSE_FROM >= min(n, genes):
            values, directions = np.linalg.svd((cells.dense() - mean) / scale, full_matrices=False)[1:]
            values, directions = values[:components], directions[:components].T
        else:
            values, directions = _largest(cells, mean, scale, components, seed)
        # beyond the rank of the matrix there is only rounding, which whitening would blow up to variance 1
        kept = values > values.max(initial=0) * max(n, genes) * np.finfo(np.float64).eps
        whitened = directions[:, kept] * (np.sqrt(n - 1) / values[kept])
        return cls(mean, whitened / scale[:, None])

    def transform(self, cells: ShiftedRows) -> NDArray[np.float64]:
        """Return the whitened components of cells, (n, k)."""
        return cells.times(self.rotation) - self.mean @ self.rotation


DENSE_FROM = 3  # Lanczos pays while fewer than a third of all directions are wanted


def _largest(
    cells: ShiftedRows, mean: NDArray[np.float64], scale: NDArray[np.float64], components: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    from scipy.sparse.linalg import LinearOperator, svds

    def forward(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        scaled = (vectors.T / scale).T
        return cells.times(scaled) - mean @ scaled

    def backward(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        found = cells.transposed_times(vectors)
        return ((found.T - np.multiply.outer(vectors.sum(axis=0), mean)) / scale).T

    operator = LinearOperator(
        cells.shape, matvec=forward, rmatvec=backward, matmat=forward, rmatmat=backward, dtype=np.float64
    )
    start = np.random.default_rng(seed).standard_normal(min(cells.shape))
    _, values, directions = svds(operator, components, v0=start, return_singular_vectors="vh")
    largest_first = np.argsort(values)[::-1]
    return values[largest_first], directions[largest_first].T
