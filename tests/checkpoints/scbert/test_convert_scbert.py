"""`scfm convert` for scBERT as a user meets it, and what a converted model then does with cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from cells import made_up_cells
from safetensors.torch import load_file
from scbert_cases import ATOL, RTOL
from scbert_models import NAMES, a_model, pack_of, write_checkpoint
from scgpt_folders import same
from torch import Tensor

import scfm
from scfm.checkpoints.native import read_model, read_weights, write_model
from scfm.cli import main

CELLS = 12
FILES = ("config.json", "conditions.json", "training_data.json", "vocab.json", "README.md", "model.safetensors")
LABELS = [f"type {i}" for i in range(5)]


def convert(*arguments: Any) -> int:
    return main(["convert", *map(str, arguments)])


@pytest.fixture
def state(shared: Path) -> dict[str, Tensor]:
    """The stored fine-tuned model, with gene vectors that float32 holds."""
    state = load_file(shared / "golden/scbert/finetune_head/state_dict.safetensors")
    return state | {"pos_emb.emb.weight": state["pos_emb.emb.weight"].float().double()}


@pytest.fixture
def tuned(state: dict[str, Tensor], tmp_path: Path) -> list[Any]:
    """A fine-tuned checkpoint, and the options that convert it."""
    path, listed = write_checkpoint(tmp_path / "tuned_best.pth", state)
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    return [path, "--vocabulary", listed, "--labels", tmp_path / "labels.txt"]


def cells_of(path: Path, n: int = CELLS) -> Path:
    """Write cells that have most of the model's genes, in another order, and some that it does not know."""
    genes = [*(f"X{i}" for i in range(10)), *NAMES[:3:-1]]
    made_up_cells(n, genes=genes).write_h5ad(path)
    return path


def ids_of(adata: anndata.AnnData) -> Tensor:
    """Return scBERT's ids, (N, 128): log2 of 1 + counts per 10,000 of known genes, rounded down, at most 5; last 0."""
    counts = np.zeros((adata.n_obs, len(NAMES) + 1))
    for column, name in enumerate(NAMES):
        if name in adata.var_names:
            counts[:, column] = adata[:, name].X.toarray()[:, 0]
    return torch.from_numpy(np.log2(1 + 1e4 * counts / counts.sum(1, keepdims=True)).clip(max=5)).long()


@pytest.mark.golden
def test_there_and_back(tuned: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(*tuned, "--to", "native", "--out", tmp_path / "model") == 0
    printed = capsys.readouterr().out
    for said in (
        "layout layers: 55 tensors, 209,735 parameters",
        "parts: token_emb 1, pos_emb 1, performer 43, norm 2, to_out 8",
        "left behind: optimizer_state_dict",
        "note: pos_emb.emb.weight is float64 in scBERT and float32 here, which holds its values exactly",
        f"written: {tmp_path}/model",
    ):
        assert said in printed
    assert convert(tmp_path / "model", "--to", "scbert", "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert (
        "note: scBERT's file does not say how to build its model: PerformerLM(num_tokens=7, max_seq_len=128, "
        in printed
    )
    states = [torch.load(p, weights_only=True)["model_state_dict"] for p in (tuned[0], tmp_path / "out/scbert.pth")]
    assert same(*states)
    assert convert(tmp_path / "out", "--to", "native", "--out", tmp_path / "again") == 0
    for name in (
        "config.json",
        "conditions.json",
        "training_data.json",
        "vocab.json",
        "README.md",
        "model.safetensors",
    ):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


@pytest.mark.golden
def test_cells_are_embedded_and_labelled(tuned: list[Any], state: dict[str, Tensor], tmp_path: Path) -> None:
    model, cells = tmp_path / "model", cells_of(tmp_path / "cells.h5ad")
    assert convert(*tuned, "--to", "native", "--out", model) == 0
    for verb in ("embed", "predict"):
        assert main([verb, str(cells), "--model", str(model), "--out", str(tmp_path / f"{verb}.h5ad")]) == 0
    embedded, predicted = (anndata.read_h5ad(tmp_path / f"{verb}.h5ad") for verb in ("embed", "predict"))
    loaded = scfm.load(model)
    network: Any = loaded.network
    with torch.no_grad():
        batch = pack_of(ids_of(anndata.read_h5ad(cells)), loaded.files.vocabulary)
        tokens, _ = network.backbone(batch)
        logits = network(batch).predictions["annotation"]
    mean = torch.nn.functional.normalize(tokens.view(CELLS, 128, -1).mean(1), dim=-1)
    np.testing.assert_allclose(embedded.obsm["X_scfm"], mean, atol=ATOL, rtol=RTOL)
    probabilities = logits.softmax(-1)
    np.testing.assert_allclose(predicted.obsm["annotation_probabilities"], probabilities, atol=ATOL, rtol=RTOL)
    assert list(predicted.obs["annotation"]) == [LABELS[i] for i in probabilities.argmax(-1).tolist()]


@pytest.mark.golden
def test_genes_go_by_their_names(tuned: list[Any], state: dict[str, Tensor], tmp_path: Path) -> None:
    """A checkpoint of the same model in another order of genes predicts the same; so does an export in that order."""
    cells = anndata.read_h5ad(cells_of(tmp_path / "cells.h5ad"))
    assert convert(*tuned, "--to", "native", "--out", tmp_path / "model") == 0
    order = np.random.default_rng(0).permutation(127).tolist()
    permuted = state | {
        "pos_emb.emb.weight": state["pos_emb.emb.weight"][[*order, 127]],
        "to_out.fc1.weight": state["to_out.fc1.weight"][:, [*order, 127]],
    }
    path, listed = write_checkpoint(tmp_path / "permuted.pth", permuted, [NAMES[i] for i in order])
    options = ["--vocabulary", listed, "--labels", tmp_path / "labels.txt"]
    assert convert(path, *options, "--to", "native", "--out", tmp_path / "other") == 0
    first, second = (scfm.load(tmp_path / name).predict(cells.copy()) for name in ("model", "other"))
    key = "annotation_probabilities"
    np.testing.assert_allclose(first.obsm[key], second.obsm[key], atol=1e-6)
    assert convert(tmp_path / "model", "--to", "scbert", "--vocabulary", listed, "--out", tmp_path / "out") == 0
    assert same(torch.load(tmp_path / "out/scbert.pth", weights_only=True)["model_state_dict"], permuted)
    assert (tmp_path / "out/genes.txt").read_text() == listed.read_text()
    assert convert(tmp_path / "out", "--to", "native", "--out", tmp_path / "again") == 0
    assert same(read_weights(tmp_path / "again"), read_weights(tmp_path / "model"))


@pytest.mark.golden
def test_gene_tables_tell_ensembl_ids(shared: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    path, listed = write_checkpoint(tmp_path / "model.pth", state, ["TP53", "CD3D", *NAMES[2:]])
    table = shared / "data/gene_vocab/hgnc_complete.parquet"
    out = tmp_path / "model"
    assert convert(path, "--vocabulary", listed, "--genes", table, "--to", "native", "--out", out) == 0
    known = [gene.ensembl for gene in read_model(out).vocabulary.entries[:3]]
    assert known == ["ENSG00000141510", "ENSG00000167286", None]


def test_what_cannot_be_done_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, weights = a_model("compat")
    write_model(tmp_path / "model", weights, files)
    assert convert(tmp_path / "model", "--to", "scbert", "--out", tmp_path / "scbert") == 0
    path, out = tmp_path / "scbert/scbert.pth", tmp_path / "out"
    (tmp_path / "genes.txt").write_text("G01\nNEW\n")
    capsys.readouterr()
    for arguments, message in (
        ([path, "--to", "native", "--args", "a.json", "--allow", "dab"], "--args, --allow: has no meaning for"),
        ([path, "--to", "native", "--vocabulary", tmp_path / "genes.txt"], "so no option is needed"),
        ([path, "--to", "scgpt"], "a model of the kind scbert is none of scGPT's"),
        ([path, "--to", "native", "--add-genes", tmp_path / "genes.txt"], "--add-genes: a model of the kind scbert"),
        ([tmp_path / "model", "--to", "scgpt"], "a model of the kind scbert is none of scGPT's"),
        ([tmp_path / "model", "--to", "scbert", "--labels", "l.txt"], "--labels: has no meaning for"),
        (
            [tmp_path / "model", "--to", "scbert", "--vocabulary", tmp_path / "genes.txt"],
            "1 genes are not in the model",
        ),
        ([tmp_path / "model", "--to", "scbert", "--drop", "nothing"], "--drop nothing matches no tensor"),
    ):
        assert convert(*arguments, "--out", out) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()
