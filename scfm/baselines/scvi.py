"""scVI: the deep method of batch integration that foundation models are compared with (Lopez et al. 2018)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scfm.baselines.hvg_pca import highly_variable
from scfm.baselines.inputs import ExpressionRule, read_labels
from scfm.errors import ScfmError

if TYPE_CHECKING:
    import anndata


class SCVI:
    """scVI of scvi-tools on counts of highly variable genes, set as in its integration tutorial. Needs `scfm[scvi]`.

    Transductive: it sees all the cells that it embeds.

    Args:
        genes: Highly variable genes, chosen within batches; None for all.
        epochs: Passes over the cells; None for scvi-tools' own rule (400, fewer beyond 20,000 cells).
    """

    name = "scVI"

    def __init__(self, genes: int | None = 2000, epochs: int | None = None) -> None:
        self.genes = genes
        self.epochs = epochs

    def describe(self) -> str:
        chosen = "all genes" if self.genes is None else f"{self.genes} highly variable genes"
        epochs = "the epochs of its own rule" if self.epochs is None else f"{self.epochs} epochs"
        return f"scVI with batches on counts of {chosen}: 2 layers, 30 latent dimensions, negative binomial; {epochs}"

    def fit_embed(self, adata: anndata.AnnData, batch: str | None, seed: int = 0) -> NDArray[np.float32]:
        """Return the latent means of all cells, (n, 30).

        Raises ScfmError where scvi-tools is not installed, or the cells hold no counts.
        """
        import pandas as pd
        from anndata import AnnData

        try:
            import scvi
        except ModuleNotFoundError as error:
            if error.name != "scvi":  # scvi-tools is there, and lacks a package of its own
                raise
            raise ScfmError("scVI needs scvi-tools, which is not installed: pip install 'scfm[scvi]'") from None
        rule = ExpressionRule.learn(adata)
        if rule.value_kind != "counts":
            raise ScfmError("scVI models counts, and these cells hold normalised values")
        batches = None if batch is None else read_labels(adata, batch)
        columns = highly_variable(rule.apply(adata), self.genes, batches)
        counts = (adata if adata.raw is None else adata.raw).X
        cells = AnnData(counts[:, columns].copy(), obs=pd.DataFrame(index=adata.obs_names.astype(str)))
        if batches is not None:
            cells.obs["batch"] = pd.Categorical(batches)
        scvi.settings.seed = seed
        scvi.model.SCVI.setup_anndata(cells, batch_key=None if batches is None else "batch")
        model = scvi.model.SCVI(cells, n_layers=2, n_latent=30, gene_likelihood="nb")
        model.train(max_epochs=self.epochs, accelerator="cpu", enable_progress_bar=False, logger=False)
        return np.asarray(model.get_latent_representation(), dtype=np.float32)
