"""Small corpora for tests of the build: sources whose cells express enough genes to be told apart."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from scfm.data.prepare import prepare
from scfm.data.shards import open_shards, read_manifest
from scfm.data.store import CellStore

N_GENES = 150
GENES = [f"G{i:03}" for i in range(N_GENES)]
ASSAYS = ["10x 3' v3", "10x 3' v2", "Smart-seq2"]


def profiles(n: int, seed: int) -> NDArray[np.float32]:
    """Return counts of n cells, nearly all of which express more than 60 genes."""
    return np.random.default_rng(seed).poisson(1.0, (n, N_GENES)).astype(np.float32)


def write_source(path: Path, counts: NDArray, donors: int = 4, **uns: str) -> Path:
    """Write counts as h5ad, with donor, tissue, assay and a label in obs; every cell has its name in obs too."""
    n = len(counts)
    obs = pd.DataFrame(
        {
            "donor_id": pd.Categorical([f"{path.stem}-d{i * donors // n}" for i in range(n)]),
            "tissue": pd.Categorical(["lung" if i % 10 else "liver" for i in range(n)]),
            "assay": pd.Categorical([ASSAYS[i % 3] for i in range(n)]),
            "cell_name": pd.Categorical([f"{path.stem}:{i}" for i in range(n)]),
        },
        index=[f"{path.stem}:{i}" for i in range(n)],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    adata = anndata.AnnData(csr_matrix(counts), obs=obs, var=pd.DataFrame(index=GENES), uns=dict(uns))
    adata.write_h5ad(path, compression="gzip")
    return path


def corpus(folder: Path, sizes: tuple[int, ...] = (300, 200, 250)) -> Path:
    """Write a folder of sources `a.h5ad`, `b.h5ad` ..., all of whose cells differ."""
    for number, size in enumerate(sizes):
        write_source(folder / f"{chr(ord('a') + number)}.h5ad", profiles(size, seed=number))
    return folder


def dense(store: CellStore) -> NDArray[np.float64]:
    """(cells, N_GENES) values of a store, genes in the order of `GENES`."""
    parts = [csr_matrix((b.values, b.genes, b.offsets), (b.n_cells, store.vocabulary.n_genes)) for b in store.in_turn()]
    columns = [store.vocabulary.names.index(gene) for gene in GENES]
    return np.concatenate([part.toarray() for part in parts])[:, columns].astype(np.float64)


def names(store: CellStore, column: str = "cell_name") -> list[str]:
    """Return the category of every cell in an obs column, "" for none."""
    held = store.obs[column]
    return [held.categories[code] if code >= 0 else "" for code in np.asarray(held.codes).tolist()]


def same_directories(one: Path, other: Path) -> bool:
    """Say whether two shard directories are equal byte for byte but for where their sources lay."""
    files = [sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file()) for out in (one, other)]
    held = [file for file in files[0] if file.name != "manifest.json"]
    return files[0] == files[1] and all((one / file).read_bytes() == (other / file).read_bytes() for file in held)


def unchanged(out: Path, *sources: tuple[str, NDArray]) -> bool:
    """Say whether a directory with obs column `cell_name` holds each cell of the sources once, with its own counts."""
    store = open_shards(out)
    expected = {f"{stem}:{i}": row for stem, counts in sources for i, row in enumerate(counts)}
    found = names(store)
    cells = dense(store)
    return sorted(found) == sorted(expected) and all((expected[n] == cells[i]).all() for i, n in enumerate(found))


def build_process(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start `scfm prepare` with small units (see tests/small_units.py), in a process of its own."""
    script = Path(__file__).parent / "small_units.py"
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


SIZES = (300, 200, 250)
OPTIONS = ["--obs", "cell_name", "--cells-per-shard", "60", "--hold-out-by", "donor_id", "--hold-out-fraction", "0.1"]


def interrupt(*_: object) -> None:
    """Stand in for a step of a build that the user stops."""
    raise KeyboardInterrupt


def prepared(sources: Path, out: Path, **options: object) -> None:
    keys = {"obs": ["cell_name"], "cells_per_shard": 60, "hold_out_by": "donor_id", "hold_out_fraction": 0.1}
    prepare([sources], out, **(keys | options))  # type: ignore[arg-type]


def equal(out: Path, undisturbed: Path) -> bool:
    """The same bytes, the same hash, and no trace of the work."""
    left = [path for path in out.parent.iterdir() if path != out and path.name.startswith(".")]
    hashes = [read_manifest(directory)["hash"] for directory in (out, undisturbed)]
    return not left and hashes[0] == hashes[1] and same_directories(out, undisturbed)


def finished(building: Path) -> dict[str, int]:
    """Return the finished pieces of work, each with the time that it was finished at."""
    places = [*building.glob("survey/*.json"), *building.glob("units/*.npz"), *building.glob("shard-*.json")]
    times = {}
    for path in places:
        with suppress(FileNotFoundError):  # a build that is done tidies up
            times[path.name] = path.stat().st_mtime_ns
    return times
