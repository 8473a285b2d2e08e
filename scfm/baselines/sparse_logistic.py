"""A linear classifier that keeps few genes: what Boiarsky et al. (2023) set against scBERT and scGPT."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scfm.baselines.inputs import ExpressionRule, read_labels
from scfm.errors import ScfmError

if TYPE_CHECKING:
    import anndata


class SparseLogisticRegression:
    """L1-penalised logistic regression on the log expression of all genes, each type against the rest.

    Genes are not scaled and types not weighted, as in the comparison of Boiarsky et al., which chose C by
    cross-validation on the training cells.

    Args:
        strength: Inverse strength of the L1 penalty (scikit-learn's C).
    """

    name = "L1 logistic regression"

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength

    def describe(self) -> str:
        return (
            "log expression of all genes, unscaled; L1-penalised logistic regression of each type against the rest "
            f"(C = {self.strength:g})"
        )

    def fit(self, adata: anndata.AnnData, label: str, seed: int = 0) -> SparseLogisticRegression:
        """Fit on the training cells. Raises ScfmError for unusable values, or labels that are all alike."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.multiclass import OneVsRestClassifier

        labels = read_labels(adata, label)
        if len(set(labels)) < 2:
            raise ScfmError(f"all {len(labels)} training cells have the same value of obs[{label!r}]: nothing to learn")
        self.rule = ExpressionRule.learn(adata)
        one = LogisticRegression(l1_ratio=1, C=self.strength, solver="liblinear", random_state=seed)
        self.model = OneVsRestClassifier(one).fit(self.rule.apply(adata), labels)
        self.classes: list[str] = self.model.classes_.tolist()
        return self

    @property
    def genes(self) -> list[str]:
        """The genes that any type weighs."""
        weighed = np.any([one.coef_[0] != 0 for one in self.model.estimators_], axis=0)
        return [gene for gene, used in zip(self.rule.genes, weighed, strict=True) if used]

    def predict(self, adata: anndata.AnnData) -> tuple[NDArray[np.str_], NDArray[np.float64]]:
        """Return labels (n,) and probabilities (n, C), columns as in `classes`."""
        probabilities = self.model.predict_proba(self.rule.apply(adata))
        return np.array(self.classes)[probabilities.argmax(1)], probabilities
