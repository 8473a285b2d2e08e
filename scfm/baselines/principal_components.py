"""Whitened principal components of standardised genes, from a matrix that stays sparse."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scfm.baselines.rank_scores import ShiftedRows

DENSE_UP_TO = 500  # cells or genes for which all directions are found at once, exactly, as scikit-learn's PCA does
SPARE = 10  # directions carried along, so that the last wanted ones settle as well
ROUNDS = 4  # what scikit-learn's PCA, which the original used, takes for this many components


@dataclass(frozen=True)
class WhitenedComponents:
    """Genes to mean 0 and variance 1, rotated to principal components of variance 1, as the training cells have them.

    Attributes:
        mean: (G,) training means.
        rotation: (G, k) from centred genes to whitened components, the division by standard deviations included.
    """

    mean: NDArray[np.floating]
    rotation: NDArray[np.floating]

    @classmethod
    def fit(cls, cells: ShiftedRows, components: int, seed: int = 0) -> WhitenedComponents:
        """Find at most `components` directions; fewer where the cells or genes have no more.

        For many cells and genes they come from a randomised subspace iteration that only multiplies with the sparse
        matrix; for few, or where most directions are wanted, from a dense decomposition.
        """
        n, genes = cells.shape
        mean, variance = cells.column_moments()
        # a gene that never varies is 0 after centring whatever it is divided by
        scale = np.sqrt(np.where(variance > 1e-20 * (1 + mean**2), variance, 1))
        components = max(1, min(components, n - 1, genes))
        if min(n, genes) <= DENSE_UP_TO or 3 * components >= min(n, genes):
            values, directions = np.linalg.svd((cells.dense() - mean) / scale, full_matrices=False)[1:]
            values, directions = values[:components], directions[:components].T
        else:
            values, directions = _largest(cells, mean, scale, components, seed)
        # beyond the rank of the matrix there is only rounding, which whitening would blow up to variance 1
        kept = values > values.max(initial=0) * max(n, genes) * np.finfo(np.float64).eps
        whitened = directions[:, kept] * (np.sqrt(n - 1) / values[kept])
        return cls(mean, whitened / scale[:, None])

    def transform(self, cells: ShiftedRows) -> NDArray[np.floating]:
        """Return the whitened components of cells, (n, k)."""
        return cells.times(self.rotation) - self.mean @ self.rotation


def _largest(
    cells: ShiftedRows, mean: NDArray[np.floating], scale: NDArray[np.floating], components: int, seed: int
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Return the largest singular values and right vectors by subspace iteration (Halko, Martinsson, Tropp 2011)."""
    # single precision in the products, which take all the time: half the memory to read
    single = ShiftedRows(cells.sparse.astype(np.float32), cells.shift.astype(np.float32))
    mean, scale = mean.astype(np.float32), scale.astype(np.float32)

    def forward(directions: NDArray[np.floating]) -> NDArray[np.floating]:
        scaled = directions / scale[:, None]
        return single.times(scaled) - mean @ scaled

    def backward(vectors: NDArray[np.floating]) -> NDArray[np.floating]:
        return (single.transposed_times(vectors) - np.outer(mean, vectors.sum(axis=0))) / scale[:, None]

    width = components + SPARE
    directions = np.random.default_rng(seed).standard_normal((len(mean), width), dtype=np.float32)
    for _ in range(ROUNDS):
        directions = np.linalg.qr(backward(np.linalg.qr(forward(directions))[0]))[0]
    basis = np.linalg.qr(forward(directions))[0]
    _, values, rotation = np.linalg.svd(backward(basis).T.astype(np.float64), full_matrices=False)
    return values[:components], rotation[:components].T
