"""Each process of a run on CPUs has cores of its own."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from runs import tiny_recipe
from torch import nn

from scfm.training.cores import pin, share_of
from scfm.training.launch import build_trainer

needs_pinning = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin threads")


def test_shares_are_disjoint_equal_and_neighbours() -> None:
    shares = [share_of({2, 3, 5, 7, 11, 13, 17}, rank, 3) for rank in range(3)]
    assert shares == [{2, 3}, {5, 7}, {11, 13}]
    assert share_of({0}, 1, 2) == set()


@needs_pinning
def test_threads_that_run_already_are_pinned_too() -> None:
    before, stop, ready = os.sched_getaffinity(0), threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (ready.set(), stop.wait()))
    thread.start()
    ready.wait()
    try:
        pin({min(before)})
        assert thread.native_id is not None
        assert os.sched_getaffinity(thread.native_id) == os.sched_getaffinity(0) == {min(before)}
    finally:
        pin(before)
        stop.set()
        thread.join()
    assert os.sched_getaffinity(0) == before


class Model(L.LightningModule):
    """One weight; writes down the cores that each rank has as it trains."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.weight = folder, nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        (self.folder / f"{self.global_rank}.json").write_text(json.dumps(sorted(os.sched_getaffinity(0))))
        return self.weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@needs_pinning
@pytest.mark.distributed
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two cores are needed")
def test_two_processes_have_different_cores_and_one_has_all(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    for processes in (2, 1):
        devices = {"devices": processes, "strategy": "ddp_fork" if processes > 1 else "auto", "max_steps": 1}
        recipe = tiny_recipe(tmp_path, tmp_path / "run", trainer=devices)
        trainer = build_trainer(recipe, logger=False, enable_checkpointing=False)
        trainer.fit(Model(tmp_path), torch.utils.data.DataLoader([0]))
        cores = [set(json.loads((tmp_path / f"{rank}.json").read_text())) for rank in range(processes)]
        assert len(cores[0]) == len(before) // processes
        assert len(set.union(*cores)) == processes * len(cores[0])
        assert os.sched_getaffinity(0) == before


class Product(Model):
    """Multiplies matrices so large that torch would share them out to threads."""

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        (self.folder / f"{self.global_rank}.json").write_text(json.dumps(torch.get_num_threads()))
        return self.weight * (torch.ones(700, 700) @ torch.ones(700, 700)).sum()


@needs_pinning
@pytest.mark.distributed
@pytest.mark.timeout(60)
@pytest.mark.skipif(len(os.sched_getaffinity(0)) != 2, reason="on two cores each of two processes has one thread")
def test_forked_processes_compute_where_their_parent_had_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(700, 700) @ torch.ones(700, 700)  # starts the threads, which a forked process does not inherit
        recipe = tiny_recipe(tmp_path, tmp_path / "run", trainer={"devices": 2, "strategy": "ddp_fork", "max_steps": 1})
        trainer = build_trainer(recipe, logger=False, enable_checkpointing=False)
        trainer.fit(Product(tmp_path), torch.utils.data.DataLoader([0]))
    finally:
        torch.set_num_threads(before)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [1, 1]
