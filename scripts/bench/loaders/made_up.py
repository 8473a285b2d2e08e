"""Writes the cells that all loaders read: gzip-compressed h5ad files, as public data sets ship them."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from scfm.bench.cells import synthetic_block

FILES = 4
AT_A_TIME = 10_000  # cells that are made at once


def write_cells(folder: Path, cells: int, genes: int, expressed: int) -> list[Path]:
    """Write h5ad files of synthetic cells where they are not there yet, and return them.

    Args:
        folder: where they go.
        cells: in all files.
        genes: of every file.
        expressed: mean number of expressed genes in a cell.
    """
    paths = [folder / f"cells-{i}.h5ad" for i in range(FILES)]
    names = [f"ENSG{i:011d}" for i in range(genes)]
    for i, path in enumerate(paths):
        if path.exists():
            continue
        generator = np.random.default_rng(i)
        first, last = i * cells // FILES, (i + 1) * cells // FILES
        blocks = [
            synthetic_block(generator, min(AT_A_TIME, last - at), expressed, genes)
            for at in range(first, last, AT_A_TIME)
        ]
        counts = np.concatenate([block.values for block in blocks]).astype(np.float32)
        indices = np.concatenate([block.genes for block in blocks]).astype(np.int32)
        offsets = np.cumsum([0, *np.concatenate([np.diff(block.offsets) for block in blocks]).tolist()])
        adata = anndata.AnnData(
            csr_matrix((counts, indices, offsets), (last - first, genes)),
            obs=pd.DataFrame({"dataset": pd.Categorical([f"set {i}"] * (last - first))}),
            var=pd.DataFrame(index=names),
        )
        adata.obs_names = [f"cell-{at}" for at in range(first, last)]
        unfinished = path.with_suffix(".tmp")
        adata.write_h5ad(unfinished, compression="gzip")
        unfinished.rename(path)
    return paths
