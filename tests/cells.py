"""Small made-up cells with a structure that can be learned: types that express different genes."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

GENES = [f"G{i:03}" for i in range(60)]
TYPES = ["B cell", "NK cell", "T cell"]


def made_up_cells(n: int = 120, seed: int = 0, genes: list[str] = GENES, n_types: int = 3) -> anndata.AnnData:
    """Return n cells of raw counts; every type has its own highly expressed third of the genes."""
    rng = np.random.default_rng(seed)
    kind = np.arange(n) % n_types
    rates = np.full((n, len(genes)), 0.6)
    for k in range(n_types):
        rates[np.ix_(kind == k, np.arange(len(genes)) % n_types == k)] = 4.0
    counts = rng.poisson(rates * rng.lognormal(0, 0.3, (n, 1)))
    counts[:, 0] += 1
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical([TYPES[k] for k in kind]),
            "batch": pd.Categorical([f"batch{i % 2}" for i in range(n)]),
        },
        index=[f"cell{seed}-{i}" for i in range(n)],
    )
    return anndata.AnnData(csr_matrix(counts, dtype=np.float32), obs=obs, var=pd.DataFrame(index=genes))


def write_cells(path: Path, **options: object) -> Path:
    """Write made-up cells as h5ad; return the path."""
    made_up_cells(**options).write_h5ad(path)  # type: ignore[arg-type]
    return path
