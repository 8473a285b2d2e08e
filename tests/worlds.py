"""Worlds of several processes for tests: forked in milliseconds, with the environment that torchrun gives."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from scfm.data.shards import open_shards
from scfm.recipe import Recipe
from scfm.training.checkpointing import FinalValidation
from scfm.training.launch import build_trainer
from scfm.training.run import Job, modules_of, pretraining_job

Weights = dict[str, Tensor]


def in_world(size: int, action: Callable[[], Any], seconds: float = 240.0, **environment: str) -> list[Any]:
    """Run a function in each of several forked processes; return what each returned, by rank.

    Fails with the trace of a process that raised, and where one does not end: none is left behind.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        context = multiprocessing.get_context("fork")
        arguments = [(rank, size, port, Path(folder), action, environment) for rank in range(size)]
        processes = [context.Process(target=act, args=each) for each in arguments]
        for process in processes:
            process.start()
        end = time.monotonic() + seconds
        try:
            while any(p.is_alive() for p in processes) and time.monotonic() < end:
                if any(p.exitcode for p in processes):
                    end = min(end, time.monotonic() + 5)  # the others may say more
                time.sleep(0.01)
        finally:
            hung = [rank for rank, p in enumerate(processes) if p.is_alive()]
            for process in processes:
                process.kill()
                process.join()
        said = [path.read_text() for path in sorted(Path(folder).glob("*.txt"))]
        assert not said, "\n".join(said)
        assert not hung, f"ranks {hung} hang"
        assert all(p.exitcode == 0 for p in processes), [p.exitcode for p in processes]
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(size)]


def act(rank: int, size: int, port: str, folder: Path, action: Callable[[], Any], environment: dict[str, str]) -> None:
    """Run a function as one rank of a world."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        **{name: value.format(rank=rank) for name, value in environment.items()},
    }
    torch.set_num_threads(1)
    try:
        torch.save(action(), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.txt").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)


class Losses(L.Callback):
    """Keeps the loss of each step and validation, summed over the ranks; saves a checkpoint before a step."""

    def __init__(self, save_at: int | None = None, path: Path | None = None) -> None:
        self.save_at, self.path = save_at, path
        self.found: dict[str, float] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.save_at:
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        sums = pl_module.sum_over_ranks(pl_module.step_metrics)
        self.found[f"train {trainer.global_step}"] = float(sums["loss"])

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.found[f"valid {trainer.global_step}"] = float(trainer.callback_metrics["valid/loss"])


def trained(
    recipe: Recipe,
    *,
    devices: int = 1,
    strategy: str = "auto",
    job: Callable[[Recipe], Job] | None = None,
    resume: Path | None = None,
    save_at: int | None = None,
    path: Path | None = None,
    watch: Sequence[L.Callback] = (),
) -> tuple[Weights, dict[str, float]]:
    """Train a recipe without a run directory; return the weights (of rank 0) and all losses.

    Args:
        recipe: the run.
        devices: processes of the world that this is called in.
        strategy: ddp or fsdp.
        job: what is trained; pretraining unless given.
        resume: checkpoint to go on from.
        save_at: step before which a checkpoint is written to `path`.
        path: of that checkpoint.
        watch: further callbacks.
    """
    recipe = replace(recipe, trainer=replace(recipe.trainer, devices=devices, strategy=strategy))
    module, data = modules_of((job or pretraining)(recipe))
    losses = Losses(save_at, path)
    trainer = build_trainer(
        recipe, callbacks=[FinalValidation(), losses, *watch], logger=False, enable_checkpointing=False
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    state = module.network.state_dict() if trainer.is_global_zero else {}
    return {name: tensor.detach().clone() for name, tensor in state.items()}, losses.found


def pretraining(recipe: Recipe) -> Job:
    assert recipe.data.shards is not None
    return pretraining_job(recipe, open_shards(Path(recipe.data.shards)))


def largest_difference(a: Weights, b: Weights) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def same_everywhere(tensor: Tensor) -> bool:
    """Say whether all ranks hold the same numbers."""
    everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, tensor)
    return all(torch.equal(everyone[0], other) for other in everyone[1:])
