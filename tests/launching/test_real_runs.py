"""Every launch script trains, or builds a corpus, for real: two processes on a CPU, SLURM or not."""

from __future__ import annotations

import os
import signal

import pytest
from corpora import corpus, names
from launchpad import ROOT, Launchpad, until

from scfm.data.shards import open_shards
from scfm.metrics_file import read_metrics

pytestmark = pytest.mark.distributed

GIVEN = ["recipe.yaml", "shards", "run"]
ON_CPU = ["--trainer.accelerator", "cpu"]
SAVES_WHEN_TOLD = any("SIGUSR1" in path.read_text() for path in (ROOT / "scfm").rglob("*.py"))


def trained_by_two(place: Launchpad) -> bool:
    """Whether the run of a place had two processes, and left its model."""
    two = "2 x cpu" in (place.folder / "run" / "log.txt").read_text()
    return two and (place.folder / "run" / "model" / "model.safetensors").exists()


def test_several_nodes(real: Launchpad) -> None:
    shape = {"SLURM_NTASKS_PER_NODE": 1, "SLURM_JOB_NUM_NODES": 2}
    job = real.sbatch("scripts/slurm/multi_node.sbatch", *GIVEN, *ON_CPU, **shape)
    assert job.wait(100) == 0, real.log()
    assert real.noted("hostnames") == ["here[1-2]"]
    assert "1 shards in shards are as they were written" in real.log()
    assert trained_by_two(real)
    assert real.noted("requeued") == []


@pytest.mark.skipif(
    not SAVES_WHEN_TOLD, reason="scfm does not save at SIGUSR1 yet: the queue is tested with a stand-in"
)
def test_one_node_whose_time_is_over_comes_back_and_ends(real: Launchpad) -> None:
    one_node = {"SLURM_NTASKS_PER_NODE": 2, "SLURM_JOB_NUM_NODES": 1}
    asked = [*GIVEN, *ON_CPU, "--trainer.max_steps", "60", "--checkpoint.every_steps", "1000"]
    job = real.sbatch("scripts/slurm/single_node.sbatch", *asked, **one_node)
    metrics = real.folder / "run" / "metrics.csv"
    until(lambda: job.poll() is not None or (metrics.exists() and len(metrics.read_text()) > 1000), 100)
    os.kill(job.pid, signal.SIGUSR1)
    assert job.wait(100) == 75, real.log()
    assert real.noted("requeued") == [str(real.job)]
    begun = real.log()
    again = real.sbatch("scripts/slurm/single_node.sbatch", *asked, restarts=1, **one_node)
    assert again.wait(100) == 0, real.log()
    assert "from run/checkpoints/step=" in real.log().removeprefix(begun)
    assert [step for step, name, _ in read_metrics(metrics) if name == "train/loss"] == list(range(2, 61, 2))
    assert trained_by_two(real)


def test_a_corpus_is_built_in_parts_and_put_together(real: Launchpad) -> None:
    build = "scripts/slurm/build_corpus.sbatch"
    corpus(real.folder / "corpus", sizes=(70, 60))
    asked = [2, "corpus", "--out", "built", "--obs", "cell_name"]
    one_core = {"SLURM_CPUS_PER_TASK": 1, "SLURM_MEM_PER_NODE": 4096}
    parts = [real.sbatch(build, *asked, SLURM_ARRAY_JOB_ID=7, SLURM_ARRAY_TASK_ID=i, **one_core) for i in (1, 2)]
    assert [part.wait(100) for part in parts] == [0, 0], real.log()
    assert not (real.folder / "built").exists()
    assert real.sbatch(build, *asked, **one_core).wait(100) == 0, real.log()
    expected = [f"a:{i}" for i in range(70)] + [f"b:{i}" for i in range(60)]
    assert sorted(names(open_shards(real.folder / "built"))) == sorted(expected)


def test_box(real: Launchpad) -> None:
    """Also in a shell of a SLURM allocation, which no task was started in."""
    two = [*ON_CPU, "--trainer.devices", 2, "--trainer.strategy", "ddp_fork"]
    box = real.start("scripts/launch/box.sh", *GIVEN, *two, SLURM_NTASKS="4", SLURM_JOB_ID="7")
    assert box.wait(100) == 0, real.log()
    assert "2 x cpu" in (real.folder / "run.out").read_text()
    assert trained_by_two(real)


def test_torchrun(real: Launchpad) -> None:
    run = real.start("scripts/launch/torchrun.sh", *GIVEN, *ON_CPU, PROCESSES="2")
    assert run.wait(100) == 0, real.log()
    assert trained_by_two(real)
