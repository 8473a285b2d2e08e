"""From the recipe's trainer section to a `lightning.Trainer`, and to blocks that compile or recompute."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import nn

from scfm.errors import ScfmError
from scfm.recipe import Recipe, TrainerConfig
from scfm.training.cores import OwnCores
from scfm.training.pack_size import PackSize
from scfm.training.processes import EndsWithLauncher, fit_to_launcher
from scfm.training.sharding import ShardedStrategy, refuse_what_cannot_be_cut

# Every rank runs the same objectives on every step, so all parameters get a gradient, and no buffer ever differs.
# Of scGPT's 205 MB of gradients 124 are the gene embedding: one tensor, the last to be ready, alone in its bucket. The
# blocks have 6.3 MB each: four to a bucket travel (0.1 ms by NVLink, 1 ms at 400 Gb/s) while the next four take 7 ms of
# backward; larger buckets would wait for more of it, smaller ones send as much in more pieces.
# No static_graph: with several packs to a step it sums wrong (docs/concepts/parallelism.md), with one it wins nothing.
DDP = {
    "gradient_as_bucket_view": True,
    "broadcast_buffers": False,
    "find_unused_parameters": False,
    "bucket_cap_mb": 25,
}
OURS = ("compile", "gradient_checkpointing")  # keys of the trainer section that Lightning does not know
FSDP_START = {"fsdp": "popen", "fsdp_fork": "fork"}
DDP_START = {"ddp": "popen", "ddp_fork": "fork", "ddp_spawn": "spawn", "ddp_notebook": "fork"}


def strategy_of(name: str) -> str | Strategy:
    """Return DDP or FSDP with the settings that fit these models; other strategies by Lightning's own names."""
    if name in DDP_START:
        return DDPStrategy(start_method=DDP_START[name], **DDP)  # type: ignore[arg-type]
    if name in FSDP_START:
        return ShardedStrategy(FSDP_START[name])
    return name


def build_trainer(recipe: Recipe, **objects: Any) -> L.Trainer:
    """Return the Trainer of a recipe; `objects` are the callbacks, loggers and folders that a recipe cannot hold."""
    options = {key: value for key, value in asdict(recipe.trainer).items() if value is not None and key not in OURS}
    if options["max_steps"] == -1 and "max_epochs" not in options and "max_time" not in options:
        raise ScfmError("trainer: says nowhere when to stop; give trainer.max_steps or trainer.max_epochs")
    fit_to_launcher(options)
    devices = torch.cuda.device_count() if options["devices"] == "auto" else options["devices"]
    several = devices not in (0, 1, "1", [0]) or options["num_nodes"] > 1
    strategy = "ddp" if options["strategy"] == "auto" and several else options["strategy"]
    if strategy in FSDP_START:
        refuse_what_cannot_be_cut(recipe)
    options["strategy"] = strategy_of(strategy)
    quieten()
    keep_memory()
    objects["callbacks"] = [PackSize(recipe), *objects.get("callbacks", []), OwnCores(), EndsWithLauncher()]
    # the loader itself serves each rank its own packs
    return L.Trainer(**options, **objects, use_distributed_sampler=False, enable_progress_bar=False)


def set_up_blocks(network: nn.Module, config: TrainerConfig) -> None:
    """Compile the blocks of a network, and let them recompute what the backward needs, as the recipe says.

    Each block by itself compiles in a fraction of the time of the whole, and parameters keep their names. Lengths and
    numbers of cells are symbols, so that no pack compiles them again.
    """
    backbone: Any = getattr(network, "backbone", None)
    if backbone is None:
        return
    backbone.recompute = config.gradient_checkpointing
    if config.compile:
        for block in backbone.blocks:
            block.compile(fullgraph=True, dynamic=True)


def quieten() -> None:
    """Leave out what Lightning says of things that are meant: the run's own first line names device and precision."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for meant in (
        "Using ModelCheckpoint with manual optimization",  # the state after the step is the one to resume from
        ".*LeafSpec.*is deprecated",
        "Checkpoint directory .* exists and is not empty",  # a resumed run
        "The dirpath has changed from",  # a run directory that was moved
        "Starting from v1.9.0, `tensorboardX` has been removed",
        "The number of training batches .* is smaller than the logging interval",  # lines count steps, not epochs
        "Total length of `list` across ranks is zero",  # no cells are held out for validation
        "You're resuming from a checkpoint that ended before the epoch ended",  # resume is exact, see CellDataModule
        "It is recommended to use .*sync_dist=True",  # what is logged is the sum over all ranks already
        "`broadcast_buffers` is deprecated",  # its successor is not known to torch 2.9 to 2.12
        "Grad strides do not match bucket view strides",  # oneDNN's gradients, on CPUs
        "FSDP2-wrapped module .* returned a view tensor",  # nothing writes into what the model returns
    ):
        warnings.filterwarnings("ignore", message=meant)


def keep_memory() -> None:
    """Let glibc keep freed blocks: a step frees and takes the same large ones, and returning them costs page faults."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            trim_threshold, mmap_threshold, largest = -1, -3, 2**30
            libc.mallopt(trim_threshold, largest)
            libc.mallopt(mmap_threshold, largest)


@contextmanager
def own_port() -> Iterator[None]:
    """Let each run of a process choose its port: Lightning leaves the one it chose to all later runs, taken or not."""
    given = "MASTER_PORT" in os.environ
    try:
        yield
    finally:
        if not given:
            os.environ.pop("MASTER_PORT", None)
