"""Processes are killed for real, and the run ends with the weights that it would have had undisturbed."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from killing import PATIENCE, assert_same_run, at_step, kill_me, logged, run, said_by
from runs import tiny_recipe, write_shards

from scfm.errors import SAVED
from scfm.recipe import Recipe
from scfm.training import peers, saving
from scfm.training.run import pretrain
from scfm.training.saving import checkpoints, step_of
from scfm.training.stopping import StopSignals

STEPS = 15  # 6 to an epoch, which a validation ends


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("cells") / "shards")


def recipe_for(shards: Path, out: Path, devices: int = 1) -> Recipe:
    strategy = {"devices": devices, "strategy": "ddp_fork"} if devices > 1 else {}
    return tiny_recipe(
        shards,
        out,
        trainer={"max_steps": STEPS, "log_every_n_steps": 1, **strategy},
        checkpoint={"every_steps": 4},
        data={"tokens_per_pack": 200},
    )


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    pretrain(recipe_for(shards, out))
    return out


def saved(out: Path) -> list[int]:
    return [step_of(path) for path in checkpoints(out / "checkpoints")]


@pytest.mark.parametrize("step", [2, 9])
def test_killed_in_a_step(shards: Path, undisturbed: Path, tmp_path: Path, step: int) -> None:
    """Before the first checkpoint, and after the second."""
    recipe = recipe_for(shards, tmp_path / "run")
    assert run(recipe, at_step(step, kill_me)) == -signal.SIGKILL
    assert saved(tmp_path / "run") == [n for n in (4, 8, 12) if n <= step][-2:]
    assert run(recipe) == 0
    assert_same_run(tmp_path / "run", undisturbed)


def killed_in_writing(name: str, after: int) -> Callable[[], None]:
    """Return what kills a process as it has written a part of a file."""

    def prepare() -> None:
        write = saving._File.write

        def watched(self: saving._File, data: bytes) -> int:
            if name in self.file.name and self.file.tell() >= after:
                self.file.flush()
                kill_me()
            return write(self, data)

        saving._File.write = watched  # type: ignore[method-assign]

    return prepare


@pytest.mark.parametrize(("name", "there"), [("step=000000008", [4]), ("best", [4])])
def test_killed_while_a_checkpoint_is_written(
    shards: Path, undisturbed: Path, tmp_path: Path, name: str, there: list[int]
) -> None:
    recipe, folder = recipe_for(shards, tmp_path / "run"), tmp_path / "run" / "checkpoints"
    assert run(recipe, killed_in_writing(name, after=4096)) == -signal.SIGKILL
    assert (folder / f"{name}.ckpt.tmp").stat().st_size >= 4096
    assert saved(tmp_path / "run") == there
    assert not (folder / f"{name}.ckpt").exists()
    assert run(recipe) == 0
    assert_same_run(tmp_path / "run", undisturbed)
    assert not list(folder.glob("*.tmp"))


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)  # the second changes nothing


def test_asked_to_stop_it_saves_and_says_so(shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    recipe = recipe_for(shards, tmp_path / "run")
    assert run(recipe, at_step(9, ask_to_stop)) == SAVED
    assert saved(tmp_path / "run") == [8, 10]
    assert "step 10: asked to stop (SIGUSR1), saved as" in (tmp_path / "run" / "log.txt").read_text()
    assert run(recipe) == 0
    assert_same_run(tmp_path / "run", undisturbed)


def test_asked_to_stop_before_the_first_step(shards: Path, tmp_path: Path) -> None:
    recipe = recipe_for(shards, tmp_path / "run")

    def prepare() -> None:
        enter = StopSignals.__enter__

        def asked(self: StopSignals) -> StopSignals:
            enter(self)
            os.kill(os.getpid(), signal.SIGTERM)
            return self

        StopSignals.__enter__ = asked  # type: ignore[method-assign]

    assert run(recipe, prepare) == SAVED
    assert saved(tmp_path / "run") == []
    assert "step 0: asked to stop (SIGTERM), nothing to save yet" in said_by(recipe)


@pytest.mark.distributed
def test_two_processes_stop_and_end_together(shards: Path, tmp_path: Path) -> None:
    """One is killed, then one is asked to stop; each time both end, and the run goes on where it was saved."""
    recipe, out = recipe_for(shards, tmp_path / "run", devices=2), tmp_path / "run"
    (tmp_path / "whole").mkdir()
    whole = recipe_for(shards, tmp_path / "whole" / "run", devices=2)
    assert run(whole) == 0
    assert run(recipe, at_step(6, kill_me, rank=1)) == 1
    assert "rank 1 (process " in (out / "log.txt").read_text()
    assert "ended in the middle of the run: killed" in (out / "log.txt").read_text()
    assert "rank 1 (by signal 9) was killed in the middle of the run" in said_by(recipe)
    assert saved(out) == [4]
    assert run(recipe, at_step(8, ask_to_stop, rank=1)) == SAVED
    assert saved(out)[-1] in (9, 10)  # the word of a step counts before the one after it
    assert run(recipe) == 0
    assert_same_run(out, tmp_path / "whole" / "run")


@pytest.mark.distributed
def test_a_process_that_hangs_in_a_collective_is_ended(shards: Path, tmp_path: Path) -> None:
    """As NCCL would hang: rank 0 never learns from its collective that rank 1 is gone."""
    recipe = recipe_for(shards, tmp_path / "run", devices=2)

    def prepare() -> None:
        peers.GRACE = 0.2
        at_step(5, kill_me, rank=1)()
        at_step(5, lambda: time.sleep(10 * PATIENCE), rank=0)()

    assert run(recipe, prepare) == 1
    assert "rank 1 (process " in (tmp_path / "run" / "log.txt").read_text()


def test_a_finished_run_is_left_as_it_is(shards: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.name != "log.txt"}
    assert pretrain(recipe_for(shards, undisturbed), resume="auto") == undisturbed / "model"
    assert "this run is finished, nothing is left to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.name != "log.txt"} == before


def test_a_finished_run_can_be_made_longer(shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    longer = recipe_for(shards, tmp_path / "run")
    longer.trainer.max_steps = STEPS + 3
    pretrain(longer, resume="auto")
    assert max(step for step, _, _ in logged(tmp_path / "run")) == STEPS + 3


def test_processes_that_torchrun_started_again_resume(
    shards: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command of the first start has no --resume; torchrun repeats it as it is."""
    recipe = recipe_for(shards, tmp_path / "run")
    assert run(recipe, at_step(9, kill_me)) == -signal.SIGKILL
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    pretrain(recipe)
    assert_same_run(tmp_path / "run", undisturbed)
