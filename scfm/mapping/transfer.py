"""What neighbours say: labels by a vote that distance weighs, and the distance beyond which they say nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ENOUGH = 20  # sampled cells of a label: fewer do not show how far its cells lie apart


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


def farthest_known(
    remote: NDArray[np.float32], codes: NDArray[np.int32], n_labels: int, known_share: float
) -> NDArray[np.float64]:
    """Return, for each label (C,), the remoteness that a share of its cells in the reference stays within.

    Types differ in how far apart their cells lie. A label of few sampled cells gets the limit of the whole reference.

    Args:
        remote: (s,) remoteness of a sample of the reference from its other cells.
        codes: (s,) their labels.
        n_labels: C.
        known_share: 0.95 calls one of twenty cells like the reference's own unassigned.
    """
    limits = np.full(n_labels, np.quantile(remote, known_share, method="inverted_cdf"), np.float64)
    for code in np.flatnonzero(np.bincount(codes, minlength=n_labels) >= ENOUGH):
        limits[code] = np.quantile(remote[codes == code], known_share, method="inverted_cdf")
    return limits
