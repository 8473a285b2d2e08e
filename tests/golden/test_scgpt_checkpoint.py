"""A checkpoint folder as scGPT publishes it, through the command line: converted, then cells embedded."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file
from scgpt_cases import by_token, compare, full_batch

import scfm
from scfm.cli import main

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def native(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("native") / "tiny"
    assert main(["convert", str(shared / "golden/scgpt/checkpoint_tiny"), "--to", "native", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@torch.no_grad()
def test_checkpoint_tiny_predicts_what_the_original_does(shared: Path, native: Path, dtype: torch.dtype) -> None:
    """The released package reads a generative checkpoint with full attention: as scfm with all genes known."""
    folder = shared / "golden/scgpt/checkpoint_tiny"
    model = scfm.load(native).network.to(dtype)
    inputs = load_file(folder / "inputs.safetensors")
    expected = load_file(folder / f"expected_outputs{'_f64' if dtype == torch.float64 else ''}.safetensors")
    batch, columns = full_batch(inputs, torch.zeros_like(inputs["src"], dtype=torch.bool))
    output = model(batch)
    compare("checkpoint_tiny", output.cell, expected["cell_emb"].to(dtype))
    genes = model.backbone.gene_embedding(batch.genes)
    values = {
        "mlm_output": model.heads["gep"](output.tokens).values,
        "mvc_output": model.heads["gepc"](genes, output.cell, batch.cell_of_token).values,
    }
    for name, ours in values.items():
        compare("checkpoint_tiny", ours, by_token(expected[name], columns).to(dtype))


@pytest.mark.parametrize(
    ("cells", "options", "stored", "name"),
    [
        ("cells", ["--accept-normalised"], "expected_embed_data", "cell_embeddings_unit_norm"),
        ("cells_counts", [], "expected_embed_counts", "cell_embeddings_unit_norm_left"),
    ],
)
def test_zero_shot_embeddings_are_those_of_embed_data(
    shared: Path, native: Path, tmp_path: Path, cells: str, options: list[str], stored: str, name: str
) -> None:
    folder = shared / "golden/scgpt/checkpoint_tiny"
    out = tmp_path / "embedded.h5ad"
    assert main(["embed", str(folder / f"{cells}.h5ad"), "--model", str(native), "--out", str(out), *options]) == 0
    expected = load_arrays(folder / f"{stored}.safetensors")[name]
    embedded = anndata.read_h5ad(out).obsm["X_scfm"]
    assert np.abs(embedded - expected).max() < 1e-5


def test_embeddings_repeat_in_any_order_and_chunk(shared: Path, native: Path) -> None:
    """The original's depend on its unseeded draws of ties: two of its runs differ by more than ours ever do."""
    folder = shared / "golden/scgpt/checkpoint_tiny"
    cells, model = anndata.read_h5ad(folder / "cells_counts.h5ad"), scfm.load(native)
    whole = model.embed(cells.copy()).obsm["X_scfm"]
    order = np.random.default_rng(0).permutation(cells.n_obs)
    chunked = model.embed(cells[order].copy(), tokens_per_pack=64).obsm["X_scfm"]
    assert np.abs(chunked - whole[order]).max() < 1e-6
    runs = load_arrays(folder / "expected_embed_counts.safetensors")
    assert np.abs(runs["random_tie_run1"] - runs["random_tie_run2"]).max() > 1e-2
