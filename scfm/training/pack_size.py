"""`data.tokens_per_pack: auto`: the largest pack that this run's devices hold, found by trial steps before the first.

The memory model of `scfm plan` says where to begin. Trials of growing size are measured; what a pack takes beyond them
is a straight line, for all that grows with a pack grows with its tokens. All ranks try the same cells and take the
answer of the fullest, so that they deal the same packs.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from scfm.data.rows import rows_at
from scfm.errors import ScfmError
from scfm.memory import ADAM_STATES, CPU_SHARE, USABLE, free_memory
from scfm.model.scgpt import ScGPT
from scfm.recipe import Recipe
from scfm.training.callbacks import Progress
from scfm.training.datamodule import CellDataModule
from scfm.training.module import FoundationModule
from scfm.training.sharding import ShardedStrategy, part_of

if TYPE_CHECKING:  # planning reads shards, which synthetic cells do without
    from scfm.workload import Cells

FIRST = 8  # the first trial is this part of what the memory model expects
TRIALS = 8
WORTH = 1.1  # a trial that could win less than a tenth is not made
GB = 1e9
GRAIN = 64  # tokens are rounded down to a multiple, so that machines of a kind find the same


class Reading(Protocol):
    """What a device says of its memory."""

    def free(self) -> float:
        """Return the bytes that this process may take beyond those it has."""

    def start(self) -> None:
        """Begin to watch."""

    def taken(self) -> float:
        """Return the most bytes taken since, beyond those at the start."""


class CudaMemory:
    """Of a GPU: tenths are left to the driver, to other libraries and to fragments between tensors."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def free(self) -> float:
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return USABLE * (torch.cuda.mem_get_info(self.device)[0] + cached)

    def start(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        self.before = torch.cuda.memory_allocated(self.device)

    def taken(self) -> float:
        return float(torch.cuda.max_memory_allocated(self.device) - self.before)


class HostMemory:
    """Of a machine whose processes train on its CPUs: a share, for shards are read through its memory too.

    Args:
        processes: of this run on this machine.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self.before = resident("VmRSS")  # the heap keeps what one trial took for the next

    def free(self) -> float:
        return CPU_SHARE * free_memory() / self.processes

    def start(self) -> None:
        watch = Path("/proc/self/clear_refs")
        if watch.exists():
            watch.write_text("5", encoding="ascii")  # the high-water mark starts again

    def taken(self) -> float:
        return max(resident("VmHWM") - self.before, 0.0)


def resident(what: str) -> float:
    """Return the memory of this process in bytes, VmRSS now or VmHWM at most; the latter where /proc is not known."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    lines = status.read_text(encoding="ascii").splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


def reading_of(device: torch.device, processes: int) -> Reading:
    """Return what measures a device. Raises ScfmError for one that cannot be measured."""
    if device.type == "cuda":
        return CudaMemory(device)
    if device.type == "cpu":
        return HostMemory(processes)
    raise ScfmError(f"data.tokens_per_pack: auto cannot measure the memory of {device.type}; give a number")


class PackSize(L.Callback):
    """Finds `data.tokens_per_pack: auto` before the first step, or takes that of the checkpoint a run goes on from.

    Args:
        recipe: the run.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.found = recipe, False

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_start(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if self.recipe.data.tokens_per_pack != "auto" or self.found or not isinstance(data, CellDataModule):
            return
        assert isinstance(pl_module, FoundationModule)
        self.found, place, how = True, place_of(trainer), "as when the run began"
        if not trainer.strategy.reduce_boolean_decision(data.pack_place == place):  # nodes may have other GPUs
            tokens, how = self.measured(trainer, pl_module, data)
            data.use_packs(tokens, place)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Progress):
                callback.say(trainer, f"data.tokens_per_pack: auto, {data.tokens_per_pack:,} ({how})")

    def measured(self, trainer: L.Trainer, module: FoundationModule, data: CellDataModule) -> tuple[int, str]:
        """Return the tokens of the largest pack that all ranks hold, and how they were found."""
        reading = reading_of(trainer.strategy.root_device, trainer.num_devices)
        share = -(-self.recipe.data.cells_per_batch // trainer.world_size)
        cells, longest = sample(data, self.recipe), data.tokeniser.longest
        budget = least(reading.free() - states_to_come(trainer), trainer)
        trial = Trial(trainer, module, data, reading)

        def of_tokens(wished: float) -> tuple[int, float]:
            return trial(max(1, min(share, int(wished / cells.tokens_per_cell))))

        start = max(self.expected(module, cells, budget) // FIRST, longest)
        tokens = largest(of_tokens, start, share * cells.tokens_per_cell, budget)
        if tokens < longest:
            raise ScfmError(
                f"data.tokens_per_pack: auto found room for {tokens:,.0f} tokens in {budget / GB:,.1f} GB, but a cell "
                f"may have {longest:,}; lower data.max_genes or set trainer.gradient_checkpointing"
            )
        found = min(max(longest, int(tokens) // GRAIN * GRAIN), share * longest)
        return found, f"measured by {trial.made} trial steps; {budget / GB:,.1f} GB are free for it on the fullest rank"

    def expected(self, module: FoundationModule, cells: Cells, budget: float) -> int:
        """Return the pack that the memory model of `scfm plan` expects to fit; 0 where it has none of the model."""
        from scfm.plan import largest_pack, step_memory

        if not isinstance(module.network, ScGPT):
            return 0
        on_gpu = next(module.network.parameters()).is_cuda
        memory = step_memory(self.recipe, module.network, cells, module.objectives, "cuda" if on_gpu else "cpu")
        return largest_pack(memory, budget, 1)


class Trial:
    """Takes a training step's passes over so many cells, twice, and measures the memory; nothing of it stays."""

    def __init__(self, trainer: L.Trainer, module: FoundationModule, data: CellDataModule, reading: Reading) -> None:
        self.trainer, self.module, self.data, self.reading = trainer, module, data, reading
        self.made = 0

    def __call__(self, n_cells: int) -> tuple[int, float]:
        """Return the tokens of the trial, and the most bytes that a rank took: infinite where one ran out of memory."""
        pack = self.data.trial_pack(n_cells).to(self.trainer.strategy.root_device)
        buffers = {name: buffer.clone() for name, buffer in self.module.network.named_buffers()}
        self.made += 1
        self.reading.start()
        try:
            self.module.try_step(pack)
            taken = self.reading.taken()
        except torch.OutOfMemoryError:
            taken = float("inf")
        self.module.zero_grad(set_to_none=True)
        for name, buffer in self.module.network.named_buffers():
            buffer.copy_(buffers[name])
        return pack.n_tokens, -least(-taken, self.trainer)


def largest(trial: Callable[[float], tuple[int, float]], start: float, most: float, budget: float) -> float:
    """Return the tokens that fit into a budget of bytes; 0 where no trial did.

    Args:
        trial: wished tokens -> tokens of a trial near them, and its bytes.
        start: tokens of the first trial.
        most: tokens beyond which no trial is of use.
        budget: bytes.
    """
    fitting: list[tuple[int, float]] = []
    wished, too_large, breaks = min(start, most), float("inf"), False
    for _ in range(TRIALS):
        tokens, taken = trial(wished)
        if taken <= budget:
            fitting.append((tokens, taken))
            wished = min(room(fitting, budget), most)
        else:
            too_large, breaks = min(too_large, tokens), breaks or taken == float("inf")
            wished = tokens * min(0.5, max(0.9 * budget / taken, 0.1))
        if fitting:
            fits = max(fitting)[0]
            between = (fits + too_large) / 2
            wished = between if taken > budget else min(wished, between)
            if wished < WORTH * fits:
                break
    if not fitting:
        return 0.0
    return max(fitting)[0] if breaks else room(fitting, budget)  # what breaks early does not follow the line


def room(fitting: list[tuple[int, float]], budget: float) -> float:
    """Return the tokens that a straight line through the two largest trials gives a budget; one alone counts as all."""
    *before, (tokens, taken) = sorted(fitting)
    per_token = taken / tokens
    if before and tokens > before[-1][0]:
        # what a measurement wins by chance is not spent
        per_token = max((taken - before[-1][1]) / (tokens - before[-1][0]), per_token / 2)
    return tokens + (budget - taken) / max(per_token, 1.0)


def sample(data: CellDataModule, recipe: Recipe) -> Cells:
    """Return the lengths of a sample of the training cells."""
    from scfm.workload import SAMPLED_CELLS, Cells

    step = max(1, len(data.train_rows) // SAMPLED_CELLS)
    rows = np.sort(rows_at(data.train_rows, np.arange(0, len(data.train_rows), step)))
    found = np.full(len(rows), data.store.vocabulary.n_genes)
    if recipe.data.genes == "expressed":
        found = data.store.n_genes(rows)
    lengths = (np.minimum(found, recipe.data.max_genes) + 1).astype(np.int32)
    return Cells(len(data.train_rows), lengths, len(data.store.vocabulary))


def states_to_come(trainer: L.Trainer) -> float:
    """Return the bytes of the optimizer states that the first step will take on this device."""
    total = 0
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            own = [part_of(p) for p in group["params"] if p not in optimizer.state]
            total += sum(ADAM_STATES * p.numel() * p.element_size() for p in own)
    return float(total)


def least(number: float, trainer: L.Trainer) -> float:
    """Return the smallest of a number over all ranks."""
    if trainer.world_size == 1:
        return number
    found: Tensor = torch.tensor(number, dtype=torch.float64, device=trainer.strategy.root_device)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return float(found)


def place_of(trainer: L.Trainer) -> str:
    """Say on what a pack has to fit: the device, and under FSDP also over how many a model is cut."""
    device: Any = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{trainer.world_size} x {name}, fsdp" if isinstance(trainer.strategy, ShardedStrategy) else name
