"""Runs that torchrun or SLURM's srun start, and processes that end with what started them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lightning.pytorch.plugins.environments import SLURMEnvironment
from runs import tiny_recipe
from worlds import in_world, largest_difference, trained

from scfm.checkpoints.native import read_weights
from scfm.errors import ScfmError
from scfm.training.launch import build_trainer
from scfm.training.run import pretrain

pytestmark = pytest.mark.distributed

STILL = {"model": {"dropout": 0.0}, "optimizer": {"lr": 1e-2, "eps": 1e-2}}


def test_torchrun_starts_a_recipe_as_it_is(shards: Path, tmp_path: Path) -> None:
    """The recipe leaves devices open: they are what torchrun started."""
    recipe = tiny_recipe(shards, tmp_path / "run", **STILL, trainer={"devices": "auto", "max_steps": 3})
    recipe.save(tmp_path / "recipe.yaml")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "scfm.cli", "pretrain", "--config", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    recipe.out = str(tmp_path / "alone")
    assert largest_difference(read_weights(tmp_path / "run" / "model"), read_weights(pretrain(recipe))) < 2e-6


@pytest.mark.slow
def test_the_command_line_starts_its_own_processes(shards: Path, tmp_path: Path) -> None:
    """Without fork: each rank is a process that runs the same command, as on GPUs."""
    tiny_recipe(shards, tmp_path / "run", trainer={"devices": 2}).save(tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "scfm.cli", "pretrain", "--config", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_two_nodes_of_torchrun(shards: Path) -> None:
    """Two nodes of one process each, as `torchrun --nnodes 2` tells them."""
    recipe = tiny_recipe(shards, Path("unused"), **STILL, trainer={"max_steps": 2})
    nodes = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "{rank}"}
    weights = in_world(2, lambda: trained(recipe)[0], **nodes)[0]
    assert largest_difference(weights, trained(recipe)[0]) < 2e-6


def test_two_nodes_of_slurm(shards: Path) -> None:
    """As srun tells its tasks, one on each of two nodes; torchrun is not there."""
    recipe = tiny_recipe(shards, Path("unused"), **STILL, trainer={"max_steps": 2})

    def as_task() -> dict:
        for name in [name for name in os.environ if name.startswith("TORCHELASTIC")]:
            del os.environ[name]
        trainer = build_trainer(recipe, logger=False, enable_checkpointing=False)
        assert isinstance(trainer.strategy.cluster_environment, SLURMEnvironment)
        assert (trainer.world_size, trainer.num_nodes) == (2, 2)
        return trained(recipe)[0]

    tasks = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "scfm",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NODEID": "{rank}",
        "SLURM_PROCID": "{rank}",
        "SLURM_LOCALID": "0",
    }
    assert largest_difference(in_world(2, as_task, **tasks)[0], trained(recipe)[0]) < 2e-6


def test_another_number_of_processes_than_the_recipe_names(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    recipe = tiny_recipe(shards, Path("unused"), trainer={"devices": 2})
    with pytest.raises(ScfmError, match=r"torchrun started 4 processes on each of 2 nodes, the recipe says devices 2"):
        build_trainer(recipe, logger=False, enable_checkpointing=False)


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def ended(process: int) -> bool:
    """Whether a process is gone, or only waits to be read by its parent."""
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def free_again(port: int) -> bool:
    """Whether nobody listens at a port; connections to it may take minutes to fade."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process that its parent has ended")
def test_a_killed_run_leaves_no_process_and_no_port(shards: Path, tmp_path: Path) -> None:
    two = {"devices": 2, "strategy": "ddp_fork", "max_steps": 100_000, "log_every_n_steps": 1}
    recipe = tiny_recipe(shards, tmp_path / "run", trainer=two)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = os.fork()
    if run == 0:
        try:
            os.environ["MASTER_PORT"] = str(port)
            pretrain(recipe)
        finally:
            os._exit(0)  # a copy of pytest must not go on with the tests
    children: list[int] = []
    try:
        log = tmp_path / "run" / "log.txt"
        end = time.monotonic() + 240
        while not (log.exists() and "step 2/" in log.read_text()) and time.monotonic() < end:
            time.sleep(0.02)
        children = children_of(run)
        assert len(children) == 2
        os.kill(children[1], signal.SIGSTOP)  # the first now waits for it in a collective, where Python hears no signal
        time.sleep(0.3)
        os.kill(run, signal.SIGKILL)
        os.waitpid(run, 0)
        end = time.monotonic() + 5
        while not all(ended(child) for child in children) and time.monotonic() < end:
            time.sleep(0.02)
        assert all(ended(child) for child in children)
        while not free_again(port) and time.monotonic() < end:  # other threads of a process end after its first
            time.sleep(0.02)
        assert free_again(port)
    finally:
        for process in (run, *children):
            if not ended(process):
                os.kill(process, signal.SIGKILL)
