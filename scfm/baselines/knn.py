"""Nearest neighbours among the training cells, in the principal components of highly variable genes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scfm.baselines.hvg_pca import HVGPCA
from scfm.baselines.inputs import read_labels

if TYPE_CHECKING:
    import anndata


class KNNOnPCA:
    """k nearest neighbours on `HVGPCA`; genes and components are chosen on the training cells only.

    Args:
        components: Principal components; capped by the number of cells and genes.
        neighbours: Neighbours that vote with equal weight; capped by the number of training cells.
        genes: Highly variable genes; None for all.
    """

    name = "kNN on PCA"

    def __init__(self, components: int = 50, neighbours: int = 10, genes: int | None = 2000) -> None:
        self.components = components
        self.neighbours = neighbours
        self.genes = genes

    def describe(self) -> str:
        chosen = "all genes" if self.genes is None else f"{self.genes} highly variable genes"
        return (
            f"log expression of {chosen}, unscaled; {self.components} principal components of the training cells; "
            f"{self.neighbours} nearest neighbours, equal votes"
        )

    def fit(self, adata: anndata.AnnData, label: str, seed: int = 0) -> KNNOnPCA:
        """Fit the components and remember the training cells. Raises ScfmError for unusable values or labels."""
        from sklearn.neighbors import KNeighborsClassifier

        labels = read_labels(adata, label)
        self.pca = HVGPCA(self.genes, self.components).fit(adata, seed=seed)
        self.knn = KNeighborsClassifier(min(self.neighbours, len(labels))).fit(self.pca.embed(adata), labels)
        self.classes: list[str] = self.knn.classes_.tolist()
        return self

    def embed(self, adata: anndata.AnnData) -> NDArray[np.float64]:
        """Return the principal components, (n, components)."""
        return self.pca.embed(adata)

    def predict(self, adata: anndata.AnnData) -> tuple[NDArray[np.str_], NDArray[np.float64]]:
        """Return labels (n,) and the neighbours' votes as probabilities (n, C), columns as in `classes`."""
        votes = self.knn.predict_proba(self.embed(adata))
        return np.array(self.classes)[votes.argmax(1)], votes
