"""Scores of predicted expression after a perturbation: always of the change, against two references.

Profiles are means over the cells of a condition, (G,). Raw correlation with expression is useless: the unperturbed
profile scores above 0.9; the change against control still rewards what all perturbations share, so the change against
the mean of all perturbations stands beside it (Systema, Viñas Torné et al. 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray


def pearson(x: NDArray, y: NDArray) -> float:
    """Return Pearson's correlation of two vectors (n,); NaN where one of them is constant."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    # rounding leaves a constant vector with a spread of its own, and a correlation that means nothing
    if len(x) < 2 or np.ptp(x) <= 1e-12 * np.abs(x).max() or np.ptp(y) <= 1e-12 * np.abs(y).max():
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x: NDArray, y: NDArray) -> float:
    """Return Spearman's rank correlation of two vectors (n,), ties at their mean rank; NaN where one is constant."""
    from scipy.stats import rankdata

    return pearson(rankdata(x), rankdata(y))


def pearson_delta(predicted: NDArray, truth: NDArray, reference: NDArray) -> float:
    """Return the correlation of predicted and true change (G,) against a reference profile."""
    return pearson(predicted - reference, truth - reference)


def direction_accuracy(predicted: NDArray, truth: NDArray, reference: NDArray) -> float:
    """Return the share of genes whose change against the reference has the right sign (+, 0 or -)."""
    return float((np.sign(predicted - reference) == np.sign(truth - reference)).mean())


def opposite_direction(predicted: NDArray, truth: NDArray, reference: NDArray) -> float:
    """Return the share of genes predicted to change the other way."""
    return float((np.sign(predicted - reference) * np.sign(truth - reference) < 0).mean())


def within_one_sd(predicted: NDArray, cells: NDArray) -> float:
    """Return the share of genes predicted within one standard deviation of the true cells' mean.

    Genes that do not vary in the true cells (m, G) are left out, as GEARS does.
    """
    sd = cells.std(0)
    varies = sd > 0
    return float((np.abs(predicted - cells.mean(0))[varies] / sd[varies] < 1).mean())


def centroid_accuracy(predicted: NDArray, truths: Mapping[str, NDArray], condition: str) -> float:
    """Return the share of other conditions whose true profile is farther from the prediction than the right one.

    0.5 is chance; a profile that fits all perturbations cannot do better (Systema).
    """
    own = np.linalg.norm(predicted - truths[condition])
    others = [np.linalg.norm(predicted - profile) for name, profile in truths.items() if name != condition]
    return float(np.mean([own < other for other in others]))


def discrimination(
    predicted: Mapping[str, NDArray], truths: Mapping[str, NDArray], metric: Literal["l1", "l2", "cosine"]
) -> dict[str, float]:
    """Return per condition 1 - rank / n of the right true profile among all by nearness to the prediction (cell-eval).

    Profiles are changes or expression (G,); 1 where the right one is nearest.
    """
    from scipy.spatial.distance import cdist

    names = list(truths)
    distances = cdist(
        np.stack([predicted[name] for name in names]),
        np.stack([truths[name] for name in names]),
        metric={"l1": "cityblock", "l2": "euclidean", "cosine": "cosine"}[metric],
    )
    rank = (distances < np.diag(distances)[:, None]).sum(1)
    return {name: float(1 - rank[k] / len(names)) for k, name in enumerate(names)}


def energy_distance(x: NDArray, y: NDArray) -> float:
    """Return 2 mean d(x, y) - mean d(x, x') - mean d(y, y') of two sets of cells (n, d), (m, d), Euclidean distances.

    A cell's distance to itself is counted, so two samples of the same cells come out a little above 0.
    """
    from sklearn.metrics import pairwise_distances

    between, in_x, in_y = (float(pairwise_distances(*pair).mean()) for pair in ((x, y), (x, x), (y, y)))
    return 2 * between - in_x - in_y
