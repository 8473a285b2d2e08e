"""Processor cores of their own for the processes of a run on CPUs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed


class OwnCores(L.Callback):
    """Pins the threads of each process of a CPU run to its share of the cores, lest they take turns.

    A process computes with no more threads than it has cores. (OpenMP's do not live on in a forked process: one that
    asked for several would wait for them for ever.)

    Nothing is pinned where there is one process or a GPU, where cores are fewer than processes, where the launcher has
    shared the cores out already (as SLURM does), or where the system cannot pin (macOS).
    """

    def __init__(self) -> None:
        self.before: set[int] = set()
        self.threads = torch.get_num_threads()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        on_cpu = trainer.strategy.root_device.type == "cpu"
        if not on_cpu or trainer.num_devices == 1 or not hasattr(os, "sched_setaffinity"):
            return
        allowed = os.sched_getaffinity(0)
        everyone: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(everyone, (trainer.node_rank, allowed))
        shared = all(cores == allowed for node, cores in everyone if node == trainer.node_rank)
        mine = share_of(allowed, trainer.local_rank, trainer.num_devices)
        if shared and mine:
            self.before, self.threads = allowed, torch.get_num_threads()
            torch.set_num_threads(min(self.threads, len(mine)))
            pin(mine)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.before:
            pin(self.before)
            torch.set_num_threads(self.threads)
            self.before = set()


def share_of(cores: set[int], rank: int, ranks: int) -> set[int]:
    """Return the cores of one of several processes: neighbours, as many for each; none where they do not suffice."""
    each = len(cores) // ranks
    return set(sorted(cores)[rank * each : (rank + 1) * each])


def pin(cores: set[int]) -> None:
    """Bind all threads of this process, those that are running already too, to these cores."""
    for thread in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(thread.name), cores)
        except ProcessLookupError:  # it ended just now
            continue
