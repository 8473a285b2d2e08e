"""What a run writes while it goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import tiny_recipe, write_shards

from scfm.metrics_file import read_metrics
from scfm.training.callbacks import MetricsCsv, clock
from scfm.training.run import pretrain
from scfm.training.saving import checkpoints


def test_metrics_are_appended_and_read_back(tmp_path: Path) -> None:
    log = MetricsCsv(tmp_path / "metrics.csv", resume_step=None)
    log.log_metrics({"train/loss": 2.5, "epoch": 0}, step=1)
    log.log_metrics({"train/loss": 1 / 3}, step=2)
    assert read_metrics(log.path) == [(1, "train/loss", 2.5), (2, "train/loss", 1 / 3)]


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = MetricsCsv(path, resume_step=None)
    for step in (1, 2, 3):
        first.log_metrics({"loss": float(step)}, step=step)
    path.write_text(path.read_text() + "4,lo")  # killed in the middle of a row
    MetricsCsv(path, resume_step=2).log_metrics({"loss": 30.0}, step=3)
    assert read_metrics(path) == [(1, "loss", 1.0), (2, "loss", 2.0), (3, "loss", 30.0)]


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    pretrain(tiny_recipe(shards, tmp_path / "run", trainer={"max_steps": 9}, checkpoint={"every_steps": 2, "keep": 2}))
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step=000000006.ckpt",
        "step=000000008.ckpt",
    ]
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()


def test_the_progress_line_says_what_matters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(tiny_recipe(write_shards(tmp_path / "shards"), tmp_path / "run"))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step 4/6"))
    for part in ("loss ", "gep ", "gepc ", "cell_prompt ", "cells/s", "tokens/s", "wait ", "eta 0:00:"):
        assert part in line
    assert line in (tmp_path / "run" / "log.txt").read_text()


def test_the_run_directory_is_complete(tmp_path: Path) -> None:
    pretrain(tiny_recipe(write_shards(tmp_path / "shards"), tmp_path / "run"))
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        "recipe.yaml", "metrics.csv", "log.txt", "checkpoints", "plots", "model", "README.md", "finished.yaml",
    }  # fmt: skip
    assert (run / "plots" / "losses.png").read_bytes().startswith(b"\x89PNG")
    card = (run / "README.md").read_text()
    logged = {(step, name): value for step, name, value in read_metrics(run / "metrics.csv")}
    assert f"{logged[6, 'valid/gep']:.4g}" in card
    assert f"{logged[0, 'baseline/gene mean']:.4g}" in card
    assert "made-up.h5ad | 120" in card
    for told in ("| cells | 108 to train on, 12 held out", "| time | ", "| hardware | 1 x ", "0.9 times all cells"):
        assert told in card
    speeds = {name.removeprefix("speed/") for _, name in logged if name.startswith("speed/")}
    assert speeds >= {"cells_per_second", "tokens_per_second", "tflops", "mfu", "data_wait", "empty", "peak_memory_gb"}
    assert not speeds & {name.removeprefix("train/") for _, name in logged}
    assert json.loads((run / "model" / "training_data.json").read_text())["manifest"]["cells"] == 120


def test_a_run_shorter_than_an_epoch_is_validated_at_its_end(tmp_path: Path) -> None:
    pretrain(tiny_recipe(write_shards(tmp_path / "shards"), tmp_path / "run", trainer={"max_steps": 3}))
    validated = {step for step, name, _ in read_metrics(tmp_path / "run" / "metrics.csv") if name == "valid/loss"}
    assert validated == {3}
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()


def test_clock() -> None:
    assert [clock(seconds) for seconds in (0, 61.7, 36_000)] == ["0:00:00", "0:01:01", "10:00:00"]
