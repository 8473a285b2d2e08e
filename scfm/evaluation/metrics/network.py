"""Scores of gene networks against known edges, and of gene sets against known ones."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray


def edge_scores(scores: NDArray[np.float64], gold: NDArray[np.bool_]) -> dict[str, float]:
    """Score ranked edges (n,) against gold ones (n,).

    AUROC alone misleads where gold edges are rare; `auprc_ratio` is average precision over the share of gold edges,
    `early_precision_ratio` the precision of as many top edges as there are gold ones over that share, both 1 by chance.
    """
    from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score

    n_gold = int(gold.sum())
    top = np.argsort(-scores, kind="stable")[:n_gold]
    hits, share = int(gold[top].sum()), n_gold / len(gold)
    precision, recall, _ = precision_recall_curve(gold, scores)
    average = float(average_precision_score(gold, scores))
    return {
        "auroc": float(roc_auc_score(gold, scores)),
        "average_precision": average,
        "auprc_trapezoid": float(auc(recall, precision)),
        "auprc_ratio": average / share,
        "early_precision": hits / n_gold,
        "early_precision_ratio": hits / n_gold / share,
        "jaccard_topk": hits / (2 * n_gold - hits),
    }


def jaccard(x: Collection[str], y: Collection[str]) -> float:
    """Return the shared part of two gene sets, intersection over union; 0 for two empty ones."""
    either = set(x) | set(y)
    return len(set(x) & set(y)) / len(either) if either else 0.0


def enrichment_p(query: Collection[str], gene_set: Collection[str], background: Collection[str]) -> float:
    """Return the hypergeometric p of so many genes of the set in the query or more, within the background."""
    from scipy.stats import hypergeom

    known = set(background)
    drawn, marked = set(query) & known, set(gene_set) & known
    return float(hypergeom.sf(len(drawn & marked) - 1, len(known), len(marked), len(drawn)))


def benjamini_hochberg(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return p-values (n,) adjusted for the false discovery rate."""
    from scipy.stats import false_discovery_control

    return np.asarray(false_discovery_control(p))
