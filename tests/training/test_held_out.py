"""Groups that were held out when the shards were built are the validation set, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
from cells import write_cells
from runs import tiny_recipe

from scfm.data.prepare import prepare
from scfm.data.shards import open_shards, read_manifest
from scfm.errors import ScfmError
from scfm.tasks.annotation import split_rows
from scfm.training import run as run_module
from scfm.training.run import hold_out, pretrain


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_cells(tmp_path / "cells.h5ad", n=120)
    out = tmp_path / "shards"
    prepare([tmp_path / "cells.h5ad"], out, obs=["cell_type"], hold_out_by="batch", hold_out=["batch1"])
    return out


def test_validation_has_the_held_out_groups_and_training_none_of_them(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[run_module.Job] = []
    fit = run_module.fit
    monkeypatch.setattr(run_module, "fit", lambda job, run: jobs.append(job) or fit(job, run))
    recipe = tiny_recipe(shards, tmp_path / "run", data={"valid_fraction": 0.3}, trainer={"max_steps": 2})
    pretrain(recipe)
    held_out, batch = read_manifest(shards)["held_out"], open_shards(shards).obs["batch"]
    assert held_out == {"by": "batch", "groups": ["batch1"], "cells": 60}
    assert {batch.categories[code] for code in batch.codes[list(jobs[0].valid_rows)]} == {"batch1"}
    assert {batch.categories[code] for code in batch.codes[list(jobs[0].train_rows)]} == {"batch0"}
    log = (tmp_path / "run/log.txt").read_text()
    assert "60 training and 60 validation cells" in log
    assert "60 cells of 1 groups of batch that were held out when the shards were built" in log
    assert "data.valid_fraction does not apply" in log


@pytest.mark.parametrize("read", ["map", "read"])
def test_damaged_shards_on_either_side_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str) -> None:
    write_cells(tmp_path / "cells.h5ad", n=120)
    shards, jobs = tmp_path / "shards", []
    prepare([tmp_path / "cells.h5ad"], shards, hold_out_by="batch", hold_out=["batch1"], cells_per_shard=20)
    for number in (1, 3):  # one of three to train on, the first of three that are held out
        damage(shards, number)
    fit = run_module.fit
    monkeypatch.setattr(run_module, "fit", lambda job, run: jobs.append(job) or fit(job, run))
    data = {"skip_damaged": True, "read": read}
    pretrain(tiny_recipe(shards, tmp_path / "run", data=data, trainer={"max_steps": 2}))
    assert list(jobs[0].train_rows) == [*range(20), *range(40, 60)]
    assert list(jobs[0].valid_rows) == list(range(80, 120))
    log = (tmp_path / "run/log.txt").read_text()
    assert "40 training and 40 validation cells" in log
    assert log.count("20 cells are left out") == 2
    assert "validation: 40 cells of 1 groups of batch" in log


@pytest.mark.parametrize(
    ("lost", "missing"), [([0, 1, 2], "train on"), ([3, 4, 5], r"validate on \(held out when built\)")]
)
def test_damage_that_leaves_one_side_empty_is_refused(tmp_path: Path, lost: list[int], missing: str) -> None:
    write_cells(tmp_path / "cells.h5ad", n=120)
    shards = tmp_path / "shards"
    prepare([tmp_path / "cells.h5ad"], shards, hold_out_by="batch", hold_out=["batch1"], cells_per_shard=20)
    for number in lost:
        damage(shards, number)
    complaint = rf"data\.skip_damaged: all cells to {missing} are in damaged shards \(.*0000{lost[0]}\.arrow"
    with pytest.raises(ScfmError, match=complaint):
        pretrain(tiny_recipe(shards, tmp_path / "run", data={"skip_damaged": True}))


def damage(shards: Path, number: int) -> None:
    path = shards / f"shards/{number:05d}.arrow"
    path.write_bytes(path.read_bytes()[:-8])


def test_the_last_rows_are_the_held_out_ones() -> None:
    assert hold_out(100, 0.5, seed=0, shuffled=False, held_out=7) == (range(93), range(93, 100))


def test_fine_tuning_validates_on_the_held_out_groups_too(shards: Path, tmp_path: Path) -> None:
    import numpy as np

    labels, recipe = np.arange(12) % 3, tiny_recipe(shards, tmp_path / "run")
    train, valid = split_rows(np.arange(12), labels, recipe, first_held_out=8)
    assert (train.tolist(), valid.tolist()) == (list(range(8)), [8, 9, 10, 11])
    labels[8] = 3
    with pytest.raises(ScfmError, match="1 labels have only cells that were held out"):
        split_rows(np.arange(12), labels, recipe, first_held_out=8)
