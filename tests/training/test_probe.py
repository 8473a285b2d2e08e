"""A linear probe of the embeddings, at every validation, on cells that are not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cells import made_up_cells
from killing import assert_same_run
from runs import tiny_recipe, write_shards

import scfm
from scfm.errors import ScfmError
from scfm.metrics_file import read_metrics
from scfm.recipe import Recipe
from scfm.recipe_check import check
from scfm.training.probe import JUDGED, Probe
from scfm.training.run import pretrain

STEPS = 18  # three epochs, each with a validation


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("cells") / "shards")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells of the same kind that no run trains on."""
    path = tmp_path_factory.mktemp("probe") / "others.h5ad"
    made_up_cells(60, seed=7).write_h5ad(path)
    return path


def probed(shards: Path, out: Path, cells: Path, **sections: Any) -> Recipe:
    probe = {"probe": {"data": str(cells), "label": "cell_type"}}
    sections["checkpoint"] = probe | {"every_steps": 4, "keep": 9} | sections.get("checkpoint", {})
    sections["trainer"] = {"max_steps": STEPS} | sections.get("trainer", {})
    return tiny_recipe(shards, out, **sections)


def scores(run: Path, metric: str = "probe/accuracy") -> dict[int, float]:
    return {step: value for step, name, value in read_metrics(run / "metrics.csv") if name == metric}


@pytest.fixture(scope="module")
def unbroken(shards: Path, others: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    pretrain(probed(shards, out, others, checkpoint={"best": "probe/macro_f1"}))
    return out


def test_it_is_measured_at_every_validation_beside_log_counts(unbroken: Path) -> None:
    for name in ("accuracy", "macro_f1"):
        assert list(scores(unbroken, f"probe/{name}")) == [6, 12, 18]
        assert list(scores(unbroken, f"probe/baseline_{name}")) == [0]
        assert all(0 <= score <= 1 for score in scores(unbroken, f"probe/{name}").values())
    log = (unbroken / "log.txt").read_text()
    assert "60 cells, 3 labels, 30 cells to judge by; none of them is among the training cells" in log
    assert "  probe/accuracy " in log


def test_the_score_is_that_of_the_exported_model(unbroken: Path, others: Path) -> None:
    """Found again by another way: the model of the best score embeds the cells, and scikit-learn reads them."""
    from anndata import read_h5ad
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    from sklearn.preprocessing import StandardScaler

    from scfm.evaluation.splits import stratified_split

    adata = read_h5ad(others)
    cells = scfm.load(unbroken / "model").embed(adata).obsm["X_scfm"]
    labels = adata.obs["cell_type"].astype(str).to_numpy()
    split = stratified_split(labels, JUDGED, seed=0)
    scale = StandardScaler().fit(cells[split.train])
    regression = LogisticRegression(class_weight="balanced", max_iter=1000)
    regression.fit(scale.transform(cells[split.train]), labels[split.train])
    predicted = regression.predict(scale.transform(cells[split.test]))
    best = max(scores(unbroken, "probe/macro_f1").values())  # logged as float32
    assert f1_score(labels[split.test], predicted, average="macro") == pytest.approx(
        best, rel=1e-7
    )  # logged as float32


def test_the_best_probe_chooses_the_weights(shards: Path, others: Path, tmp_path: Path) -> None:
    """Told apart from the lowest loss by scores that fall while the loss does."""
    found = iter((0.9, 0.5, 0.4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Probe, "found", lambda *_: {"accuracy": next(found), "macro_f1": 0.0})
        pretrain(probed(shards, tmp_path / "run", others, checkpoint={"best": "probe/accuracy"}))
    losses = scores(tmp_path / "run", "valid/loss")
    assert min(losses, key=lambda step: losses[step]) != 6
    assert "step 6, the one exported" in (tmp_path / "run" / "README.md").read_text()


def test_with_it_a_run_is_resumed_exactly(shards: Path, others: Path, unbroken: Path, tmp_path: Path) -> None:
    recipe = probed(shards, tmp_path / "run", others, checkpoint={"best": "probe/macro_f1"})
    pretrain(recipe)
    pretrain(recipe, resume=str(tmp_path / "run" / "checkpoints" / "step=000000008.ckpt"))
    assert_same_run(tmp_path / "run", unbroken)


def test_cells_that_are_trained_on_are_told(shards: Path, tmp_path: Path) -> None:
    made_up_cells(120, seed=0).write_h5ad(tmp_path / "seen.h5ad")  # those of the shards: 108 train, 12 validate
    pretrain(probed(shards, tmp_path / "run", tmp_path / "seen.h5ad", trainer={"max_steps": 1}))
    assert "; 108 of them (90.0%) ARE AMONG THE TRAINING CELLS" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.distributed
def test_two_processes_share_the_cells(shards: Path, others: Path, tmp_path: Path) -> None:
    still = {"optimizer": {"lr": 1e-30}}
    two = {"devices": 2, "strategy": "ddp_fork"}
    for name, trainer in (("one", {}), ("two", two)):
        pretrain(probed(shards, tmp_path / name, others, trainer={"max_steps": 6, **trainer}, **still))
    assert scores(tmp_path / "one") == scores(tmp_path / "two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Probe, "scores", lambda *_: np.linalg.cholesky(-np.eye(2)))
        patch.setattr(Probe, "baseline", lambda *_: {})
        with pytest.raises(ScfmError, match=r"probe of cell_type in .* LinAlgError"):
            pretrain(probed(shards, tmp_path / "wrong", others, trainer={"max_steps": 6, **two}))


def test_what_cannot_be_probed_is_named(shards: Path, others: Path, tmp_path: Path) -> None:
    with pytest.raises(ScfmError, match=r"checkpoint\.probe: no cells are held out"):
        pretrain(probed(shards, tmp_path / "run", others, data={"valid_fraction": 0.0}))
    with pytest.raises(ScfmError, match="nowhere"):
        pretrain(probed(shards, tmp_path / "run2", tmp_path / "nowhere.h5ad"))
    recipe = tiny_recipe(shards, tmp_path / "run3", checkpoint={"best": "probe/accuracy"})
    with pytest.raises(ScfmError, match=r"checkpoint\.best: probe/accuracy is measured by a probe"):
        check(recipe)
