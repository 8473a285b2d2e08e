"""Runs in processes of their own, forked from the test, to be killed for real."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from scfm.checkpoints.native import read_weights
from scfm.cli import main
from scfm.metrics_file import read_metrics
from scfm.recipe import Recipe
from scfm.training.module import FoundationModule

PATIENCE = 120  # seconds after which a process that should have ended has hung


def begin(recipe: Recipe, prepare: Callable[[], None] = lambda: None) -> multiprocessing.process.BaseProcess:
    """Start `scfm pretrain --resume auto` in a process of its own; `prepare` is called in it first."""
    folder = Path(recipe.out).parent
    recipe.save(folder / "recipe.yaml")

    def command() -> None:
        os.setpgid(0, 0)  # so that whatever it starts can be found
        with (folder / "said.txt").open("ab", buffering=0) as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        prepare()
        sys.exit(main(["pretrain", "--config", str(folder / "recipe.yaml"), "--resume", "auto"]))

    process = multiprocessing.get_context("fork").Process(target=command)
    process.start()
    return process


def ended(process: multiprocessing.process.BaseProcess, patience: float = PATIENCE) -> int:
    """Return the exit code of a process, minus the signal where one killed it, once it and all it started are gone."""
    process.join(patience)
    assert process.exitcode is not None, "it hangs"
    end = time.monotonic() + patience
    while left := group_of(process.pid):
        assert time.monotonic() < end, f"orphans: {left}"
        time.sleep(0.01)
    return process.exitcode


def group_of(leader: int | None) -> list[int]:
    """Return the processes that one has started, itself included, but for those that have ended."""
    return processes_with(2, leader)


def children_of(parent: int) -> list[int]:
    """Return the processes that one has started itself, but for those that have ended."""
    return processes_with(1, parent)


def processes_with(field: int, value: int | None) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended just now
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[field]) == value and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


@contextlib.contextmanager
def no_orphans(process: multiprocessing.process.BaseProcess) -> Iterator[None]:
    """End what a failed test has left."""
    try:
        yield
    finally:
        for left in group_of(process.pid):
            os.kill(left, signal.SIGKILL)
        process.join()


def run(recipe: Recipe, prepare: Callable[[], None] = lambda: None) -> int:
    """Start a run and return its exit code."""
    process = begin(recipe, prepare)
    with no_orphans(process):
        return ended(process)


def said_by(recipe: Recipe) -> str:
    """Return what the runs of a recipe have printed."""
    return (Path(recipe.out).parent / "said.txt").read_text()


def at_step(step: int, act: Callable[[], None], rank: int = 0) -> Callable[[], None]:
    """Return what makes a process do something in the middle of a training step, if it is the one of a rank."""

    def prepare() -> None:
        look = FoundationModule.look

        def watched(self: FoundationModule, *args: object) -> object:
            if self.training and self.global_step == step and self.global_rank == rank:
                act()
            return look(self, *args)  # type: ignore[arg-type]

        FoundationModule.look = watched  # type: ignore[method-assign,assignment]

    return prepare


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def logged(run: Path) -> list[tuple[int, str, float]]:
    """Return all that a run logged, but for speeds."""
    return sorted(row for row in read_metrics(run / "metrics.csv") if not row[1].startswith("speed/"))


def assert_same_run(run: Path, other: Path) -> None:
    """Compare weights and metrics of two finished runs, to the bit."""
    weights, expected = read_weights(run / "model"), read_weights(other / "model")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert logged(run) == logged(other)
