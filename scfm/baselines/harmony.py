"""Harmony on principal components: the simple method of batch integration (Korsunsky et al. 2019)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scfm.baselines.hvg_pca import HVGPCA
from scfm.baselines.inputs import read_labels
from scfm.errors import ScfmError

if TYPE_CHECKING:
    import anndata


class Harmony:
    """Harmony on `HVGPCA`, with its published settings. Transductive: it sees all the cells that it embeds.

    Args:
        genes: Highly variable genes, chosen within batches; None for all.
        components: Principal components; capped by the number of cells and genes.
    """

    name = "Harmony"

    def __init__(self, genes: int | None = 2000, components: int = 50) -> None:
        self.genes = genes
        self.components = components

    def describe(self) -> str:
        chosen = "all genes" if self.genes is None else f"{self.genes} highly variable genes"
        return f"Harmony over batches, on {self.components} principal components of log expression of {chosen}"

    def fit_embed(self, adata: anndata.AnnData, batch: str | None, seed: int = 0) -> NDArray[np.float32]:
        """Return the corrected components of all cells, (n, components).

        Raises ScfmError without a batch column, for one batch only, or where the installed harmonypy has another form
        of output.
        """
        # called directly: scanpy's wrapper expects the transposed output of harmonypy before 2.0
        import pandas as pd
        from harmonypy import run_harmony

        if batch is None:
            raise ScfmError("Harmony needs the obs column of the batches")
        batches = read_labels(adata, batch)
        if len(set(batches)) < 2:
            raise ScfmError(f"all {len(batches)} cells have the same value of obs[{batch!r}]: nothing to integrate")
        components = HVGPCA(self.genes, self.components).fit(adata, batch, seed).embed(adata)
        found = run_harmony(components, pd.DataFrame({"batch": batches}), "batch", random_state=seed, verbose=False)
        corrected = np.asarray(found.Z_corr)
        if corrected.shape != components.shape:
            raise ScfmError(
                f"harmonypy returned {corrected.shape} for {components.shape[0]} cells of {components.shape[1]} "
                "components; install harmonypy 2.1 or newer"
            )
        return corrected.astype(np.float32)
