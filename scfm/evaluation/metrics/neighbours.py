"""Scores of the graph of nearest neighbours: clusters that match types, connected types, mixed neighbourhoods."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

GRAPH_NEIGHBOURS = 15  # the cell itself counted, as scanpy counts
LISI_NEIGHBOURS = 90
LISI_PERPLEXITY = 30
RESOLUTIONS = tuple(round(0.2 * k, 1) for k in range(1, 11))
BISECTIONS = 64
LEIDEN_PASSES = 2


def nearest(embedding: NDArray, k: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return distances and rows (n, k) of the exact nearest other cells by Euclidean distance; fewer where n is small.

    scikit-learn is told to leave the cell itself out: among duplicates it need not come first, and in float32 its
    distance to itself need not be 0.
    """
    from sklearn.neighbors import NearestNeighbors

    x = np.asarray(embedding, dtype=np.float64)
    distances, rows = NearestNeighbors(n_neighbors=min(k, len(x) - 1)).fit(x).kneighbors()
    return distances, rows


def fuzzy_graph(distances: NDArray[np.float64], rows: NDArray[np.int64]) -> sparse.csr_array:
    """Return the symmetric (n, n) neighbour graph with UMAP's weights (McInnes et al. 2018, algorithms 2 and 3).

    A neighbour at distance d weighs exp(-(d - rho) / sigma), rho the least positive distance and sigma such that
    weights sum to log2(k); both directions are joined by the probabilistic or. Equal to scanpy's connectivities.
    """
    n, k = distances.shape
    positive = np.where(distances > 0, distances, np.inf)
    rho = positive.min(1)
    beyond = np.maximum(distances - np.where(np.isfinite(rho), rho, 0)[:, None], 0)
    target = np.log2(k + 1)  # the cell itself is counted
    low, high, sigma = np.zeros(n), np.full(n, np.inf), np.ones(n)
    for _ in range(BISECTIONS):
        too_wide = np.exp(-beyond / sigma[:, None]).sum(1) > target
        low, high = np.where(too_wide, low, sigma), np.where(too_wide, sigma, high)
        sigma = np.where(np.isinf(high), sigma * 2, (low + np.where(np.isinf(high), low, high)) / 2)
    # UMAP's floor, which keeps cells with many duplicates from weights of exactly 0
    scale = np.where(np.isfinite(rho), distances.sum(1) / (k + 1), distances.mean())
    sigma = np.maximum(sigma, 1e-3 * scale)
    weights = np.exp(-np.divide(beyond, sigma[:, None], out=np.zeros_like(beyond), where=sigma[:, None] > 0))
    directed = sparse.csr_array((weights.ravel(), rows.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))
    directed.eliminate_zeros()
    reverse = directed.T.tocsr()
    graph = (directed + reverse - directed.multiply(reverse)).tocsr()
    graph.sort_indices()
    return graph


def leiden(graph: sparse.csr_array, resolution: float, seed: int) -> NDArray[np.int64]:
    """Return the cluster (n,) of each cell: leidenalg on the graph with both directions of an edge, as in scanpy.

    Two passes, where scib iterates to convergence: at 5,000 cells that takes many times longer and moves NMI by less
    than 0.01.
    """
    import igraph
    import leidenalg

    edges = graph.tocoo()
    network = igraph.Graph(n=graph.shape[0], edges=np.column_stack([edges.row, edges.col]), directed=True)
    # rounded to float32 like scanpy's graph: Leiden breaks ties by the last digits
    weights = edges.data.astype(np.float32).astype(np.float64)
    partition = leidenalg.find_partition(
        network,
        leidenalg.RBConfigurationVertexPartition,
        weights=weights,
        resolution_parameter=resolution,
        n_iterations=LEIDEN_PASSES,
        seed=seed,
    )
    return np.asarray(partition.membership, dtype=np.int64)


def nmi(truth: NDArray, clusters: NDArray) -> float:
    """Return the normalised mutual information, mutual information over the mean of the two entropies."""
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(truth, clusters))


def ari(truth: NDArray, clusters: NDArray) -> float:
    """Return the adjusted Rand index; 0 is chance."""
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(truth, clusters))


def cluster_f1(labels: NDArray[np.str_], name: str, clusterings: Sequence[NDArray[np.int64]]) -> float:
    """Return the best F1 of any one cluster, of any clustering, read as the type `name` (scib's isolated-label F1)."""
    mine, best = labels == name, 0.0
    for clusters in clusterings:
        hits, sizes = np.bincount(clusters, weights=mine), np.bincount(clusters)
        best = max(best, float((2 * hits / (sizes + mine.sum())).max()))
    return best


def graph_connectivity(graph: sparse.csr_array, labels: NDArray[np.str_]) -> float:
    """Return the mean over types of the share of its cells in the largest connected piece of its own graph.

    On the symmetric graph this is scib's; scib-metrics takes the directed graph and strong components, never more.
    """
    from scipy.sparse.csgraph import connected_components

    shares = []
    for name in np.unique(labels):
        rows = np.flatnonzero(labels == name)
        _, piece = connected_components(graph[rows][:, rows], directed=True, connection="strong")
        shares.append(np.bincount(piece).max() / len(rows))
    return float(np.mean(shares))


def neighbour_weights(distances: NDArray[np.float64], perplexity: float) -> NDArray[np.float64]:
    """Return weights (n, k) exp(-beta d), each row normalised, with beta such that its entropy is log(perplexity)."""
    n = len(distances)
    beyond = distances - distances.min(1, keepdims=True)
    low, high, beta = np.zeros(n), np.full(n, np.inf), np.ones(n)
    for _ in range(BISECTIONS):
        weights = np.exp(-beyond * beta[:, None])
        total = weights.sum(1)
        entropy = np.log(total) + beta * (beyond * weights).sum(1) / total
        too_flat = entropy > np.log(perplexity)
        low, high = np.where(too_flat, beta, low), np.where(too_flat, high, beta)
        beta = np.where(np.isinf(high), beta * 2, (low + np.where(np.isinf(high), low, high)) / 2)
        # where all neighbours are equally far no beta is sharp enough; the weights are the same for every beta
        beta = np.minimum(beta, 1e12)
    weights = np.exp(-beyond * beta[:, None])
    return weights / weights.sum(1, keepdims=True)


def lisi(distances: NDArray[np.float64], rows: NDArray[np.int64], names: NDArray[np.str_]) -> NDArray[np.float64]:
    """Return the inverse Simpson index (n,) of the names around each cell, weighted by nearness (Korsunsky 2019)."""
    kinds, code = np.unique(names, return_inverse=True)
    perplexity = min(LISI_PERPLEXITY, (rows.shape[1] + 1) // 3)
    weights = neighbour_weights(distances, perplexity)
    simpson = sum(np.where(code[rows] == k, weights, 0).sum(1) ** 2 for k in range(len(kinds)))
    return 1 / np.asarray(simpson)


def ilisi(distances: NDArray[np.float64], rows: NDArray[np.int64], batches: NDArray[np.str_]) -> float:
    """Return the median LISI of the batches, 0 for one batch around a cell and 1 for all of them equally."""
    return float((np.median(lisi(distances, rows, batches)) - 1) / (len(np.unique(batches)) - 1))


def clisi(distances: NDArray[np.float64], rows: NDArray[np.int64], labels: NDArray[np.str_]) -> float:
    """Return the median LISI of the types turned round: 1 for one type around a cell, 0 for all of them equally."""
    n = len(np.unique(labels))
    return float((n - np.median(lisi(distances, rows, labels))) / (n - 1))


def batch_entropy(rows: NDArray[np.int64], batches: NDArray[np.str_]) -> float:
    """Return the mean entropy of the batches among each cell's neighbours, over its maximum: cz-benchmarks' entropy
    where the rows are the cell and its 199 nearest."""
    kinds, code = np.unique(batches, return_inverse=True)
    share = np.stack([(code[rows] == k).mean(1) for k in range(len(kinds))])
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    return float(-(share * logs).sum(0).mean() / np.log(len(kinds)))
