"""A million cells in bounded memory: all processes of a build together; run by hand with -m slow."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix, vstack

from scfm.data.shards import read_manifest

CELLS, GENES, FILES = 50_000, 20_000, int(os.environ.get("SCFM_TEST_FILES", "20"))
GIB = 2**30


def wide_cells(path: Path) -> None:
    """Write gzipped cells that express about 1,500 of 20,000 genes each, as CELLxGENE's do."""
    rng = np.random.default_rng(0)
    rates = np.minimum(0.9, rng.lognormal(-3.3, 1.2, GENES)).astype(np.float32)
    parts = []
    for _ in range(CELLS // 1000):
        expressed = csr_matrix(rng.random((1000, GENES), np.float32) < rates)
        values = rng.geometric(0.6, expressed.nnz).astype(np.float32)
        parts.append(csr_matrix((values, expressed.indices, expressed.indptr), expressed.shape))
    obs = pd.DataFrame(
        {"donor_id": pd.Categorical([f"d{i % 10}" for i in range(CELLS)])}, index=np.arange(CELLS).astype(str)
    )
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in rng.permutation(GENES)])
    anndata.AnnData(vstack(parts, "csr"), obs=obs, var=var).write_h5ad(path, compression="gzip")


def proportional_memory(pid: int) -> int:
    """Return the bytes of a process and all below it, pages that several share counted once."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            total += 1024 * int(line.split()[1]) if line.startswith("Pss:") else 0
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            total += sum(proportional_memory(int(child)) for child in path.read_text().split())
    except (FileNotFoundError, ProcessLookupError):
        pass
    return total


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("memory", "workers"), [(4.0, 2), (1.5, 2)])
def test_a_million_cells_in_bounded_memory(tmp_path: Path, memory: float, workers: int) -> None:
    if shutil.disk_usage(tmp_path).free < 20 * GIB:
        pytest.skip("needs 20 GiB of room")
    (tmp_path / "files").mkdir()
    wide_cells(tmp_path / "files/00.h5ad")
    for number in range(1, FILES):
        os.link(tmp_path / "files/00.h5ad", tmp_path / f"files/{number:02d}.h5ad")
    options = ["--duplicates", "keep", "--workers", str(workers), "--memory", str(memory)]
    command = [sys.executable, "-m", "scfm.cli", "prepare", str(tmp_path / "files"), "--out", str(tmp_path / "out")]
    begun, peak = time.monotonic(), 0
    build = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while build.poll() is None:
        peak = max(peak, proportional_memory(build.pid))
        time.sleep(0.1)
    seconds, spent = time.monotonic() - begun, os.times()
    manifest = read_manifest(tmp_path / "out")
    print(
        f"{manifest['cells']:,} cells, {manifest['tokens'] / manifest['cells']:.0f} genes each, {workers} workers: "
        f"{seconds:.0f} s, {spent.children_user + spent.children_system:.0f} CPU s, peak {peak / GIB:.2f} GiB"
    )
    assert manifest["cells"] == CELLS * FILES
    assert peak <= memory * GIB
