"""A run that is resumed is as if it had never stopped, to the bit; tests/faults kills such runs for real."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from killing import assert_same_run
from runs import tiny_recipe, write_shards

from scfm.errors import ScfmError
from scfm.metrics_file import read_metrics
from scfm.recipe import Recipe
from scfm.training.run import pretrain

STEPS = 27  # 6 steps an epoch: the run ends in the middle of the fifth


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("cells") / "shards")


def recipe_for(shards: Path, out: Path) -> Recipe:
    return tiny_recipe(
        shards,
        out,
        trainer={"max_steps": STEPS, "log_every_n_steps": 1},
        checkpoint={"every_steps": 4},
        data={"tokens_per_pack": 200},
        model={"layers": 2},
    )


@pytest.fixture(scope="module")
def unbroken(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    pretrain(recipe_for(shards, out))
    return out


@pytest.mark.parametrize("step", [8, 12, 24])
def test_resumed_from_a_named_checkpoint(shards: Path, unbroken: Path, tmp_path: Path, step: int) -> None:
    """12 and 24 are ends of an epoch."""
    recipe = recipe_for(shards, tmp_path / "run")
    recipe.checkpoint.keep = 9
    pretrain(recipe)
    pretrain(recipe, resume=str(tmp_path / "run" / "checkpoints" / f"step={step:09d}.ckpt"))
    assert_same_run(tmp_path / "run", unbroken)


def test_the_rate_of_an_epoch_is_resumed(shards: Path, tmp_path: Path) -> None:
    """Cycles of two epochs and more, an epoch of 6 steps; 8 and 14 are within one."""
    cycles = {"schedule": "cosine_restarts", "warmup": 1, "cycle_epochs": 2, "cycle_growth": 2, "min_lr": 1e-3}
    recipes = [recipe_for(shards, tmp_path / name) for name in ("unbroken", "run")]
    for recipe in recipes:
        recipe.optimizer = replace(recipe.optimizer, **cycles)
        recipe.checkpoint = replace(recipe.checkpoint, every_steps=2, keep=20)
        pretrain(recipe)
    logged = read_metrics(tmp_path / "run" / "metrics.csv")
    rates = {(step // 6, round(value, 9)) for step, name, value in logged if name == "train/learning_rate"}
    assert sorted(rates) == [(0, 0.001), (1, 0.01), (2, 0.001), (3, 0.009), (4, 0.005)]
    for step in (8, 14):
        pretrain(recipes[1], resume=str(tmp_path / "run" / "checkpoints" / f"step={step:09d}.ckpt"))
        assert_same_run(tmp_path / "run", tmp_path / "unbroken")


def test_a_run_is_not_overwritten(shards: Path, unbroken: Path) -> None:
    before = (unbroken / "log.txt").read_bytes()
    with pytest.raises(ScfmError, match="already holds a run; --resume auto continues it"):
        pretrain(recipe_for(shards, unbroken))
    assert (unbroken / "log.txt").read_bytes() == before


def test_a_folder_of_something_else_is_left_alone(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("chapter 1")
    with pytest.raises(ScfmError, match="holds something that is not a run"):
        pretrain(recipe_for(shards, tmp_path), resume="auto")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_another_order_of_cells_cannot_resume(shards: Path, tmp_path: Path) -> None:
    recipe = recipe_for(shards, tmp_path / "run")
    pretrain(recipe)
    recipe.seed = 5
    with pytest.raises(ScfmError, match="trained with seed 0, this run has 5"):
        pretrain(recipe, resume="auto")
    recipe.seed, recipe.data.cells_per_batch = 0, 20
    with pytest.raises(ScfmError, match=r"trained with data\.cells_per_batch 16, this run has 20"):
        pretrain(recipe, resume="auto")


def test_a_missing_checkpoint_is_named(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ScfmError, match=r"nowhere\.ckpt: no such checkpoint"):
        pretrain(recipe_for(shards, tmp_path / "run"), resume=str(tmp_path / "nowhere.ckpt"))
