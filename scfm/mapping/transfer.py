"""What neighbours say: labels by a vote that distance weighs, and the distance beyond which they say nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def votes(distances: NDArray[np.float32], codes: NDArray[np.int32], n_labels: int) -> NDArray[np.float64]:
    """Return each label's share of the neighbours' weight, (n, C); rows without a neighbour are 0.

    A neighbour weighs exp(-d²/2h²), h the mean distance of the query's own neighbours: near ones count more, and it
    does not matter how far apart cells lie in this embedding.

    Args:
        distances: (n, k) ascending, infinite where there is no neighbour.
        codes: (n, k) label of each neighbour, -1 where there is none.
        n_labels: C.
    """
    there = codes >= 0
    squared = np.where(there, distances, 0).astype(np.float64) ** 2
    spread = np.where(there, distances, 0).astype(np.float64).sum(1) / np.maximum(there.sum(1), 1)
    scale = np.where(spread > 0, 2 * spread**2, 1)[:, None]
    weights = np.where(there, np.exp(-squared / scale), 0)
    shares = np.zeros((len(codes), n_labels))
    of, _ = np.nonzero(there)
    np.add.at(shares, (of, codes[there]), weights[there])
    return shares / np.maximum(shares.sum(1, keepdims=True), np.finfo(float).tiny)


def remoteness(distances: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """Return the mean distance to the k nearest of (n, K >= k) neighbours: infinite where one is missing."""
    return distances[:, :k].mean(axis=1)


def farthest_known(distances: NDArray[np.float32], k: int, known_share: float) -> float:
    """Return the remoteness that a share of the reference's own cells stays within.

    Args:
        distances: (s, K) leave-one-out distances of a sample of the reference.
        k: neighbours that are counted.
        known_share: 0.99 calls one of a hundred cells like the reference's own unassigned.
    """
    return float(np.quantile(remoteness(distances, k), known_share, method="inverted_cdf"))
