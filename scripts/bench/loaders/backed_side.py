"""Plain AnnData: h5ad files opened backed and joined by AnnCollection, through its AnnLoader.

backed_side.py raw FOLDER CELLS
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from measured import measure

BATCH = 64


def raw(folder: Path, cells: int) -> None:
    """Deliver batches of 64 truly random cells, as one question of sorted rows each, as AnnLoader asks it."""
    import anndata
    from anndata.experimental import AnnCollection

    def open_loader() -> Iterator[int]:
        files = [anndata.read_h5ad(path, backed="r") for path in sorted(folder.glob("cells-*.h5ad"))]
        collection = AnnCollection(files, join_vars="inner")
        order = np.random.default_rng(0).permutation(collection.n_obs)
        batches = (np.sort(order[at : at + BATCH]) for at in range(0, len(order) - BATCH, BATCH))
        return (collection[batch].X.shape[0] for batch in batches)

    measure(open_loader, cells, ["anndata", "h5py"])


if __name__ == "__main__":
    raw(Path(sys.argv[2]), int(sys.argv[3]))
