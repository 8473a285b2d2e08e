"""`scfm bench train`: real training steps of a recipe, timed in windows.

What runs is what `scfm pretrain` runs (loader, module, trainer), without validation, checkpoints and a run directory.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import lightning as L
import torch

from scfm.bench.cells import synthetic_store
from scfm.bench.report import at_least_one, device_name, of_rates, of_times, publish, significant
from scfm.data.store import CellStore
from scfm.errors import ScfmError
from scfm.recipe import Recipe
from scfm.recipe_check import check
from scfm.training.launch import build_trainer
from scfm.training.module import FoundationModule
from scfm.training.run import Job, mixing_of, modules_of, pretraining_job
from scfm.training.rundir import is_main_process
from scfm.training.throughput import Throughput

GENES, VOCABULARY = 1500, 60_694


def train(
    recipe: Recipe,
    steps: int = 20,
    repeats: int = 3,
    warmup: int = 5,
    genes: int = GENES,
    vocabulary: int = VOCABULARY,
    out: str | None = None,
) -> None:
    """Time training steps of a recipe, all its objectives active, and print the result as JSON.

    Args:
        recipe: The run; without `data.shards` its cells are synthetic.
        steps: Optimizer steps in a timed window.
        repeats: Timed windows.
        warmup: Steps before the first of them.
        genes: Mean number of expressed genes in a synthetic cell.
        vocabulary: Genes of the vocabulary of synthetic cells; 60,694 are those of the published scGPT.
        out: File that also receives the JSON.
    """
    result = bench_train(recipe, steps, repeats, warmup, genes, vocabulary)
    if is_main_process():
        publish("train", result, in_words(result), out)


def bench_train(
    recipe: Recipe,
    steps: int = 20,
    repeats: int = 3,
    warmup: int = 5,
    genes: int = GENES,
    vocabulary: int = VOCABULARY,
) -> dict[str, Any]:
    """Return the figures of training, medians over the windows; arguments as those of `train`.

    Without `data.shards` it needs torch, numpy, numba and lightning only. Raises ScfmError for a recipe that cannot
    work.
    """
    at_least_one(steps=steps, repeats=repeats, warmup=warmup, genes=genes, vocabulary=vocabulary)
    check(recipe)
    recipe = endless(recipe, warmup + steps * repeats)
    job = pretraining_job(recipe, cells_of(recipe, genes, vocabulary))
    job.valid_rows = range(0)
    module, data = modules_of(job)
    throughput = Throughput()
    windows = Windows(throughput, warmup, steps)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no `val_dataloader`")
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
        trainer = build_trainer(recipe, callbacks=[throughput, windows], logger=False, enable_checkpointing=False)
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        trainer.fit(module, data)
    found = windows.figures
    middle = {name: significant(median(window[name] for window in found)) for name in found[0]}
    speeds = {name: of_rates([window[name] for window in found]) for name in ("cells_per_second", "tokens_per_second")}
    return {
        **middle,
        **speeds,
        "step_ms": of_times([1000 * recipe.data.cells_per_batch / window["cells_per_second"] for window in found]),
        **({"ceiling_tflops": significant(throughput.ceiling / 1e12)} if throughput.ceiling else {}),
        "steps": steps,
        "repeats": repeats,
        "warmup": warmup,
        **about(job, trainer, genes),
    }


def endless(recipe: Recipe, steps: int) -> Recipe:
    """Return a recipe of so many steps in which nothing but training happens, and every objective from the start."""
    trainer = replace(
        recipe.trainer, max_steps=steps, max_epochs=None, min_epochs=None, min_steps=None, max_time=None,
        limit_train_batches=None, limit_val_batches=None, overfit_batches=0.0, fast_dev_run=False,
        val_check_interval=None, profiler=None,
    )  # fmt: skip
    objectives = [replace(objective, start_step=0) for objective in recipe.objectives]
    return replace(recipe, trainer=trainer, objectives=objectives, data=replace(recipe.data, valid_fraction=0.0))


def cells_of(recipe: Recipe, genes: int, vocabulary: int) -> CellStore:
    """Return the cells of a recipe, or synthetic ones for all its steps."""
    data = recipe.data
    if data.shards is not None:
        from scfm.data.shards import open_shards

        return open_shards(data.shards)
    if data.gene_conditions:
        raise ScfmError("data.gene_conditions: names real genes, which synthetic cells do not have; give data.shards")
    # an epoch that ends would drain the loader; batches prepared ahead are beyond the last step
    batches = recipe.trainer.max_steps + data.prefetch
    return synthetic_store(batches * data.cells_per_batch, genes, vocabulary, recipe.cell_conditions)


class Windows(L.Callback):
    """Reads the figures of `Throughput` after each window of steps, once the device has done them.

    Args:
        throughput: counts the steps; stands before this one among the callbacks.
        warmup: steps before the first window.
        steps: of a window.
    """

    def __init__(self, throughput: Throughput, warmup: int, steps: int) -> None:
        self.throughput, self.warmup, self.steps = throughput, warmup, steps
        self.figures: list[dict[str, float]] = []
        self.since = self.cpu = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, FoundationModule)
        step, device = trainer.global_step, trainer.strategy.root_device
        if step < self.warmup or (step - self.warmup) % self.steps:
            return
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        figures = self.throughput.figures(trainer, pl_module)
        if step > self.warmup:
            if device.type == "cpu":  # of other processes on the machine, the CPU time knows nothing
                cells = figures["cells_per_second"] * (time.perf_counter() - self.since)
                figures["cells_per_cpu_second"] = cells / (time.process_time() - self.cpu)
            self.figures.append(figures)
        self.since, self.cpu = time.perf_counter(), time.process_time()


def about(job: Job, trainer: L.Trainer, genes: int) -> dict[str, Any]:
    """Return what the figures were measured on: device, settings, shapes."""
    recipe, device = job.recipe, trainer.strategy.root_device
    data, model = recipe.data, recipe.model
    backend, reason = mixing_of(model, device, trainer.precision)
    return {
        "device": device_name(device),
        "devices": trainer.world_size,
        "attention": {"backend": backend, "reason": reason, "mask": model.attention},
        "precision": str(trainer.precision),
        "compile": recipe.trainer.compile,
        "gradient_checkpointing": recipe.trainer.gradient_checkpointing,
        "optimizer": recipe.optimizer.name,
        "objectives": [objective.name for objective in recipe.objectives],
        "parameters": sum(p.numel() for p in job.network.parameters()),
        "model": {
            name: getattr(model, name)
            for name in ("width", "heads", "layers", "hidden", "dropout", "norm", "value_encoder", "cell_embedding",
                         "mixer")
        },
        "performer": asdict(model.performer) if model.name == "scbert" else None,
        "data": {
            name: getattr(data, name)
            for name in ("shards", "max_genes", "cells_per_batch", "tokens_per_pack", "fill_packs", "n_bins",
                         "tie_policy", "mask_ratios", "threads", "prefetch")
        },
        "genes_per_synthetic_cell": genes if data.shards is None else None,
        "vocabulary": len(job.store.vocabulary),
    }  # fmt: skip


def in_words(result: dict[str, Any]) -> str:
    """Return the figures as a line."""
    share = f" ({result['mfu']:.1%} MFU of {result['ceiling_tflops']:.4g})" if "mfu" in result else ""
    compiled = ", compiled" if result["compile"] else ""
    return (
        f"train: {result['cells_per_second']['median']:,.1f} cells/s  "
        f"{result['tokens_per_second']['median']:,.0f} tokens/s  {result['tflops']:.4g} TFLOP/s{share}  "
        f"wait {result['data_wait']:.2%}  empty {result['empty']:.2%}  peak {result['peak_memory_gb']:.3g} GB  "
        f"on {result['device']}, {result['precision']}{compiled}, attention {result['attention']['backend']}"
    )
