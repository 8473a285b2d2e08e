"""Splits keep every type on both sides, are a function of the seed, and survive freezing to a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scfm.errors import ScfmError
from scfm.evaluation.splits import Split, load_splits, save_splits, stratified_split


@given(
    counts=st.lists(st.integers(1, 30), min_size=2, max_size=6),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 1000),
)
def test_every_type_with_two_cells_is_on_both_sides(counts: list[int], fraction: float, seed: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    if all(n == 1 for n in counts):
        with pytest.raises(ScfmError, match="both sides"):
            stratified_split(labels, fraction, seed)
        return
    split = stratified_split(labels, fraction, seed)
    np.testing.assert_array_equal(np.sort(np.concatenate([split.train, split.test])), np.arange(len(labels)))
    for k, n in enumerate(counts):
        held_out = int((labels[split.test] == k).sum())
        if n == 1:
            assert held_out == 0
        else:
            assert 1 <= held_out <= n - 1
            assert abs(held_out - fraction * n) <= 1


def test_a_split_is_a_function_of_its_seed() -> None:
    labels = np.repeat(["A", "B"], 50)
    first, again, other = (stratified_split(labels, 0.2, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.test, again.test)
    assert not np.array_equal(first.test, other.test)


def test_the_hash_names_cells_and_not_rows() -> None:
    names = ["c0", "c1", "c2", "c3"]
    split = Split(np.array([0, 1]), np.array([2, 3]), 0, "by hand")
    turned = Split(np.array([2, 3]), np.array([0, 1]), 0, "by hand")
    assert split.hash(names) == turned.hash(names[::-1])
    assert split.hash(names) != turned.hash(names)


def test_a_cell_on_both_sides_or_an_empty_side_is_refused() -> None:
    with pytest.raises(ScfmError, match="1 cells stand on both sides"):
        Split(np.array([0, 1]), np.array([1, 2]), 0, "by hand")
    with pytest.raises(ScfmError, match="0 held out"):
        Split(np.array([0, 1]), np.array([], dtype=np.int64), 0, "by hand")
    with pytest.raises(ScfmError, match="between 0 and 1"):
        stratified_split(np.array(["A", "B"]), 1.0)
    with pytest.raises(ScfmError, match="two classes"):
        stratified_split(np.array(["A", "A"]), 0.5)


def test_frozen_splits_come_back_for_reordered_cells(tmp_path: Path) -> None:
    labels = np.repeat(["A", "B"], 10)
    names = [f"cell{k}" for k in range(20)]
    splits = [stratified_split(labels, 0.2, seed) for seed in (0, 1)]
    save_splits(tmp_path / "splits.json", splits, names)
    loaded = load_splits(tmp_path / "splits.json", names[::-1])
    for before, after in zip(splits, loaded, strict=True):
        assert {names[row] for row in before.test} == {names[::-1][row] for row in after.test}
        assert (after.seed, after.protocol) == (before.seed, before.protocol)
    assert [path.name for path in tmp_path.iterdir()] == ["splits.json"]


def test_an_edited_or_foreign_split_file_is_refused(tmp_path: Path) -> None:
    names = [f"cell{k}" for k in range(6)]
    path = tmp_path / "splits.json"
    save_splits(path, [Split(np.arange(4), np.array([4, 5]), 0, "by hand")], names)
    with pytest.raises(ScfmError, match="names 6 cells that are not in the data"):
        load_splits(path, ["other"])
    frozen = json.loads(path.read_text())
    frozen[0]["train"].append(frozen[0]["test"].pop())
    path.write_text(json.dumps(frozen))
    with pytest.raises(ScfmError, match="edited after it was frozen"):
        load_splits(path, names)
    with pytest.raises(ScfmError, match="repeat"):
        save_splits(path, [], ["a", "a"])
