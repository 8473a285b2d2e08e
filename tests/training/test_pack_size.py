"""`data.tokens_per_pack: auto` fits the memory, the same on all ranks, and changes nothing else of a run."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import tiny_recipe, write_shards
from scbert_runs import scbert_recipe
from worlds import in_world, largest_difference, pretraining, trained

import scfm.training.pack_size as pack_size
from scfm.errors import ScfmError
from scfm.memory import USABLE, allowed_memory
from scfm.plan import plan_of
from scfm.recipe import Recipe
from scfm.training.launch import build_trainer
from scfm.training.module import FoundationModule
from scfm.training.pack_size import CudaMemory, HostMemory, largest
from scfm.training.run import modules_of, pretrain

LONGEST = 31  # tokens of a cell of the tiny recipe
BASE, EACH = 3e6, 1e4  # bytes of the made-up device: at any pack, and for each of its tokens


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("cells") / "shards")


class Device:
    """A device of made-up memory on which `try_step` takes so much for each token."""

    def __init__(self, free: Callable[[], float], breaks_at: float = float("inf")) -> None:
        self.free, self.breaks_at, self.tokens = free, breaks_at, 0

    def start(self) -> None:
        self.tokens = 0

    def taken(self) -> float:
        return BASE + EACH * self.tokens

    def put_in(self, patch: pytest.MonkeyPatch) -> Device:
        real = FoundationModule.try_step

        def watched(module: FoundationModule, pack: Any) -> None:
            self.tokens = pack.n_tokens
            if pack.n_tokens > self.breaks_at:
                raise torch.OutOfMemoryError
            real(module, pack)

        patch.setattr(FoundationModule, "try_step", watched)
        patch.setattr(pack_size, "reading_of", lambda device, processes: self)
        patch.setattr(pack_size, "states_to_come", lambda trainer: 0.0)
        return self


def found(recipe: Recipe, resume: Path | None = None) -> int:
    """Train a recipe; return the tokens of a pack that it took."""
    module, data = modules_of(pretraining(recipe))
    build_trainer(recipe, logger=False, enable_checkpointing=False).fit(module, data, ckpt_path=resume)
    return data.tokens_per_pack


def auto(shards: Path, out: Path = Path("unused"), make: Any = tiny_recipe, **data: Any) -> Recipe:
    sections = {"data": {"tokens_per_pack": "auto", "cells_per_batch": 96, **data}, "trainer": {"max_steps": 1}}
    return make(shards, out, **sections)


@pytest.mark.parametrize("budget", [1e5, 5e6, 1e7, 1e8])
@pytest.mark.parametrize("start", [100, 5_000, 1_000_000])
def test_what_is_found_fits_and_wastes_little(budget: float, start: float) -> None:
    """Even where a trial takes a little more or less than its line."""
    tried = []
    draw = np.random.default_rng(0)

    def trial(wished: float) -> tuple[int, float]:
        tried.append(wished)
        return int(wished), (BASE + EACH * int(wished)) * draw.uniform(0.99, 1.01)

    tokens, true = largest(trial, start, 1e9, budget), (budget - BASE) / EACH
    assert tokens < 1.03 * max(true, 0) or tokens == 0
    assert tokens > 0.85 * true or true < start / 500
    assert len(tried) <= pack_size.TRIALS


def test_a_run_takes_what_its_device_holds(shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Device(lambda: BASE + EACH * 1000).put_in(monkeypatch)
    recipe = auto(shards, tmp_path / "run")
    recipe.checkpoint.every_steps, recipe.trainer.max_steps = 1, 2
    pretrain(recipe)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "data.tokens_per_pack: auto, 960 (measured by" in log
    # resumed on the same device with less free memory, packs stay what they were
    Device(lambda: BASE + EACH * 500).put_in(monkeypatch)
    recipe.trainer.max_steps = 3
    pretrain(recipe, resume="auto")
    assert "data.tokens_per_pack: auto, 960 (as when the run began)" in (tmp_path / "run" / "log.txt").read_text()
    # on another device they are measured again
    monkeypatch.setattr(pack_size, "place_of", lambda trainer: "a smaller one")
    *_, checkpoint = sorted((tmp_path / "run" / "checkpoints").glob("step=*.ckpt"))
    recipe.trainer.max_steps = 4
    assert found(recipe, checkpoint) == 448


def test_trials_leave_nothing_behind(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights, running statistics and draws as with the number that was found."""
    Device(lambda: BASE + EACH * 1000).put_in(monkeypatch)
    recipe = auto(shards)
    recipe.model.input_norm, recipe.trainer.max_steps = "batch", 2
    given = replace(recipe, data=replace(recipe.data, tokens_per_pack=960))
    assert largest_difference(trained(recipe)[0], trained(given)[0]) == 0


def test_running_out_of_memory_is_a_measurement(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device says it has room for ever more, and breaks at 600 tokens."""
    Device(lambda: 1e12, breaks_at=600).put_in(monkeypatch)
    assert 500 < found(auto(shards)) <= 600


def test_a_device_too_small_for_one_cell_is_told(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Device(lambda: BASE).put_in(monkeypatch)
    with pytest.raises(ScfmError, match=r"auto found room for 0 tokens .* a cell may have 31"):
        found(auto(shards))


@pytest.mark.distributed
def test_all_ranks_take_what_the_fullest_holds(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Device(lambda: BASE + EACH * (1000 if os.environ["RANK"] == "0" else 600)).put_in(monkeypatch)
    recipe = auto(shards)
    recipe.trainer.devices = "auto"
    for strategy in ("ddp", "fsdp"):
        recipe.trainer.strategy = strategy
        assert in_world(2, lambda: found(recipe)) == [576, 576]


@pytest.mark.parametrize("make", [tiny_recipe, scbert_recipe])
def test_a_cpu_is_measured(shards: Path, make: Any) -> None:
    """The tiny model takes little: a pack holds the whole batch, whatever its cells."""
    longest = LONGEST if make is tiny_recipe else 61
    assert found(auto(shards, make=make)) == 96 * longest


def test_host_memory_sees_what_a_step_takes() -> None:
    memory = HostMemory(processes=2)
    memory.start()
    n_bytes = 2**27
    with mmap.mmap(-1, n_bytes) as block:  # not of the heap, which may have room left by other tests
        for page in range(0, n_bytes, mmap.PAGESIZE):
            block[page] = 1
        taken = memory.taken()
    assert 0.9 * n_bytes < taken < 1.5 * n_bytes
    assert 0 < memory.free() < HostMemory(processes=1).free()


def test_gpu_memory_is_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 GB free in the driver's eyes and 10 more in torch's own pool; a step rises to 30 from 12."""
    called = []
    answers = {
        "mem_get_info": (80e9, 140e9),
        "memory_reserved": 22e9,
        "memory_allocated": 12e9,
        "max_memory_allocated": 30e9,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name, answer=answer: (called.append(name), answer)[1])
    memory = CudaMemory(torch.device("cuda:0"))
    assert memory.free() == USABLE * 90e9
    memory.start()
    assert memory.taken() == 18e9
    assert called.index("reset_peak_memory_stats") < called.index("max_memory_allocated")
    assert isinstance(pack_size.reading_of(torch.device("cuda:0"), 1), CudaMemory)
    with pytest.raises(ScfmError, match="auto cannot measure the memory of mps; give a number"):
        pack_size.reading_of(torch.device("mps"), 1)


def test_a_job_may_have_less_than_its_machine(tmp_path: Path) -> None:
    """The step of a SLURM job has no limit of its own, the job above it has."""
    job = tmp_path / "slurm" / "job_7"
    (job / "step_0").mkdir(parents=True)
    own = tmp_path / "cgroup"
    own.write_text("9:name=systemd:/\n0::/slurm/job_7/step_0\n")
    for folder, most in ((job / "step_0", "max"), (job, "1000000")):
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.stat").write_text("anon 300000\nfile 900000\n")
    assert allowed_memory(tmp_path, own) == [700_000.0]
    assert allowed_memory(tmp_path, tmp_path / "absent") == []


def test_a_plan_says_what_it_expects(shards: Path) -> None:
    recipe = auto(shards)
    plan = plan_of(recipe, "h100")
    assert any("data.tokens_per_pack: auto, 2,976 by the memory model" in line for line in plan.assumptions)
    assert plan.packs.rounds == 1
    assert plan_of(recipe, "h100", gpus=8).packs.tokens <= 12 * LONGEST
    many = replace(recipe, data=replace(recipe.data, cells_per_batch=10**6, valid_fraction=0.0))
    many.trainer.max_steps = 1
    full = plan_of(many, "rtx4090", cells=10**6)
    assert full.packs.tokens <= full.largest_pack
    assert full.memory["total"] <= USABLE * full.memory_available
