"""Which rank the others wait for: a step ends at the same moment everywhere, so what counts is a rank's own part of it.

A rank's own seconds of a step are its wait for data, and the time from the start of the step until the backward that
gradients are summed in; from there on the ranks wait for each other. On GPUs events of the device measure it, read
where a line is logged anyway. With losses between cells (ECS, CCE, DAR) and with fsdp the ranks wait for each other
earlier; what a rank waits there counts as its own, and only the waits for data tell the ranks apart.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import lightning as L
import torch
import torch.distributed

SLOW = 1.3  # times the median of the other ranks
PATIENCE = 3  # reports in a row before the log names a rank


@dataclass(frozen=True)
class Slowest:
    """The rank with the most own seconds per step.

    Attributes:
        rank: which.
        seconds: its own seconds of a step, its wait for data included.
        waiting: of these, its wait for data.
        ratio: its own seconds over the median of those of the other ranks.
    """

    rank: int
    seconds: float
    waiting: float
    ratio: float

    @classmethod
    def of(cls, seconds: Sequence[tuple[float, float]]) -> Slowest:
        """Judge the ranks, two at least, by their own seconds and waits for data per step."""
        rank = max(range(len(seconds)), key=lambda r: seconds[r][0])
        others = median(own for r, (own, _) in enumerate(seconds) if r != rank)
        own, waiting = seconds[rank]
        return cls(rank, own, waiting, own / max(others, 1e-9))


class Stragglers(L.Callback):
    """Measures each rank's own seconds, and gathers them where a line is logged, in one all_gather."""

    def __init__(self) -> None:
        self.hosts = [socket.gethostname()]
        self.named, self.in_a_row = -1, 0
        self.steps: list[tuple[Any, Any]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_gpu = trainer.strategy.root_device.type == "cuda"
        self.steps = []
        if trainer.world_size > 1:
            self.hosts = [""] * trainer.world_size
            torch.distributed.all_gather_object(self.hosts, socket.gethostname())

    def mark(self) -> Any:
        """Return this moment: on a GPU that which the device reaches once it has done all before."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.world_size > 1:
            start = self.mark()
            self.steps.append((start, start))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        if trainer.world_size > 1:  # of several backwards the last is the one that sums gradients
            self.steps[-1] = (self.steps[-1][0], self.mark())

    def slowest(self, trainer: L.Trainer, waited: float) -> Slowest | None:
        """Return the slowest rank since the last look, None where there is one rank; all ranks call this together.

        Args:
            trainer: that of the run.
            waited: seconds that this rank has waited for data since then.
        """
        if trainer.world_size == 1 or not self.steps:
            return None
        own = sum(begun.elapsed_time(end) / 1e3 if self.on_gpu else end - begun for begun, end in self.steps)
        mine = torch.tensor([own + waited, waited], device=trainer.strategy.root_device) / len(self.steps)
        self.steps = []
        everyone = [torch.empty_like(mine) for _ in range(trainer.world_size)]
        torch.distributed.all_gather(everyone, mine)
        return Slowest.of([(both[0], both[1]) for both in torch.stack(everyone).tolist()])

    def warning(self, found: Slowest) -> str:
        """Return what the log should say of a rank that has been slow for some reports in a row; empty for nothing."""
        again = found.ratio > SLOW and found.rank == self.named
        self.in_a_row = self.in_a_row + 1 if again else int(found.ratio > SLOW)
        self.named = found.rank if found.ratio > SLOW else -1
        if self.in_a_row != PATIENCE:
            return ""
        return (
            f"slow rank: {found.rank} on {self.hosts[found.rank]} takes {found.seconds:.3g} s of its own per step, "
            f"{found.ratio:.1f} times the median of the others, {found.waiting:.3g} s of it waiting for data, for "
            f"{PATIENCE} reports in a row; the others wait for it"
        )
