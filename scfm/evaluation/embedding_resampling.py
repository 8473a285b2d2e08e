"""Scores of an embedding as functions of the weights of its cells, so that they can be bootstrapped.

Clusters, silhouette widths, pieces of the neighbour graph and principal components are computed once, of all cells, and
held fixed; a resample weighs cells. With equal weights the scores are those of `embedding_scores`.

A cell that a resample holds twice is not two cells. Scores of pairs (ARI, PCR) count pairs of distinct cells, since a
cell agrees with itself and varies from itself in nothing; entropies (NMI) are corrected for the fewer distinct cells.
Else the PCR of a well-mixed embedding of 150 cells moves by twice its standard deviation, the NMI of an embedding that
knows nothing doubles, and the interval of a difference lies beside the difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from scfm.evaluation.metrics import neighbours as nn
from scfm.evaluation.metrics import silhouette as sil
from scfm.evaluation.metrics.embedding import PCR_COMPONENTS, S_BATCH, S_BIO, S_FINAL

Weights = NDArray[np.float64]


@dataclass(frozen=True)
class EmbeddingParts:
    """What is known of each cell of an embedding.

    Attributes:
        label, batch: (n,) codes.
        cluster: (n,) of the Leiden clustering that fits the labels best.
        connected: (n,) whether a cell is in the largest piece of its type's graph.
        sampled: (m,) the cells that have silhouette widths.
        width: (m,) silhouette width among the types.
        mixing: (m,) 1 - |silhouette width of the batch within the type|; NaN in types of a single batch.
        components, before: (n, k) principal components of the embedding, and of the expression.
    """

    METRICS: ClassVar[tuple[str, ...]] = (*S_BIO, *S_BATCH, "s_bio", "s_batch", "s_final")

    label: NDArray[np.int64]
    batch: NDArray[np.int64]
    cluster: NDArray[np.int64]
    connected: NDArray[np.bool_]
    sampled: NDArray[np.int64]
    width: NDArray[np.float64]
    mixing: NDArray[np.float64]
    components: NDArray[np.float64]
    before: NDArray[np.float64]

    @classmethod
    def of(
        cls, embedding: NDArray, labels: NDArray[np.str_], batches: NDArray[np.str_], before: NDArray, seed: int
    ) -> EmbeddingParts:
        """Compute them, by the protocol and the seed of `embedding_scores`."""
        from scipy.sparse.csgraph import connected_components
        from sklearn.metrics import silhouette_samples

        distances, rows = nn.nearest(embedding, nn.GRAPH_NEIGHBOURS - 1)
        graph = nn.fuzzy_graph(distances, rows)
        clusterings = [nn.leiden(graph, resolution, seed) for resolution in nn.RESOLUTIONS]
        cluster = max(clusterings, key=lambda clusters: nn.nmi(labels, clusters))
        _, label = np.unique(labels, return_inverse=True)
        _, batch = np.unique(batches, return_inverse=True)
        connected = np.zeros(len(labels), bool)
        for code in range(label.max() + 1):
            mine = np.flatnonzero(label == code)
            _, piece = connected_components(graph[mine][:, mine], directed=True, connection="strong")
            connected[mine] = piece == np.bincount(piece).argmax()
        sampled = sil.stratified_sample(np.char.add(np.char.add(labels, "\n"), batches), sil.SILHOUETTE_CELLS, seed)
        x = np.asarray(embedding, np.float64)[sampled]
        mixing = np.full(len(sampled), np.nan)
        for code in range(label.max() + 1):
            mine = label[sampled] == code
            of = batch[sampled][mine]
            if 1 < len(np.unique(of)) < len(of):
                mixing[mine] = 1 - np.abs(silhouette_samples(x[mine], of))
        return cls(
            label,
            batch,
            cluster,
            connected,
            sampled,
            silhouette_samples(x, label[sampled]),
            mixing,
            _components(embedding),
            _components(before),
        )

    def _cells(self, weights: Weights) -> NDArray[np.float64]:
        """(R, labels, clusters) summed weights (R, n) of the cells of each label in each cluster."""
        shape = int(self.label.max()) + 1, int(self.cluster.max()) + 1
        return _by_category(weights, self.label * shape[1] + self.cluster, shape[0] * shape[1]).reshape(-1, *shape)

    def scores(self, weights: Weights) -> dict[str, NDArray[np.float64]]:
        """Return the scores (R,) of weights (R, n), by metric; S_bio, S_batch and S_final as `embedding_scores` has."""
        n_labels = int(self.label.max()) + 1
        table, squares = self._cells(weights), self._cells(weights**2)
        connected = _by_category(weights * self.connected, self.label, n_labels)
        of_sample = weights[:, self.sampled]
        defined = ~np.isnan(self.mixing)
        of_defined, label = of_sample[:, defined], self.label[self.sampled][defined]
        mixed = _ratio(
            _by_category(of_defined * self.mixing[defined], label, n_labels), _by_category(of_defined, label, n_labels)
        )
        before, after = (_pcr(x, self.batch, weights) for x in (self.before, self.components))
        found = {
            "nmi_leiden": _nmi(table, squares),
            "ari_leiden": _ari(table, squares),
            "asw_label": (_ratio(of_sample @ self.width, of_sample.sum(1)) + 1) / 2,
            "asw_batch": np.nanmean(mixed, axis=1),
            "pcr_comparison": np.maximum(_ratio(before - after, before), 0),
            "graph_connectivity": np.nanmean(_ratio(connected, table.sum(2)), axis=1),
        }
        found["s_bio"] = np.mean([found[name] for name in S_BIO], axis=0)
        found["s_batch"] = np.mean([found[name] for name in S_BATCH], axis=0)
        found["s_final"] = np.sum([weight * found[name] for name, weight in S_FINAL.items()], axis=0)
        return found


def _components(matrix: NDArray) -> NDArray[np.float64]:
    from sklearn.decomposition import PCA

    x = np.asarray(matrix, dtype=np.float64)
    solver = "covariance_eigh" if x.shape[0] >= x.shape[1] else "full"
    return PCA(min(PCR_COMPONENTS, *x.shape), svd_solver=solver, random_state=0).fit_transform(x)


def _by_category(weights: Weights, codes: NDArray[np.int64], categories: int) -> NDArray[np.float64]:
    """(R, categories) summed weights (R, n) of the cells of each category (n,); 0 for categories without a cell."""
    from scipy.sparse import csr_matrix

    n = len(codes)
    return weights @ csr_matrix((np.ones(n), (np.arange(n), codes)), shape=(n, categories))


def _ratio(part: NDArray, whole: NDArray) -> NDArray[np.float64]:
    """Return part / whole, NaN where the whole is nothing: a type that no resample drew."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)


def _entropy(counts: NDArray, squares: NDArray) -> NDArray[np.float64]:
    """Entropies of weights (..., K) summed by category, given the summed squares of weights (..., K).

    n draws fall short of the entropy that they are drawn from, the more the rarer the categories; Grassberger (2003,
    arXiv physics/0307138) estimates by how much. Equal weights are no draws and need no correction
    (sum w^2 = n), draws with replacement need all of it (2n), draws of whole donors more.
    """
    from scipy.special import digamma

    n = counts.sum(-1)
    share = counts / n[..., None]
    plain = -(share * np.log(share, out=np.zeros_like(share), where=share > 0)).sum(-1)
    drawn = np.where(counts > 0, counts, 1)
    turn = np.where(drawn % 2 == 0, 0.5, -0.5) * (digamma((drawn + 1) / 2) - digamma(drawn / 2))
    estimated = np.log(n) - (counts * (digamma(drawn) + turn)).sum(-1) / n
    return plain + (squares.sum(-1) / n - 1) * (estimated - plain)


def _nmi(table: NDArray, squares: NDArray) -> NDArray[np.float64]:
    """(R,) mutual information over the mean of the two entropies, of tables as those of `_ari`."""
    rows, columns = (_entropy(table.sum(axis), squares.sum(axis)) for axis in (2, 1))
    mutual = rows + columns - _entropy(table.reshape(len(table), -1), squares.reshape(len(table), -1))
    return _ratio(mutual, (rows + columns) / 2)


def _ari(table: NDArray, squares: NDArray) -> NDArray[np.float64]:
    """(R,) adjusted Rand index of tables (R, labels, clusters) of summed weights, and of summed squares of weights."""
    pairs, rows, columns, all_pairs = (
        ((one**2 - same) / 2).sum(-1)
        for one, same in (
            (table.reshape(len(table), -1), squares.reshape(len(table), -1)),
            (table.sum(2), squares.sum(2)),
            (table.sum(1), squares.sum(1)),
            (table.sum((1, 2))[:, None], squares.sum((1, 2))[:, None]),
        )
    )
    expected = rows * columns / all_pairs
    return _ratio(pairs - expected, (rows + columns) / 2 - expected)


def _pcr(x: NDArray[np.float64], batch: NDArray[np.int64], weights: Weights) -> NDArray[np.float64]:
    """(R,) share of the weighted variance of components (n, k) that lies between batches."""
    lengths = (x**2).sum(1)
    whole = _squared_sum(x, lengths, weights)
    between = -whole
    for code in range(batch.max() + 1):
        mine = batch == code
        between += _squared_sum(x[mine], lengths[mine], weights[:, mine])
    return _ratio(between, weights @ lengths - whole)


def _squared_sum(x: NDArray[np.float64], lengths: NDArray[np.float64], weights: Weights) -> NDArray[np.float64]:
    """(R,) cells times the squared length of their mean, of vectors (n, k) of squared lengths (n,); 0 for no cell.

    Products of two draws of one cell are replaced by the mean product of distinct cells: with equal weights nothing is
    changed, and the mean over resamples is what all cells have.
    """
    n, pairs = weights.sum(1), weights.sum(1) ** 2 - (weights**2).sum(1)
    products = ((weights @ x) ** 2).sum(1) - weights**2 @ lengths
    own = _ratio(weights @ lengths, n)
    distinct = np.where(pairs > 0, np.divide(products, pairs, out=np.zeros(len(n)), where=pairs > 0), own)
    return np.where(n > 0, own + (n - 1) * distinct, 0.0)
