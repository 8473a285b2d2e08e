"""The processes of a run: those that a launcher has started already, and that none outlives the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Any

import lightning as L
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment

from scfm.errors import ScfmError

PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal that a process gets when its parent ends


def started_by_launcher() -> tuple[str, int, int] | None:
    """Return the launcher that started this process, the processes of each node, and the nodes; None for no launcher.

    torchrun and SLURM's srun say so in the environment. A SLURM job that does not use srun has one process.
    """
    if TorchElasticEnvironment.detect():
        each = int(os.environ["LOCAL_WORLD_SIZE"])
        return "torchrun", each, int(os.environ["WORLD_SIZE"]) // each
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        nodes = int(os.environ["SLURM_STEP_NUM_NODES"])
        return "srun", int(os.environ["SLURM_STEP_NUM_TASKS"]) // nodes, nodes
    return None


def fit_to_launcher(options: dict[str, Any]) -> None:
    """Set devices and nodes of a trainer to what a launcher started, in place, where the recipe leaves them open.

    Raises ScfmError where the recipe names others.
    """
    started = started_by_launcher()
    if started is None:
        return
    launcher, each, nodes = started
    if each * nodes == 1:
        return
    named = options["devices"]
    devices = len(named) if isinstance(named, list) else each if named in ("auto", -1, "-1") else int(named)
    if devices != each or options["num_nodes"] not in (1, nodes):
        raise ScfmError(
            f"trainer.devices: {launcher} started {each} processes on each of {nodes} nodes, the recipe says devices "
            f"{named} and num_nodes {options['num_nodes']}; set trainer.devices: auto, which takes what was started"
        )
    options |= {"devices": each, "num_nodes": nodes}


class EndsWithLauncher(L.Callback):
    """Lets the system kill a process of a run whose launcher has ended, even by SIGKILL (Linux).

    Else it would wait for the others within a collective, for minutes, and hold its port and its GPU. It is killed
    rather than asked: within a collective it answers no signal.
    """

    def __init__(self) -> None:
        self.built_in = os.getpid()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        environment = getattr(trainer.strategy, "cluster_environment", None)
        forked = os.getpid() != self.built_in
        by_torchrun = isinstance(environment, TorchElasticEnvironment)
        by_first = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
        if sys.platform == "linux" and (forked or by_torchrun or by_first):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if forked and os.getppid() != self.built_in:  # it ended before
                os.kill(os.getpid(), signal.SIGKILL)
