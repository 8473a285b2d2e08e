"""Scores of imputed expression, on entries that the method did not see."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scfm.errors import ScfmError
from scfm.evaluation.metrics.perturbation import pearson, spearman

GENE_ENTRIES = 5  # a correlation over fewer says nothing


def masked_scores(truth: NDArray, predicted: NDArray, mask: NDArray[np.bool_]) -> dict[str, float]:
    """Score predictions (n, G) on the masked entries alone.

    `mean_gene_pearson`, the correlation within a gene, is the one to read: a method that knows nothing but the mean of
    each gene has a high overall correlation and cosine. Genes with fewer than five masked entries, or constant on
    either side, are left out and `n_genes_used` says how many remain; a correlation with a constant is NaN.

    Raises ScfmError where the shapes differ or nothing is masked.
    """
    if not truth.shape == predicted.shape == mask.shape:
        raise ScfmError(f"truth {truth.shape}, prediction {predicted.shape} and mask {mask.shape} differ in shape")
    if not mask.any():
        raise ScfmError("no entry is masked, so there is nothing to score")
    y, x = truth[mask].astype(np.float64), predicted[mask].astype(np.float64)
    within = [
        pearson(truth[rows, gene], predicted[rows, gene])
        for gene in range(truth.shape[1])
        if len(rows := np.flatnonzero(mask[:, gene])) >= GENE_ENTRIES
    ]
    known = [r for r in within if not np.isnan(r)]
    norm = np.linalg.norm(x) * np.linalg.norm(y)
    return {
        "pearson": pearson(x, y),
        "spearman": spearman(x, y),
        "rmse": float(np.sqrt(np.mean((x - y) ** 2))),
        "mae": float(np.abs(x - y).mean()),
        "median_l1": float(np.median(np.abs(x - y))),
        "cosine": float(x @ y / norm) if norm > 0 else float("nan"),
        "mean_gene_pearson": float(np.mean(known)) if known else float("nan"),
        "n_genes_used": len(known),
    }


def poisson_loss(truth: NDArray, predicted: NDArray) -> float:
    """Return the mean of prediction - truth log(prediction + 1e-6): Poisson negative log likelihood but for a constant.

    Open Problems calls its function of the same form with the two arguments swapped.
    """
    return float(np.mean(predicted - truth * np.log(predicted + 1e-6)))
