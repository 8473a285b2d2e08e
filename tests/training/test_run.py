"""Which cells train and which are held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import tiny_recipe, write_shards

from scfm.checkpoints.native import read_weights
from scfm.errors import ScfmError
from scfm.recipe_check import check
from scfm.training.run import hold_out, pretrain


def test_shuffled_shards_are_split_by_two_ranges() -> None:
    assert hold_out(100, 0.1, seed=0, shuffled=True) == (range(90), range(90, 100))


def test_cells_kept_in_order_are_drawn() -> None:
    """The last rows of unshuffled shards are all of the last source."""
    train, valid = hold_out(1000, 0.1, seed=0, shuffled=False)
    assert (len(train), len(valid)) == (900, 100)
    assert sorted([*train, *valid]) == list(range(1000))
    assert valid.min() < 100
    np.testing.assert_array_equal(valid, hold_out(1000, 0.1, seed=0, shuffled=False)[1])


def test_any_way_of_reading_trains_the_same_model(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    weights = []
    for i, data in enumerate(({"read": "map"}, {"read": "read"}, {"shards": f"file://{shards}"})):
        model = pretrain(tiny_recipe(shards, tmp_path / str(i), data={**data, "cache": str(tmp_path / "cache")}))
        weights.append(read_weights(model))
        log = (tmp_path / str(i) / "log.txt").read_text()
        assert ("reads of whole runs" if data.get("read") == "read" else "memory map") in log
    assert f"from file://{shards}" in log
    for others in weights[1:]:
        assert all(tensor.equal(others[name]) for name, tensor in weights[0].items())


def test_a_damaged_shard_stops_training_or_is_left_out_as_the_recipe_says(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", cells_per_shard=60)
    path = shards / "shards/00001.arrow"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ScfmError, match=r"00001\.arrow: .* the shard is cut off"):
        pretrain(tiny_recipe(shards, tmp_path / "stopped"))
    pretrain(tiny_recipe(shards, tmp_path / "went-on", data={"skip_damaged": True}))
    log = (tmp_path / "went-on/log.txt").read_text()
    assert "60 cells are left out" in log
    assert "00001.arrow" in log
    assert "54 training and 6" in log


def test_a_run_samples_by_group_and_says_so(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    pretrain(tiny_recipe(shards, tmp_path / "run", data={"sample_by": "batch", "sample_weights": {"batch1": 3.0}}))
    log = (tmp_path / "run/log.txt").read_text()
    assert "cells are sampled by batch, 2 groups: batch0 is 50.0% of the cells and 25.0% of what is read" in log


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"sample_by": "batch", "sample_power": -1.0}, r"data\.sample_power: -1 must be at least 0"),
        ({"sample_by": "batch", "sample_repeats": 0.5}, r"data\.sample_repeats: 0\.5 must be at least 1"),
        ({"sample_by": "batch", "sample_weights": {"batch1": 0.0}}, r"data\.sample_weights: .* must be above 0"),
        ({"sample_weights": {"batch1": 2.0}}, r"data\.sample_weights: .* data\.sample_by does not say"),
    ],
)
def test_sampling_that_cannot_work_names_the_key(tmp_path: Path, data: dict[str, Any], key: str) -> None:
    with pytest.raises(ScfmError, match=key):
        check(tiny_recipe(tmp_path, tmp_path / "run", data=data))
