"""Shard directories to look into, in both codecs."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpora import profiles, write_source

from scfm.data.prepare import prepare

SIZES = {"a": 300, "b": 200, "c": 250}


@pytest.fixture(scope="package")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources; ten cells of `b` are cells of `a`; G149 is never expressed, counts go up to some thousands."""
    folder = tmp_path_factory.mktemp("sources")
    counts = {name: profiles(n, seed) for seed, (name, n) in enumerate(SIZES.items())}
    for of in counts.values():
        of[:, 0] *= 1000
        of[:, 149] = 0
    counts["b"][:10] = counts["a"][:10]
    for name, of in counts.items():
        write_source(folder / f"{name}.h5ad", of, title=f"title of {name}")
    return folder


@pytest.fixture(scope="package", params=["packed", "list"])
def shards(request: pytest.FixtureRequest, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "shards"
    prepare(
        [files],
        out,
        obs=["tissue", "assay", "donor_id", "cell_name"],
        where=["assay!=Smart-seq2"],
        codec=request.param,
        cells_per_shard=60,
        hold_out_by="donor_id",
        hold_out_fraction=0.1,
    )
    return out
