"""Weights & Biases: one run for a run directory, however often it is resumed, and no secrets in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import wandb
from runs import tiny_recipe, write_shards

from scfm.errors import ScfmError
from scfm.metrics_file import read_metrics
from scfm.training.run import pretrain

SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("cells") / "shards")


class FakeRun:
    """What wandb.init returns; keeps what it is told."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.rows, self.exit_code = options, [], None
        self.id, self.name = options["id"], options["name"]

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """The runs that wandb was asked to begin, in the place of its service."""
    runs: list[FakeRun] = []

    def init(**options: Any) -> FakeRun:
        runs.append(FakeRun(options))
        return runs[-1]

    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    return runs


def test_a_resumed_run_is_the_same_run_online(shards: Path, tmp_path: Path, begun: list[FakeRun]) -> None:
    recipe = tiny_recipe(shards, tmp_path / "run", wandb={"project": "scfm-test", "name": "a name"})
    pretrain(recipe)
    pretrain(recipe, resume=str(tmp_path / "run/checkpoints/step=000000004.ckpt"))
    first, second = begun
    assert first.id == second.id == (tmp_path / "run/wandb-id.txt").read_text().strip()
    assert [run.options["resume"] for run in begun] == ["allow", "allow"]
    assert [row["trainer/global_step"] for row in second.rows] == [6, 6]  # training and validation, after step 4
    assert first.options["config"]["model"]["width"] == 16
    assert [run.exit_code for run in begun] == [0, 0]  # else a second run in this process would go on in the first


def test_other_directories_are_other_runs(shards: Path, tmp_path: Path, begun: list[FakeRun]) -> None:
    for name in ("a", "b"):
        pretrain(tiny_recipe(shards, tmp_path / name, wandb={"project": "scfm-test"}, trainer={"max_steps": 1}))
    assert len({run.id for run in begun}) == 2


def test_secrets_do_not_reach_wandb(shards: Path, tmp_path: Path, begun: list[FakeRun]) -> None:
    """A recipe may name its shards by a URL that holds a key."""
    location = f"file://{shards}?token={SECRET}"
    recipe = tiny_recipe(shards, tmp_path / "run", wandb={"project": "scfm-test"}, trainer={"max_steps": 1})
    recipe.data.cache = location  # a key that a run over local shards does not look at
    pretrain(recipe)
    assert SECRET not in str(begun[0].options)
    for path in (path for path in (tmp_path / "run").rglob("*") if path.is_file()):
        assert SECRET.encode() not in path.read_bytes(), path


def test_offline_writes_into_the_run_directory(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr("sys.argv", ["scfm", "pretrain", "--data.cache", f"s3://key:{SECRET}@bucket"])
    recipe = tiny_recipe(shards, tmp_path / "run", wandb={"project": "scfm-test", "mode": "offline"})
    pretrain(recipe)
    pretrain(recipe, resume=str(tmp_path / "run/checkpoints/step=000000004.ckpt"))
    written = [path.name for path in (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")]
    assert set(written) == {f"run-{(tmp_path / 'run/wandb-id.txt').read_text().strip()}.wandb"}
    assert read_metrics(tmp_path / "run/metrics.csv")
    for path in (path for path in (tmp_path / "run/wandb").rglob("*") if path.is_file()):
        assert SECRET.encode() not in path.read_bytes(), path  # wandb notes the command line


def test_nobody_is_logged_in(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch job must not wait for a key to be typed."""
    monkeypatch.setattr(wandb, "login", lambda **_: False)
    recipe = tiny_recipe(shards, tmp_path / "run", wandb={"project": "scfm-test"})
    with pytest.raises(ScfmError, match=r"wandb login.*--wandb.mode offline"):
        pretrain(recipe)


def test_wandb_that_cannot_be_reached(
    shards: Path, tmp_path: Path, begun: list[FakeRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> None:
        raise wandb.errors.CommError(f"Post https://api.wandb.ai?api_key={SECRET}: no such host")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(ScfmError, match="no such host") as error:
        pretrain(tiny_recipe(shards, tmp_path / "run", wandb={"project": "scfm-test"}))
    assert SECRET not in str(error.value)
