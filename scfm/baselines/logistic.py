"""A linear classifier on log expression: the baseline that foundation models most often lose to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scfm.baselines.inputs import ExpressionRule, read_labels
from scfm.errors import ScfmError

if TYPE_CHECKING:
    import anndata


class BalancedLogisticRegression:
    """Multinomial logistic regression on all genes, each at unit variance, classes weighted by inverse frequency.

    Args:
        strength: Inverse strength of the L2 penalty (scikit-learn's C).
    """

    name = "logistic regression"

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength

    def describe(self) -> str:
        return (
            "log expression of all genes, divided by their training standard deviation; "
            f"L2-penalised logistic regression (C = {self.strength:g}), balanced classes"
        )

    def fit(self, adata: anndata.AnnData, label: str, seed: int = 0) -> BalancedLogisticRegression:
        """Fit on the training cells. Raises ScfmError for unusable values, or labels that are all alike."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        labels = read_labels(adata, label)
        if len(set(labels)) < 2:
            raise ScfmError(f"all {len(labels)} training cells have the same value of obs[{label!r}]: nothing to learn")
        self.rule = ExpressionRule.learn(adata)
        self.model = make_pipeline(
            StandardScaler(with_mean=False),  # no centring: the matrix stays sparse, the intercept takes the mean
            LogisticRegression(C=self.strength, class_weight="balanced", max_iter=2000, random_state=seed),
        )
        self.model.fit(self.rule.apply(adata), labels)
        self.classes: list[str] = self.model.classes_.tolist()
        return self

    def predict(self, adata: anndata.AnnData) -> tuple[NDArray[np.str_], NDArray[np.float64]]:
        """Return labels (n,) and probabilities (n, C), columns as in `classes`."""
        probabilities = self.model.predict_proba(self.rule.apply(adata))
        return np.array(self.classes)[probabilities.argmax(1)], probabilities
