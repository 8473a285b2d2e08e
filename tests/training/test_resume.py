"""A run that was killed continues as if it had never stopped: same batches, same draws, same weights, to the bit."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import tiny_recipe, write_shards

from scfm.checkpoints.native import read_weights
from scfm.errors import ScfmError
from scfm.metrics_file import read_metrics
from scfm.recipe import Recipe
from scfm.training.checkpointing import checkpoints, step_of
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


def losses(run: Path) -> list[tuple[int, str, float]]:
    """All that a run logged, but for speeds."""
    return sorted(row for row in read_metrics(run / "metrics.csv") if not row[1].startswith("speed/"))


def assert_same_run(run: Path, other: Path) -> None:
    weights, expected = read_weights(run / "model"), read_weights(other / "model")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert losses(run) == losses(other)


def kill_at(recipe: Recipe, folder: Path, step: int) -> None:
    """Start a run in a process of its own and kill it once it has logged a step."""
    recipe.save(folder / "recipe.yaml")
    command = [sys.executable, "-m", "scfm.cli", "pretrain", "--config", str(folder / "recipe.yaml")]
    log = Path(recipe.out) / "log.txt"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (log.exists() and f"step {step}/" in log.read_text()):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"


@pytest.mark.parametrize("step", [9, 14])
def test_killed_in_mid_epoch_then_resumed(shards: Path, unbroken: Path, tmp_path: Path, step: int) -> None:
    recipe = recipe_for(shards, tmp_path / "run")
    kill_at(recipe, tmp_path, step)
    *_, stopped_at = checkpoints(tmp_path / "run" / "checkpoints")
    assert step - 5 <= step_of(stopped_at) < STEPS
    pretrain(recipe, resume="auto")
    assert_same_run(tmp_path / "run", unbroken)


def test_killed_before_the_first_checkpoint_starts_again(shards: Path, unbroken: Path, tmp_path: Path) -> None:
    recipe = recipe_for(shards, tmp_path / "run")
    kill_at(recipe, tmp_path, 1)
    pretrain(recipe, resume="auto")
    assert_same_run(tmp_path / "run", unbroken)


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
