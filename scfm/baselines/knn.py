"""Nearest neighbours among the training cells, in the principal components of log expression."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scfm.baselines.inputs import ExpressionRule, read_labels

if TYPE_CHECKING:
    import anndata


class KNNOnPCA:
    """k nearest neighbours on principal components fitted on the training cells only.

    Args:
        components: Principal components; capped by the number of cells and genes.
        neighbours: Neighbours that vote with equal weight; capped by the number of training cells.
    """

    name = "kNN on PCA"

    def __init__(self, components: int = 50, neighbours: int = 10) -> None:
        self.components = components
        self.neighbours = neighbours

    def describe(self) -> str:
        return (
            f"log expression of all genes, unscaled; {self.components} principal components of the training cells; "
            f"{self.neighbours} nearest neighbours, equal votes"
        )

    def fit(self, adata: anndata.AnnData, label: str, seed: int = 0) -> KNNOnPCA:
        """Fit the components and remember the training cells. Raises ScfmError for unusable values or labels."""
        from sklearn.decomposition import PCA
        from sklearn.neighbors import KNeighborsClassifier

        labels = read_labels(adata, label)
        self.rule = ExpressionRule.learn(adata)
        expression = self.rule.apply(adata)
        # the iterative solver centres a sparse matrix without ever making it dense; it needs rank to spare
        components = max(1, min(self.components, min(expression.shape) - 1))
        self.pca = PCA(components, svd_solver="arpack", random_state=seed).fit(expression)
        self.knn = KNeighborsClassifier(min(self.neighbours, len(labels))).fit(self.pca.transform(expression), labels)
        self.classes: list[str] = self.knn.classes_.tolist()
        return self

    def embed(self, adata: anndata.AnnData) -> NDArray[np.float64]:
        """Return the principal components, (n, components)."""
        return self.pca.transform(self.rule.apply(adata))

    def predict(self, adata: anndata.AnnData) -> tuple[NDArray[np.str_], NDArray[np.float64]]:
        """Return labels (n,) and the neighbours' votes as probabilities (n, C), columns as in `classes`."""
        votes = self.knn.predict_proba(self.embed(adata))
        return np.array(self.classes)[votes.argmax(1)], votes
