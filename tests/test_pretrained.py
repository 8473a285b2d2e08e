"""A trained model over AnnData: the same cell gives the same embedding, whatever surrounds it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from anndata import AnnData
from cells import TYPES, made_up_cells
from runs import tiny_recipe, write_shards

import scfm
from scfm.errors import ScfmError
from scfm.model.heads import HeadSpec
from scfm.training.run import pretrain

QUICK = {"trainer": {"max_epochs": 8, "accelerator": "cpu"}, "optimizer": {"lr": 1e-2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    conditioned = {"layers": 2, "cell_conditions": ["batch"]}
    # 12 genes at most: every cell is sampled down, so that a draw that depends on its neighbours would show
    return pretrain(
        tiny_recipe(write_shards(place / "shards"), place / "run", model=conditioned, data={"max_genes": 12})
    )


@pytest.fixture(scope="module")
def model(folder: Path) -> scfm.PretrainedModel:
    return scfm.load(folder)


def embedding(model: scfm.PretrainedModel, adata: AnnData, tokens_per_pack: int = 16384) -> np.ndarray:
    return model.embed(adata.copy(), tokens_per_pack=tokens_per_pack).obsm["X_scfm"]


def test_same_cell_same_embedding_alone_in_a_batch_shuffled_and_in_any_chunk(model: scfm.PretrainedModel) -> None:
    cells = made_up_cells(300, seed=5)
    together = embedding(model, cells)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)
    alone = np.concatenate([embedding(model, cells[[i]]) for i in (0, 17, 299)])
    np.testing.assert_allclose(alone, together[[0, 17, 299]], atol=1e-6)
    order = np.random.default_rng(0).permutation(300)
    np.testing.assert_allclose(embedding(model, cells[order]), together[order], atol=1e-6)
    for tokens_per_pack in (20, 111, 100_000):
        np.testing.assert_allclose(embedding(model, cells, tokens_per_pack), together, atol=1e-6)


def test_gene_order_and_unknown_genes_change_nothing(model: scfm.PretrainedModel) -> None:
    cells = made_up_cells(40, seed=5)
    novel = made_up_cells(40, seed=6, genes=[f"novel{i}" for i in range(9)])
    novel.obs_names = cells.obs_names
    more = anndata.concat([cells, novel], axis="var")[:, ::-1].copy()
    np.testing.assert_allclose(embedding(model, more), embedding(model, cells), atol=1e-6)


def test_cells_differ(model: scfm.PretrainedModel) -> None:
    assert np.ptp(embedding(model, made_up_cells(30, seed=5)), axis=0).max() > 1e-3


def test_the_callers_x_is_untouched_and_provenance_is_written(model: scfm.PretrainedModel, folder: Path) -> None:
    cells = made_up_cells(10, seed=6)
    before = cells.X.copy()
    result = model.embed(cells)
    assert result is cells
    assert (before != cells.X).nnz == 0
    assert cells.uns["scfm"]["model"] == str(folder)
    assert cells.uns["scfm"]["genes_in_data"] == 60


def test_a_cell_without_a_known_gene_still_has_a_row(model: scfm.PretrainedModel) -> None:
    cells = made_up_cells(3, seed=6)
    cells.X = cells.X.multiply(np.array([[1], [0], [1]])).tocsr()
    assert np.isfinite(embedding(model, cells)).all()


def test_wrong_values_are_named(model: scfm.PretrainedModel) -> None:
    cells = made_up_cells(3, seed=6)
    cells.X = cells.X.log1p()
    with pytest.raises(ScfmError, match="log-normalised"):
        model.embed(cells)
    cells = made_up_cells(3, seed=6)
    cells.var_names = [f"ENSMUSG{i:011}" for i in range(60)]
    with pytest.raises(ScfmError, match="none of its 60 genes is in the vocabulary"):
        model.embed(cells)
    assert "X_scfm" not in cells.obsm


def test_finetune_predicts_types_and_leaves_the_model_as_it_was(model: scfm.PretrainedModel, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    data = {"max_genes": 60, "mask_ratios": [0], "cells_per_batch": 8}
    # at QUICK's rate one seed in two ends at .65; at this one all of four reach .97
    steady = {"trainer": {"max_epochs": 20, "accelerator": "cpu"}, "optimizer": {"lr": 5e-3}}
    tuned = model.finetune(made_up_cells(150, seed=7), "annotation", data=data, **steady)
    assert all((before[name] == tensor).all() for name, tensor in model.network.state_dict().items())
    result = tuned.predict(made_up_cells(90, seed=8))
    assert (result.obs["annotation"].astype(str) == result.obs["cell_type"].astype(str)).mean() > 0.9
    assert result.uns["scfm"]["labels"]["annotation"] == TYPES
    probabilities = result.obsm["annotation_probabilities"]
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(result.obs["annotation_probability"], probabilities.max(1))
    further = tuned.finetune(made_up_cells(150, seed=9), "annotation", data=data, **QUICK)
    assert model.files.cell_hashes is not None
    assert len(further.files.cell_hashes) == len(model.files.cell_hashes) + 150 + 150
    tuned.save_pretrained(tmp_path / "tuned")
    again = scfm.load(tmp_path / "tuned").predict(made_up_cells(90, seed=8))
    np.testing.assert_array_equal(again.obsm["annotation_probabilities"], probabilities)


def test_unsure_cells_are_unassigned_and_their_probabilities_stay(model: scfm.PretrainedModel, tmp_path: Path) -> None:
    tuned = model.finetune(made_up_cells(150, seed=7), trainer={"max_epochs": 2, "accelerator": "cpu"})
    cells = made_up_cells(90, seed=8)
    plain = tuned.predict(cells.copy())
    assert plain.obs["annotation"].cat.categories.tolist() == TYPES
    assert "unassigned_below" not in plain.uns["scfm"]
    threshold = float(plain.obs["annotation_probability"].median())
    told = tuned.predict(cells.copy(), unassigned_below=threshold)
    unsure = (plain.obs["annotation_probability"] < threshold).to_numpy()
    assert 0 < unsure.sum() < 90
    labels, expected = told.obs["annotation"].astype(str), plain.obs["annotation"].astype(str)
    assert (labels == np.where(unsure, "Unassigned", expected)).all()
    assert told.obs["annotation"].cat.categories.tolist() == [*TYPES, "Unassigned"]
    np.testing.assert_array_equal(told.obsm["annotation_probabilities"], plain.obsm["annotation_probabilities"])
    np.testing.assert_array_equal(told.obs["annotation_probability"], plain.obs["annotation_probability"])
    assert told.uns["scfm"]["unassigned_below"] == threshold
    told.write_h5ad(tmp_path / "told.h5ad")
    with pytest.raises(ScfmError, match="unassigned_below: 50 is not a probability"):
        tuned.predict(cells, unassigned_below=50)


def test_a_cell_at_the_threshold_is_assigned() -> None:
    head = HeadSpec("annotation", "cls", 2, ["A", "B"])
    cells = made_up_cells(3)
    logits = np.array([[0, 0], [0.1, 0], [-1, 0]], np.float32)
    scfm.PretrainedModel.write_labels(cells, head, logits, 0.5)
    assert cells.obs["annotation"].tolist() == ["A", "A", "B"]
    scfm.PretrainedModel.write_labels(cells, head, logits, 0.6)
    assert cells.obs["annotation"].tolist() == ["Unassigned", "Unassigned", "B"]


def test_finetuning_frozen_moves_the_classifier_alone(model: scfm.PretrainedModel) -> None:
    tuned = model.finetune(made_up_cells(60, seed=7), trainable=["heads.*"], **QUICK)
    before, after = model.network.backbone.state_dict(), tuned.network.backbone.state_dict()
    assert all((before[name] == after[name]).all() for name in after)


def test_the_tuned_model_knows_all_cells_it_has_seen(model: scfm.PretrainedModel, tmp_path: Path) -> None:
    from scfm.data.hashing import load_hashes

    out = tmp_path / "run"
    model.finetune(made_up_cells(60, seed=7), out=str(out), **QUICK)
    assert model.files.cell_hashes is not None
    assert len(load_hashes(out / "model" / "cells.hash")) == len(model.files.cell_hashes) + 60


def test_what_a_model_cannot_do_is_said(model: scfm.PretrainedModel) -> None:
    with pytest.raises(ScfmError, match="has no head that predicts labels"):
        model.predict(made_up_cells(3))
    with pytest.raises(ScfmError, match="'telepathy' is not known"):
        model.finetune(made_up_cells(3), "telepathy")
    with pytest.raises(ScfmError, match="max_gens"):
        model.finetune(made_up_cells(60), data={"max_gens": 3})


def test_values_that_are_no_counts_are_taken_where_the_caller_says_so(model: scfm.PretrainedModel) -> None:
    """log1p keeps the order within a cell, and here no quantile falls between two values: the same bins."""
    counts, logged = made_up_cells(6, seed=6), made_up_cells(6, seed=6)
    logged.X = logged.X.log1p()
    embedded = model.embed(logged, accept_normalised=True)
    assert embedded.uns["scfm"]["values"] == "normalised"
    difference = np.abs(embedded.obsm["X_scfm"] - model.embed(counts).obsm["X_scfm"]).max(1)
    assert difference.max() < 0.2


def test_the_domain_of_a_cell_is_read_from_obs_and_an_unknown_one_is_counted(model: scfm.PretrainedModel) -> None:
    files = replace(
        model.files,
        model=replace(model.files.model, input_norm="domain", domain="batch", cell_conditions=[]),
        cell_conditions={"batch": ["batch0", "batch1"]},
        heads=[],
    )
    torch.manual_seed(0)
    network = files.build()
    network.backbone.input_norm.running_mean.copy_(torch.randn(2, files.model.width))
    normed = scfm.PretrainedModel(network, files, "made up")
    cells = made_up_cells(4, seed=6)
    by_batch = normed.embed(cells.copy()).obsm["X_scfm"]
    assert normed.embed(cells.copy()).uns["scfm"]["cells_of_unknown_condition"] == {"batch": 0}
    cells.obs["batch"] = ["batch0", "batch0", "new", "batch1"]
    other = normed.embed(cells)
    assert other.uns["scfm"]["cells_of_unknown_condition"] == {"batch": 1}
    changed = np.abs(other.obsm["X_scfm"] - by_batch).max(1) > 1e-4
    assert changed.tolist() == [False, True, True, False]
    del cells.obs["batch"]
    assert normed.embed(cells).uns["scfm"]["cells_of_unknown_condition"] == {"batch": 4}


def test_embedding_through_a_table_of_genes_says_which(model: scfm.PretrainedModel, tmp_path: Path) -> None:
    """Half of the genes bear old names: the table finds them, so that nothing changes."""
    from scfm.data.gene_table import GeneTable

    table = tmp_path / "hgnc.tsv"
    rows = [f"ENSG{i:011}\tG{i:03}\tOLD{i}\t" for i in range(30)]
    table.write_text("\n".join(["ensembl_gene_id\tsymbol\tprev_symbol\talias_symbol", *rows]) + "\n")
    cells, renamed = made_up_cells(10, seed=6), made_up_cells(10, seed=6)
    renamed.var_names = [f"OLD{i}" if i < 30 else name for i, name in enumerate(renamed.var_names)]
    found = model.embed(renamed, genes=GeneTable.read([table]))
    np.testing.assert_allclose(found.obsm["X_scfm"], model.embed(cells).obsm["X_scfm"], atol=1e-6)
    assert found.uns["scfm"]["gene_tables"] == [str(table)]
    found.write_h5ad(tmp_path / "embedded.h5ad")
    assert list(anndata.read_h5ad(tmp_path / "embedded.h5ad").uns["scfm"]["gene_tables"]) == [str(table)]
