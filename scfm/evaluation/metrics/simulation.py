"""Scores of simulated cells against real ones; compare with held-out cells, for a copy of the input scores best."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def normalised(counts: NDArray) -> NDArray[np.float64]:
    """Return log(1 + counts per 10,000) of cells (n, G)."""
    totals = counts.sum(1, keepdims=True)
    return np.log1p(counts / np.where(totals > 0, totals, 1) * 1e4)


def distribution_distance(real: NDArray, simulated: NDArray) -> dict[str, float]:
    """Return the Kolmogorov-Smirnov and Wasserstein distances of a summary's two distributions."""
    from scipy.stats import ks_2samp, wasserstein_distance

    return {
        "ks": float(ks_2samp(real, simulated).statistic),
        "wasserstein": float(wasserstein_distance(real, simulated)),
    }


def summaries(counts: NDArray) -> dict[str, NDArray[np.float64]]:
    """Return what simulators are compared on: mean, variance and zeros per gene (G,), totals and zeros per cell."""
    expression = normalised(counts)
    return {
        "gene_mean": expression.mean(0),
        "gene_var": expression.var(0, ddof=1),
        "gene_zero": (counts == 0).mean(0),
        "cell_lib": np.log1p(counts.sum(1)),
        "cell_zero": (counts == 0).mean(1),
    }


def maximum_mean_discrepancy(x: NDArray, y: NDArray) -> float:
    """Return the squared MMD of two sets of cells (n, d), (m, d) under exp(-d^2 / median d^2 of all pairs)."""
    from scipy.spatial.distance import cdist

    both = np.vstack([x, y])
    squared = cdist(both, both, "sqeuclidean")
    kernel = np.exp(-squared / np.median(squared[squared > 0]))
    n = len(x)
    return float(kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean())


def gene_correlations(expression: NDArray) -> NDArray[np.float64]:
    """Return the correlations of all pairs of genes, the upper triangle of (G, G), flat."""
    return np.corrcoef(expression, rowvar=False)[np.triu_indices(expression.shape[1], 1)]
