"""What a run says of its speed: rates of training alone, and who keeps the others waiting."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from runs import tiny_recipe, write_shards

from scfm.metrics_file import read_metrics
from scfm.training.callbacks import apart
from scfm.training.checkpointing import NewestCheckpoints
from scfm.training.module import FoundationModule
from scfm.training.run import pretrain
from scfm.training.stragglers import PATIENCE, Slowest, Stragglers

PAUSE = 0.4


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("cells") / "shards")


def speeds(run: Path) -> dict[tuple[int, str], float]:
    rows = read_metrics(run / "metrics.csv")
    return {(step, name.removeprefix("speed/")): value for step, name, value in rows if name.startswith("speed/")}


def slowed(monkeypatch: pytest.MonkeyPatch, kind: type, method: str) -> None:
    """Let a method take PAUSE seconds more."""
    original = getattr(kind, method)

    def slow(self: Any, *args: Any) -> Any:
        time.sleep(PAUSE)
        return original(self, *args)

    monkeypatch.setattr(kind, method, slow)


def test_validation_and_saving_are_no_part_of_the_rates(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(monkeypatch, FoundationModule, "validation_step")
    slowed(monkeypatch, NewestCheckpoints, "on_train_batch_start")  # saves at step 2, and does nothing at the others
    trainer = {"max_steps": 4, "log_every_n_steps": 4, "val_check_interval": 2}
    began = time.perf_counter()
    pretrain(tiny_recipe(shards, tmp_path / "run", trainer=trainer, checkpoint={"every_steps": 2}))
    whole = time.perf_counter() - began
    found = speeds(tmp_path / "run")
    assert found[4, "validation_seconds"] > PAUSE
    assert found[4, "checkpoint_seconds"] > PAUSE
    steps = 4 * found[4, "step_seconds"]
    assert steps + found[4, "validation_seconds"] + found[4, "checkpoint_seconds"] < whole
    assert found[4, "cells_per_second"] == pytest.approx(4 * 16 / steps)
    line = next(line for line in (tmp_path / "run/log.txt").read_text().splitlines() if line.startswith("step 4/4"))
    assert re.search(r"  validation [\d.]+ s  saving [\d.]+ s  eta ", line)


def test_nothing_beside_the_steps_is_not_said() -> None:
    assert apart({"step_seconds": 1.0}) == ""


def test_a_slow_rank_is_named(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ranks end each step together, and yet the one that the other waits for is found."""
    original = FoundationModule.pack_losses

    def pack_losses(self: Any, *args: Any) -> Any:
        if dist.get_rank() == 1 and self.training:
            time.sleep(PAUSE / 4)
        return original(self, *args)

    monkeypatch.setattr(FoundationModule, "pack_losses", pack_losses)
    two = {"devices": 2, "strategy": "ddp_fork", "log_every_n_steps": 1}
    pretrain(tiny_recipe(shards, tmp_path / "run", trainer=two, data={"tokens_per_pack": 5000}))
    found = speeds(tmp_path / "run")
    reports = range(2, 7)  # in the first step either may be slow
    assert {found[step, "slowest_rank"] for step in reports} == {1}
    assert all(found[step, "step_seconds_slowest"] > PAUSE / 4 for step in reports)
    assert all(found[step, "slowest_ratio"] > 1.3 for step in reports)
    assert all(found[step, "data_wait_slowest"] < found[step, "step_seconds_slowest"] for step in reports)
    named = [line for line in (tmp_path / "run/log.txt").read_text().splitlines() if "slow rank: 1 on " in line]
    assert len(named) == 1


def test_one_process_gathers_nothing(shards: Path, tmp_path: Path) -> None:
    pretrain(tiny_recipe(shards, tmp_path / "run", trainer={"max_steps": 2}))
    assert not [name for _, name in speeds(tmp_path / "run") if "slowest" in name]


class FakeEvent:
    """A moment on a made-up device, whose clock runs a second at each record."""

    clock = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.clock += 1
        self.at = FakeEvent.clock

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1000.0 * (end.at - self.at)  # torch counts milliseconds


def test_on_a_gpu_the_device_tells_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)

    def all_gather(everyone: list[torch.Tensor], mine: torch.Tensor) -> None:
        for rank, room in enumerate(everyone):
            room.copy_(mine * (rank + 1))

    monkeypatch.setattr(dist, "all_gather", all_gather)
    trainer: Any = SimpleNamespace(world_size=3, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    watch = Stragglers()
    watch.on_gpu = True
    for n_packs in (1, 3):
        watch.on_train_batch_start(trainer, None, None, 0)  # type: ignore[arg-type]
        for _ in range(n_packs):
            watch.on_before_backward(trainer, None, None)  # type: ignore[arg-type]
    found = watch.slowest(trainer, waited=4.0)
    assert found is not None
    own = (1 + 3 + 4) / 2  # until the last backward of each of two steps, and the wait for data
    assert (found.rank, found.seconds, found.waiting, found.ratio) == (2, 3 * own, 3 * 2.0, 2.0)
    assert watch.slowest(trainer, waited=1.0) is None  # nothing since


def test_the_slowest_is_judged_against_the_others() -> None:
    found = Slowest.of([(1.0, 0.0), (1.1, 0.1), (3.0, 2.0), (0.9, 0.0)])
    assert (found.rank, found.seconds, found.waiting) == (2, 3.0, 2.0)
    assert found.ratio == pytest.approx(3.0)
    assert Slowest.of([(2.0, 0.0), (1.0, 0.0)]).ratio == 2.0


def test_a_rank_is_named_once_and_only_if_it_stays_slow() -> None:
    watch = Stragglers()
    watch.hosts = ["node1", "node2"]
    slow, even, other = Slowest(1, 2.0, 1.5, 2.0), Slowest(1, 1.0, 0.0, 1.05), Slowest(0, 2.0, 0.0, 2.0)
    said = [watch.warning(found) for found in [slow, slow, even, slow, other, *[slow] * (PATIENCE + 3)]]
    assert [bool(line) for line in said] == [False] * (5 + PATIENCE - 1) + [True] + [False] * 3
    line = next(line for line in said if line)
    assert line.startswith("slow rank: 1 on node2 takes 2 s of its own per step, 2.0 times the median of the others")
    assert "1.5 s of it waiting for data" in line
