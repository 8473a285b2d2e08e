"""Tiny runs for tests: shards of made-up cells, and a recipe that trains on them in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from cells import made_up_cells

from scfm.data.expression import take_cells
from scfm.data.shards import ShardWriter
from scfm.data.sources import store_from_anndata
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.recipe import Recipe
from scfm.recipe_reader import merged, read_recipe

OBS = ["cell_type", "batch"]

TINY: dict[str, Any] = {
    "data": {"cells_per_batch": 16, "tokens_per_pack": 400, "max_genes": 30, "valid_fraction": 0.1},
    "model": {"width": 16, "heads": 2, "layers": 1, "hidden": 16, "dropout": 0.1},
    "objectives": [{"name": "gep"}, {"name": "gepc"}, {"name": "cell_prompt"}],
    "optimizer": {"lr": 1e-2},
    "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 6, "log_every_n_steps": 2},
    "checkpoint": {"every_steps": 2},
}


def write_shards(folder: Path, n: int = 120, seed: int = 0, cells_per_shard: int = 120) -> Path:
    """Write made-up cells as a shard directory; return it."""
    adata = made_up_cells(n, seed)
    vocabulary = Vocabulary.from_genes([Gene.of(None, name) for name in adata.var_names])
    store = store_from_anndata(adata, vocabulary, obs_columns=OBS)
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, vocabulary, "counts", {name: column.categories for name, column in store.obs.items()})
    for first in range(0, n, cells_per_shard):
        rows = np.arange(first, min(n, first + cells_per_shard))
        block, _, places = next(store.parts(rows))
        writer.write(take_cells(block, places), {name: column.codes[rows] for name, column in store.obs.items()})
    writer.finish([{"file": "made-up.h5ad", "kept": n}], shuffled=True)
    return folder


def tiny_recipe(shards: Path, out: Path, **sections: Any) -> Recipe:
    """Return a recipe for a tiny run; sections are merged over the tiny defaults."""
    here = {"out": str(out), "data": {"shards": str(shards)}}
    return read_recipe(None, merged(merged(TINY, here), sections))
