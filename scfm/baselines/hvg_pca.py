"""Principal components of the highly variable genes: the embedding that every other one must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from scfm.baselines.inputs import ExpressionRule, read_labels
from scfm.errors import ScfmError
from scfm.threads import same_threads

if TYPE_CHECKING:
    import anndata


class HVGPCA:
    """Log expression of the highly variable genes, unscaled, to principal components.

    Genes and components are learned from the cells given to `fit` and from no others. As a baseline of integration it
    leaves batches where they are; the batch column only chooses genes that vary within batches, as scIB does.

    Args:
        genes: Highly variable genes; all genes where there are fewer, or with None.
        components: Principal components; capped by the number of cells and genes.
    """

    name = "HVG + PCA"

    def __init__(self, genes: int | None = 2000, components: int = 50) -> None:
        self.genes = genes
        self.components = components

    def describe(self) -> str:
        chosen = "all genes" if self.genes is None else f"{self.genes} highly variable genes"
        return f"log expression of {chosen}, unscaled; {self.components} principal components; nothing is integrated"

    def fit(self, adata: anndata.AnnData, batch: str | None = None, seed: int = 0) -> HVGPCA:
        """Choose genes and fit components. Raises ScfmError for unusable values, or a batch column with gaps."""
        from sklearn.decomposition import PCA

        self.rule = ExpressionRule.learn(adata)
        expression = self.rule.apply(adata)
        self.columns = highly_variable(expression, self.genes, None if batch is None else read_labels(adata, batch))
        chosen = expression[:, self.columns]
        # the iterative solver centres a sparse matrix without ever making it dense; it needs rank to spare
        components = max(1, min(self.components, min(chosen.shape) - 1))
        self.pca = PCA(components, svd_solver="arpack", random_state=seed).fit(chosen)
        return self

    def embed(self, adata: anndata.AnnData) -> NDArray[np.float64]:
        """Return the principal components, (n, components)."""
        return self.pca.transform(self.rule.apply(adata)[:, self.columns])

    def fit_embed(self, adata: anndata.AnnData, batch: str | None, seed: int = 0) -> NDArray[np.float32]:
        """Fit on all cells and return their components, (n, components)."""
        return self.fit(adata, batch, seed).embed(adata).astype(np.float32)


def highly_variable(
    expression: csr_matrix, genes: int | None, batches: NDArray[np.str_] | None = None
) -> NDArray[np.int64]:
    """Return the columns of the genes with the largest dispersion for their mean, in column order.

    Dispersions are compared within 20 bins of mean expression (Satija et al. 2015, as scanpy computes them: flavour
    `seurat`). With batches, genes that vary within many of them come first; batches of a single cell have no say.

    Args:
        expression: (n, G) log expression.
        genes: How many; None for all.
        batches: (n,) names.
    """
    import pandas as pd
    import scanpy
    from anndata import AnnData

    n, total = expression.shape
    if genes is None or genes >= total:
        return np.arange(total)
    cells = AnnData(expression)
    if batches is not None:
        _, members, sizes = np.unique(batches, return_inverse=True, return_counts=True)
        cells.obs["batch"] = pd.Categorical(batches)
        cells = cells[sizes[members] > 1]
        if not cells.n_obs:
            raise ScfmError(f"each of the {n} cells is a batch of its own: no gene varies within a batch")
    with same_threads():
        table = scanpy.pp.highly_variable_genes(
            cells, n_top_genes=genes, flavor="seurat", batch_key=None if batches is None else "batch", inplace=False
        )
    return np.flatnonzero(table["highly_variable"].to_numpy())
