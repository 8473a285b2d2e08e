"""Scores of cell embeddings: are the types kept, are the batches mixed, and neither number alone.

Formulas follow scib 1.1.7 (Luecken et al. 2022) and scEval (Liu et al. 2023); values equal the originals' on the stored
goldens. Every score names its protocol, because the same embedding gives NMI 0.84 or 0.73 by protocol alone.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scfm.errors import ScfmError
from scfm.evaluation.metrics import neighbours as nn
from scfm.evaluation.metrics import silhouette as sil
from scfm.evaluation.metrics.metric import Metric

if TYPE_CHECKING:
    from scipy.sparse import csr_array

PCR_COMPONENTS = 50
KBET_NEIGHBOURS = 50
KMEANS_STARTS = 10

S_BIO = ("nmi_leiden", "ari_leiden", "asw_label")
S_BATCH = ("asw_batch", "pcr_comparison", "graph_connectivity")
S_FINAL = {"s_bio": 0.6, "s_batch": 0.4}

_LEIDEN = (
    f"Leiden (leidenalg {version('leidenalg')}) on the {nn.GRAPH_NEIGHBOURS}-neighbour graph, the best of resolutions "
    f"{nn.RESOLUTIONS[0]} to {nn.RESOLUTIONS[-1]} by NMI, so tuned on the labels"
)
_KMEANS = f"k-means (scikit-learn {version('scikit-learn')}, {KMEANS_STARTS} starts), k the number of types"
_SAMPLED = f"above {sil.SILHOUETTE_CELLS:,} cells a seeded sample, stratified by type and batch"
_LISI = f"{nn.LISI_NEIGHBOURS} nearest, the cell itself left out, perplexity {nn.LISI_PERPLEXITY}, median over cells"

EMBEDDING: dict[str, Metric] = {
    "s_final": Metric("S_final", "0.6 S_bio + 0.4 S_batch; noise scores 0.46 on our goldens: never read it alone"),
    "s_bio": Metric("S_bio", f"mean of {', '.join(S_BIO)}"),
    "s_batch": Metric("S_batch", f"mean of {', '.join(S_BATCH)}; noise scores 0.89 on our goldens"),
    "nmi_leiden": Metric("NMI (Leiden)", f"arithmetic NMI; {_LEIDEN}"),
    "ari_leiden": Metric("ARI (Leiden)", f"adjusted Rand at the resolution of the best NMI; {_LEIDEN}"),
    "nmi_kmeans": Metric("NMI (k-means)", f"arithmetic NMI; {_KMEANS}"),
    "ari_kmeans": Metric("ARI (k-means)", f"adjusted Rand; {_KMEANS}"),
    "asw_label": Metric("cell-type ASW", f"(mean silhouette width + 1) / 2, Euclidean; {_SAMPLED}"),
    "clisi": Metric("cLISI", f"(types - LISI) / (types - 1); {_LISI}"),
    "isolated_label_asw": Metric(
        "isolated-label ASW", "ASW of the types found in the fewest batches; undefined where every batch has every type"
    ),
    "isolated_label_f1": Metric(
        "isolated-label F1", f"best F1 of one cluster as the isolated type, over the clusterings of: {_LEIDEN}"
    ),
    "asw_batch": Metric(
        "batch ASW",
        f"mean over types of 1 - |silhouette width of the batch within the type|, Euclidean, nearest batch; "
        f"types of a single batch left out; {_SAMPLED}",
    ),
    "pcr": Metric(
        "PCR",
        f"share of the variance of the embedding's principal components (at most {PCR_COMPONENTS}) that the "
        "categorical batch explains",
        higher_is_better=False,
    ),
    "pcr_comparison": Metric(
        "PCR comparison",
        f"(before - after) / before, not below 0; before is the PCR of {PCR_COMPONENTS} components of the expression",
    ),
    "graph_connectivity": Metric(
        "graph connectivity",
        f"mean share of a type in its largest connected piece, symmetric graph of "
        f"{nn.GRAPH_NEIGHBOURS} neighbours as in scib",
    ),
    "ilisi": Metric("iLISI", f"(LISI - 1) / (batches - 1); {_LISI}"),
    "bras": Metric("BRAS", f"as batch ASW, with cosine distances to the mean of all other batches' cells; {_SAMPLED}"),
    "kbet": Metric(
        "kBET",
        f"mean over types of the acceptance rate at 0.05, diffusion neighbours from the {KBET_NEIGHBOURS}-neighbour "
        "graph; scib-metrics (extra `eval`)",
    ),
}


def principal_component_regression(matrix: NDArray | csr_array, batches: NDArray[np.str_]) -> float:
    """Return the share of variance over principal components (n, p) that the batch explains: sum R2 var / sum var.

    The batch is a category whatever its names look like; read as a number, batch 2 would be twice batch 1.
    """
    from scipy.sparse import issparse
    from sklearn.decomposition import PCA

    k = min(PCR_COMPONENTS, *matrix.shape)
    tall = matrix.shape[0] >= matrix.shape[1]
    x = matrix.astype(np.float64)
    solver = "covariance_eigh" if tall else "arpack" if issparse(matrix) else "full"
    components = PCA(n_components=k, svd_solver=solver, random_state=0).fit_transform(x)
    _, batch, sizes = np.unique(np.asarray(batches, dtype=str), return_inverse=True, return_counts=True)
    means = np.stack([components[batch == b].mean(0) for b in range(len(sizes))])
    between = (sizes[:, None] * means**2).sum(0)
    total = (components**2).sum(0)
    # R2 of component k times its variance is its between-batch sum of squares, up to a factor that cancels
    return float(between.sum() / total.sum()) if total.sum() > 0 else float("nan")


def pcr_comparison(before: float, after: float) -> float:
    """Return how much of the batch's share of variance is gone: clip((before - after) / before, 0)."""
    return max((before - after) / before, 0.0) if before > 0 else float("nan")


def kmeans_clusters(embedding: NDArray, k: int, seed: int) -> NDArray[np.int64]:
    """Return the k-means cluster (n,) of each cell, the best of several starts."""
    from sklearn.cluster import KMeans

    return KMeans(k, n_init=KMEANS_STARTS, random_state=seed).fit_predict(np.asarray(embedding, dtype=np.float64))


def kbet(distances: NDArray, rows: NDArray, labels: NDArray[np.str_], batches: NDArray[np.str_]) -> float:
    """Return kBET per type by scib-metrics, from the nearest other cells (n, k).

    Raises ScfmError where the extra `eval` is not installed.
    """
    try:
        import scib_metrics
        from scib_metrics.nearest_neighbors import NeighborsResults
    except ImportError as missing:
        raise ScfmError("kBET is computed by scib-metrics: pip install 'scfm[eval]'") from missing
    itself = np.arange(len(rows))[:, None]
    results = NeighborsResults(
        indices=np.hstack([itself, rows]), distances=np.hstack([np.zeros((len(rows), 1)), distances])
    )
    return float(scib_metrics.kbet_per_label(results, batches=batches, labels=labels))


def _checked(embedding: NDArray, labels: NDArray, batches: NDArray | None) -> tuple[NDArray, NDArray | None]:
    if embedding.ndim != 2 or not len(embedding):
        raise ScfmError(f"an embedding is (cells, dimensions), not {embedding.shape}")
    if not np.isfinite(embedding).all():
        bad = int((~np.isfinite(embedding)).any(1).sum())
        raise ScfmError(f"{bad} of {len(embedding)} cells have an embedding that is not a number; no score is defined")
    if len(labels) != len(embedding) or (batches is not None and len(batches) != len(embedding)):
        given = f"{len(labels)} labels" + ("" if batches is None else f" and {len(batches)} batches")
        raise ScfmError(f"{given} for {len(embedding)} cells")
    labels = np.asarray(labels, dtype=str)
    if len(np.unique(labels)) < 2:
        raise ScfmError(f"an embedding is scored against two types or more; all cells are {labels[0]!r}")
    if batches is None:
        return labels, None
    batches = np.asarray(batches, dtype=str)
    if len(np.unique(batches)) < 2:
        raise ScfmError(f"batch scores need two batches; all cells are of {batches[0]!r}: leave the batches away")
    return labels, batches


def embedding_scores(
    embedding: NDArray,
    labels: NDArray,
    batches: NDArray | None,
    *,
    before: NDArray | csr_array | None = None,
    seed: int = 0,
    with_kbet: bool = False,
) -> dict[str, float]:
    """Score an embedding (n, d) against the types (n,) and batches (n,) of its cells; keys are keys of METRICS.

    Types and batches are categories, whatever their dtype. Without batches only the scores of types come back.

    Args:
        before: (n, p) expression before integration (log1p, dense or sparse), what PCR is compared with; without it
            there is no `pcr_comparison`, and so neither `s_batch` nor `s_final`.
        seed: of k-means, Leiden and the sample of cells.
        with_kbet: kBET too, which scib-metrics computes.

    Raises ScfmError for shapes that disagree, numbers that are not finite, fewer than two types, or a single batch.
    """
    embedding = np.asarray(embedding)
    labels, batches = _checked(embedding, np.asarray(labels), batches if batches is None else np.asarray(batches))
    distances, rows = nn.nearest(embedding, nn.LISI_NEIGHBOURS - 1)
    near = slice(None, nn.GRAPH_NEIGHBOURS - 1)
    graph = nn.fuzzy_graph(distances[:, near], rows[:, near])
    clusterings = [nn.leiden(graph, resolution, seed) for resolution in nn.RESOLUTIONS]
    agreement = [nn.nmi(labels, clusters) for clusters in clusterings]
    kmeans = kmeans_clusters(embedding, len(np.unique(labels)), seed)
    scores = {
        "nmi_leiden": max(agreement),
        "ari_leiden": nn.ari(labels, clusterings[int(np.argmax(agreement))]),
        "nmi_kmeans": nn.nmi(labels, kmeans),
        "ari_kmeans": nn.ari(labels, kmeans),
        "clisi": nn.clisi(distances, rows, labels),
        "graph_connectivity": nn.graph_connectivity(graph, labels),
    }
    strata = labels if batches is None else np.char.add(np.char.add(labels, "\n"), batches)
    sample = sil.stratified_sample(strata, sil.SILHOUETTE_CELLS, seed)
    groups = batches if batches is not None else np.zeros(len(labels), dtype=str)
    euclidean = sil.group_distances(embedding[sample], labels[sample], groups[sample], "euclidean")
    scores["asw_label"] = sil.asw_label(euclidean)
    scores["s_bio"] = float(np.mean([scores[name] for name in S_BIO]))
    if batches is not None:
        isolated = sil.isolated_labels(labels, batches)
        cosine = sil.group_distances(embedding[sample], labels[sample], batches[sample], "cosine")
        best_f1 = [nn.cluster_f1(labels, name, clusterings) for name in isolated]
        scores |= {
            "isolated_label_asw": sil.isolated_label_asw(euclidean, isolated),
            "isolated_label_f1": float(np.mean(best_f1)) if isolated else float("nan"),
            "asw_batch": sil.batch_mixing(euclidean, "nearest"),
            "bras": sil.batch_mixing(cosine, "mean_other"),
            "ilisi": nn.ilisi(distances, rows, batches),
            "pcr": principal_component_regression(embedding, batches),
        }
        if with_kbet:
            scores["kbet"] = kbet(distances[:, : KBET_NEIGHBOURS - 1], rows[:, : KBET_NEIGHBOURS - 1], labels, batches)
        if before is not None:
            scores["pcr_comparison"] = pcr_comparison(principal_component_regression(before, batches), scores["pcr"])
            scores["s_batch"] = float(np.mean([scores[name] for name in S_BATCH]))
            scores["s_final"] = sum(weight * scores[name] for name, weight in S_FINAL.items())
    return {name: scores[name] for name in EMBEDDING if name in scores}
