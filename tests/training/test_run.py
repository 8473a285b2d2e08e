"""Which cells train and which are held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from runs import tiny_recipe, write_shards

from scfm.checkpoints.native import read_weights
from scfm.errors import ScfmError
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
