"""Storms: many kills at random moments, and the weights of an undisturbed run at the end. Run by hand with -m slow."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from killing import PATIENCE, assert_same_run, begin, children_of, ended, group_of, no_orphans
from runs import tiny_recipe, write_shards

from scfm.errors import SAVED
from scfm.recipe import Recipe
from scfm.recipe_reader import bundled, read_recipe
from scfm.training.run import pretrain
from scfm.training.saving import checkpoints, step_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

KILLS = 25
AT_THE_START = 0.25  # share of kills within the first second, wherever that finds the run


def quickstart(folder: Path, devices: int) -> Recipe:
    """Return the quickstart's pretraining on the cells of `scfm demo`, saved often."""
    import scanpy

    from scfm.data.prepare import prepare

    folder.mkdir()
    if not (shards := folder.parent / "shards").exists():
        scanpy.datasets.pbmc68k_reduced().write_h5ad(folder.parent / "cells.h5ad")
        prepare([folder.parent / "cells.h5ad"], shards, accept_normalised=True)
    two = {"devices": devices, "strategy": "ddp_fork"} if devices > 1 else {}
    overrides: dict[str, Any] = {
        "out": str(folder / "run"),
        "data": {"shards": str(shards)},
        "trainer": {"accelerator": "cpu", "log_every_n_steps": 1, **two},
        "checkpoint": {"every_steps": 5},
    }
    return read_recipe(bundled("pretrain/quickstart.yaml"), overrides)


def tiny(folder: Path, devices: int) -> Recipe:
    folder.mkdir()
    if not (shards := folder.parent / "shards").exists():
        write_shards(shards)
    trainer = {"max_steps": 200, "log_every_n_steps": 1}
    return tiny_recipe(shards, folder / "run", trainer=trainer, checkpoint={"every_steps": 5})


def step_reached(run: Path) -> int:
    """Return the last step that a run has logged."""
    log = run / "log.txt"
    found = re.findall(r"^step (\d+)/", log.read_text(errors="replace"), re.MULTILINE) if log.exists() else []
    return int(found[-1]) if found else 0


def strike(process: Any, draw: random.Random) -> str:
    """Kill what belongs to a run, or ask it to stop; return what was done."""
    everyone = group_of(process.pid)
    ranks = [number for number in everyone if number != process.pid]
    what = draw.choice(["power cut", "SIGTERM", "SIGUSR1", *(["a rank killed"] * 2 if ranks else ["killed"])])
    victims = {
        "power cut": everyone,
        "killed": everyone,
        "a rank killed": [draw.choice(ranks)] if ranks else [],
        "SIGTERM": [draw.choice(everyone)] if everyone else [],
        "SIGUSR1": [process.pid],
    }[what]
    number = signal.Signals[what] if what.startswith("SIG") else signal.SIGKILL
    for victim in victims:
        os.kill(victim, number)
    return what


@pytest.mark.parametrize(
    ("recipe_of", "devices"), [(tiny, 1), (quickstart, 2)], ids=["one process", "quickstart on two"]
)
def test_a_storm_of_kills(recipe_of: Any, devices: int, tmp_path: Path) -> None:
    draw, strikes, slowest, lost = random.Random(8), Counter[str](), 0.0, 0
    whole = recipe_of(tmp_path / "whole", devices)
    started = time.monotonic()
    pretrain(whole)
    undisturbed, steps = time.monotonic() - started, step_reached(Path(whole.out))
    recipe = recipe_of(tmp_path / "storm", devices)
    started = time.monotonic()
    while strikes.total() < KILLS:
        kept = checkpoints(Path(recipe.out) / "checkpoints")
        process = begin(recipe)
        with no_orphans(process):
            if draw.random() < AT_THE_START:
                time.sleep(draw.random())
            else:
                goal = (step_of(kept[-1]) if kept else 0) + draw.randint(1, steps // KILLS)
                while process.exitcode is None and step_reached(Path(recipe.out)) < goal:
                    time.sleep(0.001)
                time.sleep(draw.random() * 0.1)
            assert process.exitcode is None, f"it ended by itself, with {process.exitcode}, before it was killed"
            strikes[strike(process, draw)] += 1
            before = time.monotonic()
            code = ended(process)
            slowest = max(slowest, time.monotonic() - before)
        assert code in (SAVED, 1, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGUSR1), code
        kept = checkpoints(Path(recipe.out) / "checkpoints")
        lost += max(0, step_reached(Path(recipe.out)) - (step_of(kept[-1]) if kept else 0))
    process = begin(recipe)
    with no_orphans(process):
        assert ended(process, 10 * PATIENCE) == 0
    assert_same_run(Path(recipe.out), Path(whole.out))
    print(
        f"\n{steps} steps, {strikes.total()} strikes {dict(strikes)}; {lost} steps were repeated; all processes were "
        f"gone at most {slowest:.1f} s after a strike; {undisturbed:.0f} s undisturbed, "
        f"{time.monotonic() - started:.0f} s in the storm; weights and metrics are equal to the bit"
    )


def test_torchrun_starts_again_what_was_killed(tmp_path: Path) -> None:
    """Each time one of two workers is killed; `--max-restarts` goes on from the last checkpoint."""
    kills, draw = 3, random.Random(8)
    whole = quickstart(tmp_path / "whole", devices=2)
    pretrain(whole)
    recipe = quickstart(tmp_path / "storm", devices=2)
    recipe.trainer.strategy = "ddp"
    recipe.save(tmp_path / "recipe.yaml")
    log = Path(recipe.out) / "log.txt"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        f"--max-restarts={kills}",
    ]
    command += ["--monitor-interval=0.1", "-m", "scfm.cli", "pretrain", "--config", str(tmp_path / "recipe.yaml")]
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) as agent:
        try:
            for kill in range(kills):
                goal = (kill + 1) * 40 + draw.randint(0, 10)
                while step_reached(Path(recipe.out)) < goal:
                    assert agent.poll() is None, "torchrun gave up"
                    time.sleep(0.01)
                while not (workers := children_of(agent.pid)):
                    time.sleep(0.01)
                os.kill(draw.choice(workers), signal.SIGKILL)
            assert agent.wait(10 * PATIENCE) == 0
        finally:
            for left in children_of(agent.pid):
                os.kill(left, signal.SIGKILL)
            agent.kill()
    assert log.read_text().count("ended in the middle of the run") >= 1
    assert_same_run(Path(recipe.out), Path(whole.out))
