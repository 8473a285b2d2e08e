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
    """

    def __init__(self) -> None:
        self.ceiling: float | None = None

    def reset(self) -> None:
        self.work, self.cells, self.room = Work(), 0, 0
        self.since = time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        device = trainer.strategy.root_device
        if self.ceiling is None and device.type in ("cpu", "cuda"):
            dtype = torch.bfloat16 if device.type == "cuda" else product_type(str(trainer.precision))
            self.ceiling = matmul_ceiling(device, dtype)
        self.waited = 0.0
        self.reset()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: list[PackedBatch], batch_idx: int
    ) -> None:
        assert isinstance(pl_module, FoundationModule)
        network: Any = pl_module.network
        for pack in batch:
            self.work += Work.of(pack, network.backbone.config.attention)
            self.room += pack.n_tokens
        self.cells += batch[0].total_cells

    def figures(self, trainer: L.Trainer, module: FoundationModule) -> dict[str, float]:
        """Return the figures since the last look, over all ranks, taking the others to do what this one does.

        The caller has waited for the device.
        """
        seconds, ranks = time.perf_counter() - self.since, trainer.world_size
        # the step that has just ended was taken at the step before
        flops = training_flops(module.network, module.objectives, self.work, trainer.global_step - 1) / seconds
        waited = self.data_wait(trainer)
        found = {
            "cells_per_second": self.cells / seconds,
            "tokens_per_second": self.work.tokens * ranks / seconds,
            "tflops": flops * ranks / 1e12,
            "data_wait": max(0.0, waited - self.waited) / seconds,
            "empty": 1 - self.work.tokens / max(self.room, 1),
            "peak_memory_gb": peak_memory(trainer.strategy.root_device) / 1e9,
        }
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
