"""How fast this machine trains: its own matrix products, and real steps of the recipe's own model on a small pack."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from scfm.ceiling import matmul_ceiling, product_type
from scfm.data.batch import PackedBatch
from scfm.flops import Work, training_flops
from scfm.objectives import Objective
from scfm.recipe import Recipe
from scfm.training.launch import build_trainer, set_up_blocks
from scfm.training.module import FoundationModule

CEILING_SECONDS = 3.0
STEP_SECONDS = 1.0  # a timed step should take about this long
TIMED_SECONDS = 6.0
TIMED_STEPS = 5
WARM_UP = 2
USUAL_MFU = 0.4  # only to choose the size of the timed pack


@dataclass(frozen=True)
class Rate:
    """Measured speed of this machine.

    Attributes:
        ceiling: FLOP/s of large matrix products.
        mfu: share of it that forward and backward of a training step reach.
        optimizer_seconds: seconds of clipping and the optimizer in each step, whatever the batch.
        tokens: tokens of the timed pack.
        steps: timed steps.
    """

    ceiling: float
    mfu: float
    optimizer_seconds: float
    tokens: int
    steps: int


def measure(
    recipe: Recipe, network: nn.Module, objectives: Sequence[Objective], lengths: NDArray[np.int32], pack_tokens: int
) -> Rate:
    """Time training steps of a network on the CPU, all objectives active, on one pack of synthetic cells.

    Args:
        recipe: its precision, optimizer, masks, compilation and recomputation count.
        network: trained in place on random cells; its weights are worthless afterwards.
        objectives: the terms of the loss.
        lengths: (n,) tokens of the cells that the pack should resemble.
        pack_tokens: tokens of a pack in the run; the timed one has no more.
    """
    ceiling = matmul_ceiling("cpu", product_type(recipe.trainer.precision), size=2048, seconds=CEILING_SECONDS)
    all_active: list[Any] = [replace(objective, start_step=0) for objective in objectives]  # type: ignore[type-var]
    mean = float(lengths.mean())

    def flops_of(pack: PackedBatch) -> float:
        return training_flops(network, all_active, Work.of(pack, recipe.model.attention), 0)

    one = flops_of(synthetic_pack(recipe, network, np.array([round(mean)], np.int32)))
    wished = STEP_SECONDS * USUAL_MFU * ceiling / one
    n_cells = max(1, round(min(wished, pack_tokens / mean)))
    chosen = np.quantile(lengths, (np.arange(n_cells) + 0.5) / n_cells, method="nearest").astype(np.int32)
    pack = synthetic_pack(recipe, network, chosen)
    set_up_blocks(network, recipe.trainer)
    clock = _StepClock()
    options = replace(
        recipe.trainer, accelerator="cpu", devices=1, num_nodes=1, strategy="auto", max_steps=10_000, max_epochs=None,
        max_time=None, limit_train_batches=None, overfit_batches=0.0, fast_dev_run=False, profiler=None,
        val_check_interval=None,
    )  # fmt: skip
    module = FoundationModule(network, all_active, recipe.optimizer, recipe.seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no `val_dataloader`")
        trainer = build_trainer(
            replace(recipe, trainer=options), callbacks=[clock], logger=False, enable_checkpointing=False
        )
        trainer.fit(module, _Forever([pack]))
    passes, optimizer = median(clock.passes[WARM_UP:]), median(clock.optimizer[WARM_UP:])
    return Rate(ceiling, flops_of(pack) / passes / ceiling, optimizer, pack.n_tokens, len(clock.passes) - WARM_UP)


def synthetic_pack(recipe: Recipe, network: nn.Module, lengths: NDArray[np.int32]) -> PackedBatch:
    """Return a pack of random cells of these lengths; the mask ratios take turns, conditions are all 0."""
    model: Any = network
    ratios = np.resize(recipe.data.mask_ratios, len(lengths))
    known = lengths - ((lengths - 1) * ratios).astype(np.int32)
    n_tokens, n_cells = int(lengths.sum()), len(lengths)
    draw = torch.Generator().manual_seed(recipe.seed)
    highest = model.backbone.gene_embedding.embedding.num_embeddings
    bins = torch.randint(1, recipe.data.n_bins, (n_tokens,), generator=draw).float()
    return PackedBatch(
        genes=torch.randint(0, highest, (n_tokens,), generator=draw, dtype=torch.int32),
        values=bins,
        targets=bins.clone(),
        cu_seqlens=torch.from_numpy(np.append(0, lengths.cumsum()).astype(np.int32)),
        n_known=torch.from_numpy(known),
        cell_id=torch.arange(n_cells),
        gene_conditions={name: torch.zeros(n_tokens, dtype=torch.int64) for name in recipe.data.gene_conditions},
        cell_conditions={name: torch.zeros(n_cells, dtype=torch.int64) for name in (*recipe.cell_conditions, "label")},
        total_cells=n_cells,
        total_unknown=int((lengths - known).sum()),
    )


class _Forever:
    """The same global batch again and again."""

    def __init__(self, packs: list[PackedBatch]) -> None:
        self.packs = packs

    def __iter__(self) -> Any:
        while True:
            yield self.packs


class _StepClock(L.Callback):
    """Times the passes and the optimizer of each step, and ends the run once enough are timed."""

    def __init__(self) -> None:
        self.passes: list[float] = []
        self.optimizer: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.start = time.perf_counter()

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.passed = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.passes.append(self.passed - self.start)
        self.optimizer.append(time.perf_counter() - self.passed)
        timed = self.passes[WARM_UP:]
        trainer.should_stop = len(timed) >= TIMED_STEPS and sum(timed) >= TIMED_SECONDS
