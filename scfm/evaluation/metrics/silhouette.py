"""Silhouettes of cell types and of batches, all from one pass over the distances between cells and groups of cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SILHOUETTE_CELLS = 20_000  # above, n^2 distances cost minutes: a stratified sample stands for the cells


@dataclass(frozen=True)
class GroupDistances:
    """Summed distances (n, G) from every cell to the cells of every group; a group is a type within a batch.

    Attributes:
        sums: (n, G) summed distances.
        sizes: (G,) cells per group.
        group: (n,) group of each cell.
        label_of: (G,) type of each group, as a code.
        labels: the names of the types.
    """

    sums: NDArray[np.float64]
    sizes: NDArray[np.int64]
    group: NDArray[np.int64]
    label_of: NDArray[np.int64]
    labels: NDArray[np.str_]


def stratified_sample(groups: NDArray, n: int, seed: int) -> NDArray[np.int64]:
    """Return about n row indices, ascending: the same share of every group, at least two cells of each (or its one).

    All rows come back where there are n or fewer.
    """
    if len(groups) <= n:
        return np.arange(len(groups))
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    wanted = np.minimum(sizes, np.maximum(2, np.round(sizes * n / len(groups)).astype(np.int64)))
    shuffled = np.random.default_rng(seed).permutation(len(groups))
    by_group = shuffled[np.argsort(group[shuffled], kind="stable")]
    rank = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(by_group[rank < np.repeat(wanted, sizes)])


def group_distances(
    embedding: NDArray, labels: NDArray[np.str_], batches: NDArray[np.str_], metric: Literal["euclidean", "cosine"]
) -> GroupDistances:
    """Sum the distances from each cell (n, d) to the cells of each type within each batch."""
    from sklearn.metrics import pairwise_distances_chunked

    names, label = np.unique(labels, return_inverse=True)
    _, batch = np.unique(batches, return_inverse=True)
    pairs, group = np.unique(label * (batch.max() + 1) + batch, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(pairs)))
    x = np.asarray(embedding, dtype=np.float64)
    sums = np.concatenate(
        [np.add.reduceat(chunk[:, order], starts, axis=1) for chunk in pairwise_distances_chunked(x, metric=metric)]
    )
    return GroupDistances(sums, np.bincount(group), group, pairs // (batch.max() + 1), names)


def _widths(
    own: NDArray, own_size: NDArray, others: NDArray, other_sizes: NDArray, between: Literal["nearest", "mean_other"]
) -> NDArray[np.float64]:
    """Return (b - a) / max(a, b) from summed distances; 0 for the only cell of its cluster, as scikit-learn does."""
    if between == "nearest":
        b = np.min(others / other_sizes, axis=1, initial=np.inf, where=np.isfinite(others))
    else:
        b = np.where(np.isfinite(others), others, 0).sum(1) / np.where(np.isfinite(others), other_sizes, 0).sum(1)
    a = own / np.maximum(own_size - 1, 1)
    widths = np.divide(b - a, np.maximum(a, b), out=np.zeros_like(a), where=np.maximum(a, b) > 0)
    return np.where(own_size > 1, widths, 0.0)


def _silhouette(sums: NDArray, sizes: NDArray, own: NDArray, between: Literal["nearest", "mean_other"]) -> NDArray:
    cell = np.arange(len(sums))
    others = sums.copy()
    others[cell, own] = np.inf
    return _widths(sums[cell, own], sizes[own], others, sizes[None, :], between)


def label_silhouette(distances: GroupDistances) -> NDArray[np.float64]:
    """Return the silhouette width (n,) of each cell among the types, in [-1, 1]."""
    n_labels = len(distances.labels)
    membership = np.zeros((len(distances.sizes), n_labels))
    membership[np.arange(len(distances.sizes)), distances.label_of] = 1
    sizes = (distances.sizes @ membership).astype(np.int64)
    return _silhouette(distances.sums @ membership, sizes, distances.label_of[distances.group], "nearest")


def batch_mixing(distances: GroupDistances, between: Literal["nearest", "mean_other"]) -> float:
    """Return mean over types of the mean over their cells of 1 - |silhouette width of the batch within the type|.

    `nearest` is the batch ASW of scib; `mean_other` (with cosine distances) is BRAS of Rautenstrauch & Ohler 2025.
    A type whose cells all come from one batch, or each from a batch of its own, says nothing; NaN where none is left.
    """
    scores = []
    for label in range(len(distances.labels)):
        groups = np.flatnonzero(distances.label_of == label)
        cells = np.flatnonzero(np.isin(distances.group, groups))
        if 1 < len(groups) < len(cells):
            own = np.searchsorted(groups, distances.group[cells])
            widths = _silhouette(distances.sums[np.ix_(cells, groups)], distances.sizes[groups], own, between)
            scores.append(1 - np.abs(widths).mean())
    return float(np.mean(scores)) if scores else float("nan")


def asw_label(distances: GroupDistances) -> float:
    """Return (mean silhouette width of the types + 1) / 2."""
    return float((label_silhouette(distances).mean() + 1) / 2)


def isolated_labels(labels: NDArray[np.str_], batches: NDArray[np.str_]) -> list[str]:
    """Return the types found in the fewest batches; none where every type is in every batch.

    scib calls all types isolated in that last case, and so scores something else under the same name.
    """
    pairs = np.unique(np.stack([labels, batches]), axis=1)
    names, n_batches = np.unique(pairs[0], return_counts=True)
    if n_batches.min() == len(np.unique(batches)):
        return []
    return [str(name) for name in names[n_batches == n_batches.min()]]


def isolated_label_asw(distances: GroupDistances, isolated: list[str]) -> float:
    """Return the mean over isolated types of (mean silhouette width of its cells + 1) / 2; NaN without any."""
    widths, of = label_silhouette(distances), distances.labels[distances.label_of[distances.group]]
    return float(np.mean([(widths[of == name].mean() + 1) / 2 for name in isolated])) if isolated else float("nan")
