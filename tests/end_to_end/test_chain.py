"""The whole chain on tiny data, through the command line as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import anndata
import pytest
from cells import GENES, made_up_cells

from scfm.checkpoints.native import read_model
from scfm.cli import main
from scfm.data.hashing import load_hashes
from scfm.metrics_file import read_metrics

PROCESSES = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp_fork"]


class CommandLine:
    """Runs verbs as they are typed, in this process: importing everything costs a new one many seconds."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object) -> str:
        """Run one verb; return what it printed."""
        self.capsys.readouterr()
        code = main(list(map(str, arguments)))
        printed = self.capsys.readouterr()
        assert code == 0, printed.err
        return printed.out


@pytest.fixture
def scfm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    monkeypatch.setenv("COLUMNS", "200")
    return CommandLine(capsys)


def in_a_process_of_its_own(*arguments: object) -> str:
    """Run one verb where threads of this process are not in the way of those that it forks; return what it printed."""
    command = [sys.executable, "-m", "scfm.cli", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.distributed
def test_two_sources_to_predicted_labels(tmp_path: Path, scfm: CommandLine) -> None:
    """Two sources -> shards -> 2-process pretraining -> model -> 2-process fine-tuning -> labels."""
    made_up_cells(100, seed=0).write_h5ad(tmp_path / "first.h5ad")
    made_up_cells(80, seed=1, genes=GENES[:50]).write_h5ad(tmp_path / "second.h5ad")
    made_up_cells(60, seed=2).write_h5ad(tmp_path / "query.h5ad")
    shards, pretrained, tuned = tmp_path / "shards", tmp_path / "pretrained", tmp_path / "tuned"

    table = scfm(
        "prepare", tmp_path / "first.h5ad", tmp_path / "second.h5ad", "--out", shards, "--obs", "cell_type", "batch"
    )
    assert "first.h5ad" in table
    assert "180 cells" in table

    small = ["--model.width", 16, "--model.heads", 2, "--model.hidden", 16, "--data.cells_per_batch", 16]
    quick = ["--trainer.max_epochs", 4, "--optimizer.lr", 0.01, "--trainer.log_every_n_steps", 5]
    log = in_a_process_of_its_own(
        "pretrain", "--config", "recipes/pretrain/quickstart.yaml", "--data.shards", shards, "--out", pretrained,
        *small, *quick, *PROCESSES, "--model.cell_conditions", "[batch]",
    )  # fmt: skip
    assert "2 x cpu" in log
    model = read_model(pretrained / "model")
    assert model.cell_conditions == {"batch": ["batch0", "batch1"]}
    assert [
        source["file"].endswith(("first.h5ad", "second.h5ad")) for source in model.training_data["manifest"]["sources"]
    ]

    in_a_process_of_its_own(
        "finetune", "--config", "recipes/finetune/annotation.yaml", "--from", pretrained / "model",
        "--data.shards", shards, "--out", tuned, *PROCESSES, "--trainer.max_epochs", 24, "--optimizer.lr", 0.01,
    )  # fmt: skip
    # of the 180 pretraining cells, 18 only chose the checkpoint
    assert len(load_hashes(tuned / "model" / "cells.hash")) == 162 + 180

    scfm("predict", tmp_path / "query.h5ad", "--model", tuned / "model", "--out", tmp_path / "predicted.h5ad")
    predicted = anndata.read_h5ad(tmp_path / "predicted.h5ad")
    right = predicted.obs["annotation"].astype(str) == predicted.obs["cell_type"].astype(str)
    assert right.mean() > 0.85
    scfm("embed", tmp_path / "query.h5ad", "--model", tuned / "model", "--out", tmp_path / "embedded.h5ad")
    assert anndata.read_h5ad(tmp_path / "embedded.h5ad").obsm["X_scfm"].shape == (60, 16)


def test_evaluation_stands_beside_its_baselines(tmp_path: Path, scfm: CommandLine) -> None:
    made_up_cells(90, seed=0).write_h5ad(tmp_path / "reference.h5ad")
    made_up_cells(60, seed=1).write_h5ad(tmp_path / "query.h5ad")
    scfm("prepare", tmp_path / "reference.h5ad", "--out", tmp_path / "shards")
    quick = ["--trainer.max_epochs", 2, "--data.cells_per_batch", 16, "--trainer.accelerator", "cpu"]
    small = ["--model.width", 16, "--model.heads", 2, "--model.hidden", 16, "--model.layers", 1]
    pretrained = tmp_path / "pretrained"
    scfm(
        "pretrain", "--config", "recipes/pretrain/quickstart.yaml", "--data.shards", tmp_path / "shards", "--out",
        pretrained, *quick, *small,
    )  # fmt: skip
    common = ["evaluate", "annotation", "--model", pretrained / "model", "--seeds", 2]
    across = scfm(
        *common,
        "--reference",
        tmp_path / "reference.h5ad",
        "--data",
        tmp_path / "query.h5ad",
        "--out",
        tmp_path / "across",
    )
    within = scfm(*common, "--data", tmp_path / "reference.h5ad", "--out", tmp_path / "within")
    for printed, folder in ((across, "across"), (within, "within")):
        scores = json.loads((tmp_path / folder / "metrics.json").read_text())
        methods = {row["method"] for row in scores["rows"]}
        assert {"scGPT (scfm)", "majority class", "kNN on PCA", "logistic regression"} <= methods
        assert {row["seed"] for row in scores["rows"]} == {0, 1}
        assert "logistic regression" in printed
        # the model was pretrained on the reference: on nothing of the query, and on all held-out cells of the reference
        # but those among its 9 validation cells
        seen = [(leak["cells"], leak["seen"]) for leak in scores["leakage"]]
        if folder == "across":
            assert set(seen) == {(60, 0)}
            assert "†" not in printed
        else:
            assert all(cells == 18 and 9 <= n <= 18 for cells, n in seen)
            assert "scGPT (scfm) †" in printed


def test_scbert_small_pretrains_from_the_same_shards_and_embeds(tmp_path: Path, scfm: CommandLine) -> None:
    """The bundled recipe on shards as scGPT's, through the command line: baselines logged, cells embedded."""
    made_up_cells(120, seed=0).write_h5ad(tmp_path / "cells.h5ad")
    made_up_cells(20, seed=1).write_h5ad(tmp_path / "query.h5ad")
    scfm("prepare", tmp_path / "cells.h5ad", "--out", tmp_path / "shards")
    # so few genes have hundreds of counts per 10,000 each: with 6 bins all would be in the last
    log = scfm(
        "pretrain", "--config", "recipes/pretrain/scbert-small.yaml", "--data.shards", tmp_path / "shards",
        "--out", tmp_path / "run", "--data.n_bins", 13, "--data.mask_value", 13, "--trainer.accelerator", "cpu",
        "--trainer.log_every_n_steps", 3, "--model.performer.redraw_every", 5,
    )  # fmt: skip
    assert "attention favor (correct, kernel exp, 4 heads of 16)" in log
    metrics = {name: value for _, name, value in read_metrics(tmp_path / "run/metrics.csv")}
    for name in ("valid/masked_bin_accuracy", "baseline_accuracy/most frequent bin"):
        assert 0 < metrics[name] < 1
    embedded = tmp_path / "embedded.h5ad"
    scfm("embed", tmp_path / "query.h5ad", "--model", tmp_path / "run/model", "--out", embedded)
    assert anndata.read_h5ad(embedded).obsm["X_scfm"].shape == (20, 64)
