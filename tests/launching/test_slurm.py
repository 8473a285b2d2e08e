"""The batch scripts without SLURM and with a stand-in for scfm: tasks, signals, the queue, and what they say."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from launchpad import ROOT, Launchpad, until

pytestmark = pytest.mark.distributed

SINGLE = "scripts/slurm/single_node.sbatch"
BUILD = "scripts/slurm/build_corpus.sbatch"
GIVEN = ["recipe.yaml", "shards", "run"]
ONE_NODE = {"SLURM_NTASKS_PER_NODE": 2, "SLURM_JOB_NUM_NODES": 1}


def told_to_come_back(place: Launchpad) -> None:
    """Start a job of two tasks, and give its batch script, and it alone, SLURM's warning."""
    job = place.sbatch(SINGLE, *GIVEN, "--model.layers", 3, DOES="train done", **ONE_NODE)
    until(lambda: all((place.notes / f"ready-1-{rank}").exists() for rank in (0, 1)))
    os.kill(job.pid, signal.SIGUSR1)
    assert job.wait(30) == 75, place.log()


def test_slurms_warning_reaches_every_task_and_the_job_is_put_back(stand_in: Launchpad) -> None:
    told_to_come_back(stand_in)
    assert sorted(stand_in.noted("signals")) == ["rank 0: USR1", "rank 1: USR1"]
    assert stand_in.noted("requeued") == [str(stand_in.job)]
    assert "it goes on from run/checkpoints/step=000000001.ckpt" in stand_in.log()
    job = stand_in.sbatch(SINGLE, *GIVEN, "--model.layers", 3, restarts=1, DOES="train done", **ONE_NODE)
    assert job.wait(30) == 0, stand_in.log()
    first, second = stand_in.noted("starts")
    assert first == second
    assert first.endswith("--trainer.devices 2 --trainer.num_nodes 1 --model.layers 3 --resume auto")


def test_what_is_asked_of_the_run_is_verified_and_planned_once(stand_in: Launchpad) -> None:
    told_to_come_back(stand_in)
    assert stand_in.sbatch(SINGLE, *GIVEN, restarts=1, DOES="done", **ONE_NODE).wait(30) == 0
    verified, planned = stand_in.noted("looked")
    assert verified == "verify shards"
    asked = stand_in.noted("starts")[0].removeprefix("pretrain ").removesuffix(" --resume auto")
    assert planned == f"plan {asked} --device h200 --gpus 2"


def test_a_job_told_to_end_saves_and_stays_away(stand_in: Launchpad) -> None:
    job = stand_in.sbatch(SINGLE, *GIVEN, DOES="train", **ONE_NODE)
    until(lambda: all((stand_in.notes / f"ready-1-{rank}").exists() for rank in (0, 1)))
    os.kill(job.pid, signal.SIGTERM)  # scancel --batch --signal=TERM
    assert job.wait(30) == 75, stand_in.log()
    assert sorted(stand_in.noted("signals")) == ["rank 0: USR1", "rank 1: USR1"]
    assert (stand_in.folder / "run" / "checkpoints" / "step=000000001.ckpt").exists()
    assert stand_in.noted("requeued") == []


@pytest.mark.parametrize(("does", "code"), [("train", 75), ("start", 143)])
def test_a_preempted_job_comes_back(stand_in: Launchpad, does: str, code: int) -> None:
    """SLURM tells the tasks alone, and lets them have the grace time of the partition."""
    job = stand_in.sbatch(SINGLE, *GIVEN, DOES=does, **ONE_NODE)
    until(lambda: all((stand_in.notes / f"ready-1-{rank}").exists() for rank in (0, 1)))
    for rank in (0, 1):
        os.kill(int((stand_in.notes / f"ready-1-{rank}").read_text()), signal.SIGTERM)
    assert job.wait(30) == code, stand_in.log()
    assert stand_in.noted("requeued") == [str(stand_in.job)]


def test_a_cancelled_job_stays_away(stand_in: Launchpad) -> None:
    job = stand_in.sbatch(SINGLE, *GIVEN, DOES="train", **ONE_NODE)
    until(lambda: all((stand_in.notes / f"ready-1-{rank}").exists() for rank in (0, 1)))
    os.killpg(job.pid, signal.SIGTERM)  # scancel: every process of the job, srun too
    assert job.wait(30) != 0
    assert "not put back into the queue" in stand_in.log()
    assert stand_in.noted("requeued") == []


@pytest.mark.parametrize(
    ("does", "code", "comes_back", "said"),
    [
        ("further", 1, True, "it goes on from run/checkpoints/step=000000001.ckpt"),
        ("crash", 1, False, "it got no further than where it began"),
        ("nothing", 75, False, "it got no further than where it began"),
        ("bad", 2, False, "something given to scfm cannot work"),
    ],
)
def test_only_a_run_that_got_further_comes_back(
    stand_in: Launchpad, does: str, code: int, comes_back: bool, said: str
) -> None:
    job = stand_in.sbatch(SINGLE, *GIVEN, DOES=does, **ONE_NODE)
    assert job.wait(30) == code, stand_in.log()
    assert said in stand_in.log()
    assert stand_in.noted("requeued") == [str(stand_in.job)] * comes_back


def test_without_scfm_or_arguments_it_says_what_to_do(stand_in: Launchpad) -> None:
    assert stand_in.sbatch(SINGLE, "recipe.yaml", "shards").wait(30) != 0
    assert "RECIPE SHARDS RUN [--key value ...]" in stand_in.log()
    assert stand_in.sbatch(SINGLE, *GIVEN, PATH="/usr/bin:/bin").wait(30) == 2
    assert "no scfm on PATH: activate its environment before sbatch" in stand_in.log()


def test_a_part_whose_time_is_over_comes_back(stand_in: Launchpad) -> None:
    asked = [8, "corpus", "--out", "built"]
    job = stand_in.sbatch(BUILD, *asked, SLURM_ARRAY_JOB_ID=7, SLURM_ARRAY_TASK_ID=3, DOES="train")
    until((stand_in.notes / "ready-1-0").exists)
    os.kill(job.pid, signal.SIGUSR1)
    assert job.wait(30) == 75, stand_in.log()
    assert stand_in.noted("starts") == ["prepare corpus --out built --part 3/8 --workers 8 --memory 25"]
    assert stand_in.noted("requeued") == ["7_3"]


def test_the_merge_waits_for_all_parts(stand_in: Launchpad) -> None:
    submit = stand_in.start("scripts/slurm/build_corpus.sh", 4, "corpus", "--out", "built")
    assert submit.wait(30) == 0, stand_in.log()
    given = "scripts/slurm/build_corpus.sbatch 4 corpus --out built"
    parts, merge = stand_in.noted("submitted")
    assert parts == f"--parsable --array=1-4 {given}"
    assert merge == f"--parsable --dependency=afterok:101 --kill-on-invalid-dep=yes {given}"
    assert "parts: job 101, tasks 1 to 4; merge: job 102" in stand_in.log()


@pytest.mark.parametrize("script", sorted((ROOT / "scripts" / "slurm").glob("*.sbatch")), ids=lambda path: path.name)
def test_options_of_sbatch_stand_before_the_first_command(script: Path) -> None:
    """SLURM reads no further; a job that comes back must go on with its log, and its log must not need a folder."""
    lines = script.read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert all(line not in lines[first_command:] for line in options)
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --output=%x-%j.out"} <= set(options)
