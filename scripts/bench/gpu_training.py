"""Parts of the GPU check that train: the step end to end, beside a dense-mask peer, without waits, as large as fits."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import lightning as L
import numpy as np
import torch
from gpu_kernels import timed
from gpu_record import Figures, Record
from torch import nn
from train_vs_dense import BINS, PEERS, Kind, Shape, made_up_batch, peer_loss, scfm_loss

from scfm.data.batch import PackedBatch
from scfm.data.store import CellBlock, CellStore
from scfm.data.tokens import TokenConfig, Tokeniser
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.flops import Work, training_flops
from scfm.model import ScGPT
from scfm.objectives import build_objectives
from scfm.recipe import DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, Recipe, TrainerConfig
from scfm.recipe_reader import bundled, read_yaml
from scfm.training.datamodule import CellDataModule
from scfm.training.launch import build_trainer, set_up_blocks
from scfm.training.module import FoundationModule
from scfm.training.throughput import Throughput

GENES = 60_695  # scGPT's vocabulary has 60,697 tokens
MEASURED, DATASHEET = 790e12, 989e12  # bf16 FLOP/s of an H200: large products as we measured them, and as sold
GOAL = 0.38  # of the measured ones, end to end
PASSES = {1: ("gep", "gepc"), 2: ("gep", "gepc", "cell_prompt")}


def published(record: Record, tokens_per_pack: int, passes: int) -> Recipe:
    """Return scGPT's published geometry on one device, one full pack per step; tiny where the check is."""
    sections = read_yaml(bundled("pretrain/scgpt-whole-human.yaml"))
    data, model = DataConfig(**sections["data"]), ModelConfig(**sections["model"])
    if record.tiny:
        data = replace(data, max_genes=23)
        model = replace(model, width=16, heads=2, layers=1, hidden=16)
    cells = tokens_per_pack // (data.max_genes + 1)
    data = replace(data, tokens_per_pack=tokens_per_pack, cells_per_batch=cells, valid_fraction=0.0)
    return Recipe(
        data=data,
        model=model,
        objectives=[ObjectiveConfig(name) for name in PASSES[passes]],
        optimizer=OptimizerConfig(**sections["optimizer"] | {"warmup": 10}),
        trainer=TrainerConfig(accelerator=record.device.type, devices=1, precision="bf16-mixed", max_steps=100_000),
    )


@cache
def made_up_store(n_genes: int, expressed: int, n_cells: int) -> CellStore:
    """Return cells with a quarter more expressed genes than become tokens; as in real ones, some genes are common."""
    draw = np.random.default_rng(0)
    genes = np.empty((n_cells, expressed), np.uint16)
    commonness = -1.5 * np.log(np.arange(1, n_genes + 1) + 200)
    for cell in range(n_cells):
        chance = commonness + draw.gumbel(size=n_genes).astype(np.float32)
        genes[cell] = np.sort(np.argpartition(chance, -expressed)[-expressed:])
    counts = draw.geometric(0.4, genes.size).astype(np.uint16)
    block = CellBlock(np.arange(0, genes.size + 1, expressed), genes.ravel(), counts)
    return CellStore(
        Vocabulary([*(Gene(f"G{i}") for i in range(n_genes)), Gene("<pad>"), Gene("<cls>")]), "counts", [block]
    )


def store_of(record: Record) -> CellStore:
    return made_up_store(60, 30, 40) if record.tiny else made_up_store(GENES, 1500, 2048)


def data_of(record: Record, recipe: Recipe) -> CellDataModule:
    store, data = store_of(record), recipe.data
    tokens = TokenConfig(max_genes=data.max_genes, n_bins=data.n_bins, mask_ratios=data.mask_ratios)
    # the cells again and again, for the loader starts anew with each epoch: of four batches that would be seen
    rows = np.tile(np.arange(store.n_cells), 100)
    return CellDataModule(store, Tokeniser(tokens, store.vocabulary, "counts"), data, rows, rows[:0], {}, 0)


def network_of(record: Record, recipe: Recipe, compiled: bool) -> nn.Module:
    """Return a model with the heads of all objectives, on the device."""
    every = build_objectives([ObjectiveConfig(name) for name in PASSES[2]], n_bins=recipe.data.n_bins)
    heads = list({head.task: head for objective in every for head in objective.heads()}.values())
    vocabulary = store_of(record).vocabulary
    torch.manual_seed(0)
    with record.device:
        network = ScGPT(recipe.model, len(vocabulary), vocabulary.pad, recipe.data.n_bins, {}, {}, heads)
    if compiled:
        compile_blocks(network, record)
    return network


def compile_blocks(network: nn.Module, record: Record) -> None:
    """Compile as a run does; in a try on a CPU without Inductor, which would take longer than everything else."""
    if record.device.type == "cuda":
        set_up_blocks(network, TrainerConfig(compile=True))
        return
    blocks: Any = network.backbone.blocks
    for block in blocks:
        block.compile(fullgraph=True, dynamic=True, backend="aot_eager")


class Stopwatch(L.Callback):
    """Hands `throughput` the steps that follow a warm-up, as many as fill some seconds, and then ends the run."""

    def __init__(self, throughput: Throughput, record: Record, seconds: float) -> None:
        self.throughput, self.record, self.seconds = throughput, record, seconds
        self.warm_up = 1 if record.tiny else 4
        self.steps, self.last, self.figures = 0, 0, {}
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.steps += 1
        if self.steps == self.warm_up:
            self.begin(trainer)
        elif self.steps == self.warm_up + 2:  # two steps tell how many fill the time
            wait_for(self.record.device)
            one = (time.perf_counter() - self.start) / 2
            self.last = self.steps + (2 if self.record.tiny else max(5, min(400, round(self.seconds / one))))
            self.begin(trainer)
        elif self.steps == self.last:
            wait_for(self.record.device)
            self.figures |= self.throughput.figures(trainer, pl_module)
            trainer.should_stop = True

    def begin(self, trainer: L.Trainer) -> None:
        wait_for(self.record.device)
        self.figures["warm_up_s"] = self.figures.get("warm_up_s", time.perf_counter() - self.start)
        if self.record.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.throughput.waited = self.throughput.data_wait(trainer)
        self.throughput.reset()
        self.start = time.perf_counter()


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def fit(record: Record, recipe: Recipe, network: nn.Module, *callbacks: L.Callback) -> None:
    """Train through scfm's own loader, module and Trainer until a callback stops it."""
    objectives = build_objectives(recipe.objectives, n_bins=recipe.data.n_bins)
    module = FoundationModule(network, objectives, recipe.optimizer, recipe.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = build_trainer(recipe, callbacks=list(callbacks), logger=False, enable_checkpointing=False)
        trainer.fit(module, data_of(record, recipe))


def end_to_end(record: Record) -> None:
    """The training step with everything around it: cells/s and MFU, compiled and not, one pass and two."""
    small, large = (240, 480) if record.tiny else (65_536, 131_072)
    recipe = published(record, small, 2)
    data = data_of(record, recipe)
    record.row("store and loader, first use", lambda: {"cells": first_batch(data)[0].total_cells})
    whole = published(record, large, 2)  # the recipe's own global batch: several packs to a step of the optimizer
    whole.data.cells_per_batch = 40 if record.tiny else 512
    for compiled in (True, False):
        network = network_of(record, recipe, compiled)
        runs = {
            f"{passes} pass{'es' * (passes > 1)}, packs of {size:,}": published(record, size, passes)
            for passes in (2, 1)
            for size in (large, small)
        }
        if compiled:
            runs[f"2 passes, {whole.data.cells_per_batch} cells a step"] = whole
        for item, chosen in runs.items():
            named = f"{'compiled' if compiled else 'eager'}, {item}"
            record.row(named, partial(throughput_of, record, chosen, network), needs=12)
        del network
        free()


def first_batch(data: CellDataModule) -> list[PackedBatch]:
    """Return the packs of a first global batch; numba compiles the loader meanwhile."""
    return data.pack_loader(data.train_rows, shuffle=True, rank=0, world_size=1).prepare(0, 0)


def throughput_of(record: Record, recipe: Recipe, network: nn.Module) -> Figures:
    """Return the figures of a few seconds of training."""
    throughput = Throughput()
    throughput.ceiling = record.ceiling
    watch = Stopwatch(throughput, record, seconds=5)
    fit(record, recipe, network, throughput, watch)
    rate = watch.figures["tflops"] * 1e12
    return watch.figures | {
        "of_790": rate / MEASURED,
        "of_989": rate / DATASHEET,
        "goal_met": rate >= GOAL * MEASURED,
        "steps": watch.last - watch.warm_up - 2,
    }


def beside_dense(record: Record) -> None:
    """Forward and backward of two passes beside the dense-mask peer in its best case: equal cells, no padding."""
    shape = Shape(16, 1, 2, 24, 4) if record.tiny else Shape(512, 12, 8, 1200, 54)
    # peers from the fastest to the original's own arrangement; compiling them takes long, so that comes last
    peers = [(peer, compiled) for compiled in (False, True) for peer in reversed(PEERS)]
    sides = [("scfm", True), ("scfm", False), *(peers[: len(PEERS) + 1] if record.tiny else peers)]
    seconds: dict[str, float] = {}
    for model, compiled in sides:
        item = f"{model}, {'compiled' if compiled else 'eager'}"
        row = record.row(item, partial(peer_step, record, shape, model, compiled), needs=25 if compiled else 5)
        free()
        if row:
            seconds[item] = row["ms"]
    ours = [ms for item, ms in seconds.items() if item.startswith("scfm")]
    theirs = {item: ms for item, ms in seconds.items() if not item.startswith("scfm")}
    if ours and theirs:
        times = {item: ms / min(ours) for item, ms in theirs.items()}
        record.keep({"item": "times as fast as", **times, "goal_met": min(times.values()) >= 1.5})


def peer_step(record: Record, shape: Shape, model: str, compiled: bool) -> Figures:
    """Return the time of a step without the optimizer, the same on both sides."""
    config = ModelConfig(
        width=shape.width, heads=shape.heads, layers=shape.layers, hidden=shape.width, dropout=0.2,
        unknown_output_projection=False,
    )  # fmt: skip
    build: Callable[..., Any] = scfm_loss if model == "scfm" else peer_loss
    torch.manual_seed(0)
    device = record.device.type
    network, loss = build(Kind(model, "bf16", 0.2, "default"), config, made_up_batch(shape), device)
    if compiled and model == "scfm":
        compile_blocks(network, record)
    elif compiled:  # for its one shape, which suits it best
        for block in network.blocks:
            block.compile(backend="inductor" if device == "cuda" else "aot_eager")

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            total = loss()
        total.backward()
        network.zero_grad(set_to_none=True)

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(step, record.device, record.tiny)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    return {"ms": seconds * 1e3, "cells_per_second": shape.cells / seconds, "peak_memory_gb": peak}


class NoWaiting(L.Callback):
    """Makes anything in a step that waits for the GPU an error, once a warm-up is over."""

    def __init__(self, cuda: bool, warm_up: int = 2, watched: int = 3) -> None:
        self.cuda, self.warm_up, self.watched, self.steps = cuda, warm_up, watched, 0

    def on_train_batch_start(self, *_: Any) -> None:
        if self.cuda and self.steps >= self.warm_up:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.cuda:
            torch.cuda.set_sync_debug_mode("default")
        self.steps += 1
        trainer.should_stop = self.steps >= self.warm_up + self.watched


def no_waiting(record: Record) -> None:
    """Training steps in which the host never waits for the GPU: all objectives of pretraining, and ECS."""
    recipe = published(record, 240 if record.tiny else 65_536, 2)
    for backend in ("auto", "flex") if record.device.type == "cuda" else ("auto",):
        for names in (PASSES[2], (*PASSES[2], "ecs")):
            chosen = replace(
                recipe,
                model=replace(recipe.model, backend=backend),
                objectives=[ObjectiveConfig(name) for name in names],
            )

            def watched(chosen: Recipe = chosen) -> Figures:
                callback = NoWaiting(record.device.type == "cuda")
                try:
                    fit(record, chosen, network_of(record, chosen, compiled=False), callback)
                finally:
                    if callback.cuda:
                        torch.cuda.set_sync_debug_mode("default")
                return {"steps": callback.watched}

            record.row(f"{backend}: {', '.join(names)}", watched, needs=5)
            free()


def largest_pack(record: Record) -> None:
    """The largest pack that a step of two passes can take, kept or recomputed: doubled until memory is full, halved."""
    smallest, most = (240, 480) if record.tiny else (131_072, 2_400_000)
    for recompute in (False, True):
        network: Any = network_of(record, published(record, smallest, 2), compiled=True)
        network.backbone.recompute = recompute
        fits, fails, size = 0, None, smallest
        while size <= most and record.left() > (0 if record.tiny else 5):
            row = record.row(
                f"{'recomputed' if recompute else 'kept'}, {size:,} tokens",
                partial(one_step, record, network, size),
            )
            free()
            if row:
                fits, size = size, size * 2 if fails is None else (size + fails) // 2
            else:
                fails, size = size, (fits + size) // 2
            if fails is not None and fails - fits <= max(fails // 16, smallest // 4):
                break
        record.keep({"item": f"largest, {'recomputed' if recompute else 'kept'}", "fits": fits, "fails": fails})
        del network
        free()


def one_step(record: Record, network: nn.Module, tokens: int) -> Figures:
    """Take a step of two passes and a fused AdamW on one pack, twice; return the time of the second."""
    recipe = published(record, tokens, 2)
    data = data_of(record, recipe)
    (pack,) = first_batch(data)
    flops = training_flops(network, build_objectives(recipe.objectives, n_bins=BINS), work_of(pack, recipe), 0)
    pack = pack.to(record.device)
    objectives = build_objectives(recipe.objectives, n_bins=recipe.data.n_bins)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    if record.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        with torch.autocast(record.device.type, torch.bfloat16):
            output = network(pack)
            output.predictions["cell_prompt"] = network(pack, cell_prompt=output.cell.detach()).predictions["gep"]
            loss = torch.stack([objective.loss(pack, output)[0] for objective in objectives]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    wait_for(record.device)
    start = time.perf_counter()
    step()
    wait_for(record.device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 1e9 if record.device.type == "cuda" else None
    return {"ms": seconds * 1e3, "tflops": flops / seconds / 1e12, "peak_memory_gb": peak}


def work_of(pack: PackedBatch, recipe: Recipe) -> Work:
    return Work.of(pack, recipe.model.attention)


def free() -> None:
    """Hand back the memory of a GPU that is no longer used."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
