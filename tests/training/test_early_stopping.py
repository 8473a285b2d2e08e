"""A run ends when its best metric stays where it is, and exports the weights that had it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import tiny_recipe, write_shards

from scfm.checkpoints.native import read_weights
from scfm.errors import ScfmError
from scfm.metrics_file import read_metrics
from scfm.recipe import CheckpointConfig, Recipe
from scfm.training.run import pretrain

STILL = {"lr": 1e-30}  # the weights stay as they are, and so does every validation: none is better than the first
EPOCH = 6  # steps, each epoch with a validation at its end


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("cells") / "shards")


def still_recipe(shards: Path, out: Path, **sections: dict[str, object]) -> Recipe:
    sections["checkpoint"] = {"every_steps": 4, "keep": 9, "patience": 2} | sections.get("checkpoint", {})
    sections["trainer"] = {"max_steps": 10 * EPOCH} | sections.get("trainer", {})
    return tiny_recipe(shards, out, optimizer=STILL, **sections)


def validated(run: Path, metric: str = "valid/loss") -> dict[int, float]:
    return {step: value for step, name, value in read_metrics(run / "metrics.csv") if name == metric}


def test_patience_counts_validations_after_the_best(shards: Path, tmp_path: Path) -> None:
    pretrain(still_recipe(shards, tmp_path / "run"))
    assert list(validated(tmp_path / "run")) == [EPOCH, 2 * EPOCH, 3 * EPOCH]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "ended early: 2 validations in a row were not better than the best valid/loss, " in log
    assert f"step {EPOCH}, the one exported" in (tmp_path / "run" / "README.md").read_text()


def test_a_run_that_improves_goes_on(shards: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(shards, tmp_path / "run", trainer={"max_steps": 4 * EPOCH}, checkpoint={"patience": 2})
    pretrain(recipe)
    losses = list(validated(tmp_path / "run").values())
    assert losses == sorted(losses, reverse=True), "the cells of this test no longer teach anything"
    assert len(losses) == 4
    assert "ended early" not in (tmp_path / "run" / "log.txt").read_text()


def test_patience_is_resumed(shards: Path, tmp_path: Path) -> None:
    """Step 16 has waited for one validation already; the recipe may ask for more patience than before."""
    run = tmp_path / "run"
    pretrain(still_recipe(shards, run))
    checkpoint = str(run / "checkpoints" / "step=000000016.ckpt")
    pretrain(still_recipe(shards, run), resume=checkpoint)
    assert list(validated(run)) == [EPOCH, 2 * EPOCH, 3 * EPOCH]
    pretrain(still_recipe(shards, run, checkpoint={"patience": 3}), resume=checkpoint)
    assert list(validated(run)) == [EPOCH, 2 * EPOCH, 3 * EPOCH, 4 * EPOCH]


@pytest.mark.distributed
def test_two_processes_end_together(shards: Path, tmp_path: Path) -> None:
    two = {"devices": 2, "strategy": "ddp_fork"}
    pretrain(still_recipe(shards, tmp_path / "run", trainer=two))
    assert list(validated(tmp_path / "run")) == [EPOCH, 2 * EPOCH, 3 * EPOCH]
    assert "ended early: 2 validations" in (tmp_path / "run" / "log.txt").read_text()


def test_the_weights_of_the_highest_accuracy_are_exported(shards: Path, tmp_path: Path) -> None:
    """Found by training again, up to the step of the highest accuracy and no further."""
    options = {
        "objectives": [{"name": "gep"}, {"name": "dar", "condition": "batch"}],
        "optimizer": {"lr": 1e-2, "schedule": "constant"},
        "data": {"valid_fraction": 0.2},
        "checkpoint": {"best": "valid/dar_accuracy"},
    }
    pretrain(tiny_recipe(shards, tmp_path / "run", **options, trainer={"max_steps": 40}))
    accuracies = validated(tmp_path / "run", "valid/dar_accuracy")
    best = max(accuracies, key=lambda step: accuracies[step])
    losses = validated(tmp_path / "run")
    assert best not in (min(losses, key=lambda step: losses[step]), max(losses)), "loss or time would choose the same"
    again = pretrain(tiny_recipe(shards, tmp_path / "again", **options, trainer={"max_steps": best}))
    exported, expected = read_weights(tmp_path / "run" / "model"), read_weights(again)
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    assert f"step {best}, the one exported" in (tmp_path / "run" / "README.md").read_text()


def test_the_mode_follows_from_the_name() -> None:
    assert [CheckpointConfig(best=f"valid/{name}").mode for name in ("loss", "gep", "cls_accuracy")] == [
        "min",
        "min",
        "max",
    ]


def test_a_metric_that_is_not_measured_is_named(shards: Path, tmp_path: Path) -> None:
    recipe = still_recipe(shards, tmp_path / "run", checkpoint={"best": "valid/cls_accuracy"})
    with pytest.raises(ScfmError, match=r"checkpoint\.best: 'valid/cls_accuracy' is not measured; .*valid/gep, "):
        pretrain(recipe)


def test_patience_needs_cells_to_judge_by(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ScfmError, match=r"checkpoint\.patience: no cells are held out"):
        pretrain(still_recipe(shards, tmp_path / "run", data={"valid_fraction": 0.0}))
