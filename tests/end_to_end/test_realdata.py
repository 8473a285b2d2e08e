"""README's commands on a part of real cells: the model learns, and its embedding tells cell types apart."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from scfm.baselines.mean_value import baselines_of
from scfm.cli import main
from scfm.metrics_file import read_metrics
from scfm.pretrained import PretrainedModel, load

pytestmark = pytest.mark.realdata

SOURCES = ["pbmc1k_v2_10x.h5ad", "pbmc_donorA_10x.h5ad"]
VALUES = (
    "[{name: gep, loss: cross_entropy}, {name: gepc, loss: cross_entropy}]"  # one pass: a cell prompt costs another
)
PANEL = "kang_ctrl_5donors_2511g.h5ad"  # so few cells say something of 2,511 genes, not of 33,538


def knn_accuracy(model: PretrainedModel, cells: anndata.AnnData) -> float:
    embedding = model.embed(cells.copy()).obsm["X_scfm"]
    labels = cells.obs["cell_type"].to_numpy(dtype=str)
    return float(cross_val_score(KNeighborsClassifier(10), embedding, labels, cv=5).mean())


def test_pretraining_beats_the_mean_and_an_untrained_model(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "pretrain"
    panel = anndata.read_h5ad(folder / PANEL, backed="r").var["ensembl_id"]
    (tmp_path / "panel.txt").write_text("\n".join(panel[panel != ""]))
    sources = [str(folder / name) for name in SOURCES]
    prepare = ["prepare", *sources, "--out", str(tmp_path / "shards"), "--vocabulary", str(tmp_path / "panel.txt")]
    assert main(prepare) == 0
    recipe = ["pretrain", "--config", "recipes/pretrain/quickstart.yaml", "--data.shards", str(tmp_path / "shards")]
    run = tmp_path / "run"
    options = ["--trainer.max_epochs", "3", "--objectives", VALUES]
    assert main([*recipe, "--out", str(run), *options, "--trainer.accelerator", "cpu"]) == 0

    metrics = read_metrics(run / "metrics.csv")
    error = min(value for _, name, value in metrics if name == "valid/gep_mse")
    baselines = baselines_of(metrics)
    assert error < baselines["global mean"]
    assert error < baselines["gene mean"]

    cells = anndata.read_h5ad(shared / "data" / "annotation" / "pbmc3k_10x.h5ad")
    cells = cells[cells.obs["cell_type"] != "unknown"]
    cells = cells[np.random.default_rng(0).choice(cells.n_obs, 900, replace=False)].copy()
    trained = load(run / "model")
    torch.manual_seed(0)
    untrained = PretrainedModel(trained.files.build(), trained.files, "untrained")
    assert knn_accuracy(trained, cells) > knn_accuracy(untrained, cells) + 0.05
