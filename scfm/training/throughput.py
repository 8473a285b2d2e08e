"""How fast a run goes: cells and real tokens a second, model FLOPs, MFU, waits for data, empty room, peak memory."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning as L
import torch

from scfm.ceiling import matmul_ceiling, product_type
from scfm.data.batch import PackedBatch
from scfm.flops import Work, training_flops
from scfm.training.datamodule import CellDataModule
from scfm.training.module import FoundationModule


class Throughput(L.Callback):
    """Counts what the steps do; the figures since the last look are read where a line is logged anyway.

    FLOPs are those of `scfm.flops`. MFU is stated against large matrix products measured on the device as training
    starts: bf16 ones on a GPU, of the run's own precision on a CPU.

    Validation and saving are no part of any rate: where one of them took place between two steps, all that passed
    between these, waits for data aside, is taken out and told by itself (`validation_seconds`,
    `checkpoint_seconds`). So this callback stands after those that save before a step.
    """

    def __init__(self) -> None:
        self.ceiling: float | None = None

    def reset(self) -> None:
        self.work, self.cells, self.room, self.steps = Work(), 0, 0, 0
        self.away = {"validation": 0.0, "checkpoint": 0.0}
        self.since = time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        device = trainer.strategy.root_device
        if self.ceiling is None and device.type in ("cpu", "cuda"):
            dtype = torch.bfloat16 if device.type == "cuda" else product_type(str(trainer.precision))
            self.ceiling = matmul_ceiling(device, dtype)
        self.waited = self.waited_until = self.data_wait(trainer)
        self.ended = 0.0
        self.forget_gap()
        self.reset()

    def forget_gap(self) -> None:
        """Begin to watch what happens until the next step."""
        self.saved, self.validating, self.validated, self.drained = False, 0.0, 0.0, 0.0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.drain(trainer)
            self.validating = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validated = time.perf_counter() - self.validating

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.drain(trainer)
        self.saved = True

    def drain(self, trainer: L.Trainer) -> None:
        """Wait for the device, as what follows would: the steps that it still computes are no part of that."""
        before = time.perf_counter()
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(trainer.strategy.root_device)
        self.drained += time.perf_counter() - before

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: list[PackedBatch], batch_idx: int
    ) -> None:
        if self.validating or self.saved:
            waited = self.data_wait(trainer) - self.waited_until
            gap = time.perf_counter() - max(self.ended, self.since) - waited - self.drained
            judging = gap if not self.saved else min(self.validated, gap)
            self.away["validation"] += judging
            self.away["checkpoint"] += gap - judging
        self.forget_gap()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: list[PackedBatch], batch_idx: int
    ) -> None:
        assert isinstance(pl_module, FoundationModule)
        network: Any = pl_module.network
        for pack in batch:
            self.work += Work.of(pack, network.backbone.config.attention)
            self.room += pack.n_tokens
        self.cells += batch[0].total_cells
        self.steps += 1
        self.ended, self.waited_until = time.perf_counter(), self.data_wait(trainer)

    def figures(self, trainer: L.Trainer, module: FoundationModule) -> dict[str, float]:
        """Return the figures since the last look, over all ranks, taking the others to do what this one does.

        The caller has waited for the device.
        """
        seconds, ranks = time.perf_counter() - self.since - sum(self.away.values()), trainer.world_size
        # the step that has just ended was taken at the step before
        flops = training_flops(module.network, module.objectives, self.work, trainer.global_step - 1) / seconds
        waited = self.data_wait(trainer)
        found = {
            "step_seconds": seconds / self.steps,
            "cells_per_second": self.cells / seconds,
            "tokens_per_second": self.work.tokens * ranks / seconds,
            "tflops": flops * ranks / 1e12,
            "data_wait": max(0.0, waited - self.waited) / seconds,
            "empty": 1 - self.work.tokens / max(self.room, 1),
            "peak_memory_gb": peak_memory(trainer.strategy.root_device) / 1e9,
        }
        found |= {f"{what}_seconds": taken for what, taken in self.away.items() if taken > 0}
        if self.ceiling is not None:
            found["mfu"] = flops / self.ceiling
        self.waited = waited
        self.reset()
        return found

    @staticmethod
    def data_wait(trainer: L.Trainer) -> float:
        """Seconds that this rank has waited for batches so far."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        return data.loader.packs.wait_seconds if isinstance(data, CellDataModule) and data.loader else 0.0


def peak_memory(device: torch.device) -> float:
    """Return the most bytes that were taken so far: of a GPU by tensors, elsewhere by the whole process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
