"""Where a score comes from: the commit, the versions, the machine, and the hash of the data."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scfm.version import __version__

if TYPE_CHECKING:
    import anndata

PACKAGES = ("torch", "numpy", "numba", "lightning", "scikit-learn", "scanpy", "anndata")


def commit() -> str | None:
    """Return the commit of this checkout, with `+changes` where files differ from it; None for an installed package."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top, head = git("rev-parse", "--show-toplevel"), git("rev-parse", "HEAD")
    # an installed copy may lie inside somebody else's repository
    if not top or not head or Path(top) != root:
        return None
    return head + "+changes" if git("status", "--porcelain", "--untracked-files=no") else head


def versions() -> dict[str, str]:
    """Return the versions of the packages that matter, of those that are installed."""
    found = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def provenance() -> dict[str, Any]:
    """Return commit, versions, machine and time as plain types."""
    return {
        "scfm": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "versions": versions(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def data_hash(adata: anndata.AnnData, label: str) -> str:
    """Return the sha256 of what is scored: cell names, gene names, labels and the non-zero expression values."""
    from scipy.sparse import csr_matrix

    source = adata if adata.raw is None else adata.raw
    values = csr_matrix(source.X, copy=True)
    values.sum_duplicates()
    values.eliminate_zeros()
    digest = hashlib.sha256()
    for names in (adata.obs_names, source.var_names, adata.obs[label]):
        digest.update("\n".join(map(str, names)).encode() + b"\0")
    for array, kind in ((values.indptr, np.int64), (values.indices, np.int64), (values.data, np.float64)):
        digest.update(np.ascontiguousarray(array, dtype=kind).tobytes())
    return digest.hexdigest()
