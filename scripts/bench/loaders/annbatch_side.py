"""annbatch, in an environment of its own: Python 3.12 or newer, `pip install annbatch[zarrs]==0.3.1`.

annbatch_side.py build FOLDER | raw FOLDER CHUNK CELLS
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import anndata
import numpy as np
import zarr
from annbatch import DatasetCollection, Loader
from measured import measure

PACKAGES = ["annbatch", "zarr", "zarrs", "anndata"]
IN_A_REQUEST = 16_384  # cells that are fetched together: annbatch's own default, 32 chunks of 512
MOST_TRUE_RANDOM = 4096  # where a chunk is a cell


def build(folder: Path) -> None:
    """Write the collection with its defaults, but counts in two bytes: its float32 would take more room and time."""
    started = time.process_time()
    files = [folder / f"annbatch-{path.stem}.h5ad" for path in sorted(folder.glob("cells-*.h5ad"))]
    for path, narrow in zip(sorted(folder.glob("cells-*.h5ad")), files, strict=True):
        adata = anndata.read_h5ad(path)
        adata.X = adata.X.astype(np.uint16)
        adata.write_h5ad(narrow)
    narrowed = time.process_time()
    out = zarr.open_group(str(folder / "annbatch.zarr"), mode="w", zarr_format=3)
    DatasetCollection(out).add_adatas(files, rng=np.random.default_rng(0))
    print(json.dumps({"cpu": time.process_time() - narrowed, "cpu_to_narrow": narrowed - started}))
    for path in files:
        path.unlink()


def only_cells(group: zarr.Group) -> anndata.AnnData:
    """Name what is delivered: the matrix, no obs."""
    return anndata.AnnData(X=anndata.io.sparse_dataset(group["X"]))


def raw(folder: Path, chunk: int, cells: int) -> None:
    """Deliver batches of 64 as it does: scipy matrices."""

    def open_loader() -> Iterator[int]:
        together = MOST_TRUE_RANDOM if chunk == 1 else IN_A_REQUEST
        loader = Loader(
            batch_size=64, chunk_size=chunk, preload_nchunks=together // chunk, shuffle=True, drop_last=True,
            rng=np.random.default_rng(0),
        )  # fmt: skip
        collection = DatasetCollection(zarr.open_group(str(folder / "annbatch.zarr"), mode="r"))
        loader.use_collection(collection, load_adata=only_cells)
        return (batch["X"].shape[0] for batch in loader)

    measure(open_loader, cells, PACKAGES)


if __name__ == "__main__":
    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    if sys.argv[1] == "build":
        build(Path(sys.argv[2]))
    else:
        raw(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
