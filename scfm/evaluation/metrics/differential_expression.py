"""Which genes a perturbation changes, and how well the genes changed in predicted cells agree with them.

Two tests, because the originals use two: the rank-sum test of cell-eval (pdex) on the cells of a condition against
control cells, and Welch's t of GEARS, which only orders genes. Scores look at the genes significant in the true cells,
so they depend on how many cells were measured: with few cells hardly a gene is significant, and a prediction that
varies less than real cells do makes nearly every gene so (compare the precision).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scfm.errors import ScfmError
from scfm.evaluation.metrics.network import benjamini_hochberg
from scfm.evaluation.metrics.perturbation import spearman

SIGNIFICANT = 0.05
# below this all genes count as equally sure, as in cell-eval: such p-values hold no order worth scoring
SUREST = 1e-10


@dataclass(frozen=True)
class GeneChanges:
    """The change of every gene from control cells to the cells of one condition.

    Attributes:
        fdr: (G,) p-values of the rank-sum test, adjusted over the genes of this condition.
        log2_fold_change: (G,) between geometric means of 1 + counts, less 1; infinite where one side has none.
    """

    fdr: NDArray[np.float64]
    log2_fold_change: NDArray[np.float64]

    @property
    def significant(self) -> NDArray[np.bool_]:
        """Which genes have an adjusted p-value below 0.05, (G,)."""
        return self.fdr < SIGNIFICANT

    @property
    def order(self) -> NDArray[np.int64]:
        """Rows of the significant genes, the largest fold change of either sign first."""
        rows = np.flatnonzero(self.significant)
        return rows[np.argsort(-np.abs(self.log2_fold_change[rows]), kind="stable")]


def _paired(cells: NDArray, control: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if cells.ndim != 2 or control.ndim != 2 or cells.shape[1] != control.shape[1]:
        raise ScfmError(
            f"cells {cells.shape} and control cells {control.shape} must be (cells, genes) of the same genes"
        )
    if min(len(cells), len(control)) < 2:
        raise ScfmError(f"{len(cells)} cells against {len(control)} control cells: a test needs two on either side")
    return cells.astype(np.float64), control.astype(np.float64)


def gene_changes(cells: NDArray, control: NDArray) -> GeneChanges:
    """Test every gene of log1p expression (m, G) against control cells (n, G), as cell-eval does by pdex.

    Two-sided Wilcoxon rank-sum test, normal approximation with ties and continuity, Benjamini-Hochberg over genes.
    Raises ScfmError for other genes on the two sides or fewer than two cells.
    """
    from scipy.stats import mannwhitneyu

    x, y = _paired(cells, control)
    p = mannwhitneyu(x, y, axis=0, method="asymptotic", use_continuity=True).pvalue
    # a gene with one value in all cells has no test and no change
    p = np.where(np.ptp(np.vstack([x, y]), axis=0) == 0, 1.0, p)
    mean, reference = np.expm1(x.mean(0)), np.expm1(y.mean(0))
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.where(mean == reference, 0.0, np.log2(mean / reference))
    return GeneChanges(benjamini_hochberg(p), change)


def overlap(truth: GeneChanges, predicted: GeneChanges, k: int | None = None) -> float:
    """Return the share of the k most changed genes of the true cells among the k of the predicted ones.

    All that are significant in the true cells without k, never more; 0 where there is none (cell-eval's overlap_at).
    """
    return _shared_of_top(truth.order, predicted.order, len(truth.order), k)


def precision(truth: GeneChanges, predicted: GeneChanges, k: int | None = None) -> float:
    """Return what `overlap` does, with k counted on the predicted side (cell-eval's precision_at)."""
    return _shared_of_top(truth.order, predicted.order, len(predicted.order), k)


def _shared_of_top(truth: NDArray[np.int64], predicted: NDArray[np.int64], most: int, k: int | None) -> float:
    k = most if k is None else min(k, most)
    return len(np.intersect1d(truth[:k], predicted[:k])) / k if k else 0.0


def recall(truth: GeneChanges, predicted: GeneChanges) -> float:
    """Return the share of truly changed genes that are significant in the predicted cells too; NaN without any."""
    return _mean(predicted.significant[truth.significant])


def direction_match(truth: GeneChanges, predicted: GeneChanges) -> float:
    """Return the share of truly changed genes that the predicted cells change to the same side; NaN without any."""
    same = np.sign(truth.log2_fold_change) == np.sign(predicted.log2_fold_change)
    return _mean(same[truth.significant])


def _mean(values: NDArray[np.bool_]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def fold_change_correlation(truth: GeneChanges, predicted: GeneChanges) -> float:
    """Return Spearman's correlation of fold changes over truly changed genes; NaN with fewer than two."""
    genes = truth.significant
    return spearman(truth.log2_fold_change[genes], predicted.log2_fold_change[genes])


def recovery(truth: GeneChanges, predicted: GeneChanges) -> dict[str, float]:
    """Score the order of genes by predicted adjusted p-value at finding the truly changed ones.

    `average_precision` (cell-eval's pr_auc; chance is the share of changed genes) and `auroc`; NaN where no gene is
    changed, or all are.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    changed, sureness = truth.significant, -np.log10(np.maximum(predicted.fdr, SUREST))
    if changed.all() or not changed.any():
        return {"average_precision": float("nan"), "auroc": float("nan")}
    return {
        "average_precision": float(average_precision_score(changed, sureness)),
        "auroc": float(roc_auc_score(changed, sureness)),
    }


def welch_order(cells: NDArray, control: NDArray) -> NDArray[np.int64]:
    """Return all gene rows (G,), the largest |Welch's t| against control cells first: GEARS' order of changed genes.

    Its "top 20" are the first 20. Raises ScfmError as `gene_changes` does.
    """
    x, y = _paired(cells, control)
    error = np.sqrt(x.var(0, ddof=1) / len(x) + y.var(0, ddof=1) / len(y))
    t = np.divide(x.mean(0) - y.mean(0), error, out=np.zeros_like(error), where=error > 0)
    return np.argsort(-np.abs(t), kind="stable")


def not_dropped_out(cells: NDArray, control: NDArray) -> NDArray[np.bool_]:
    """Return which genes (G,) the cells of a condition express, or control cells lack as well (GEARS)."""
    x, y = _paired(cells, control)
    return (x.mean(0) != 0) | (y.mean(0) == 0)
