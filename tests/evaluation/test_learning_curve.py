"""Learning curve: nested draws, the same held-out cells, every setting of a model beside the baselines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cells import made_up_cells
from runs import tiny_recipe, write_shards

from scfm.baselines import OBLIGATORY
from scfm.errors import ScfmError
from scfm.evaluation.learning_curve import few_shot, learning_curve
from scfm.evaluation.methods import SETTINGS, annotation_method
from scfm.evaluation.splits import stratified_split
from scfm.training.run import pretrain

QUICK = {"trainer": {"max_epochs": 1, "accelerator": "cpu"}, "task": {"min_steps": 0, "lora": {"rank": 2}}}


def test_fewer_cells_are_among_more_and_the_held_out_ones_stay() -> None:
    labels = np.repeat(["a", "b", "c"], [60, 20, 3])
    split = stratified_split(labels, seed=4)
    one, five = few_shot(split, labels, 1), few_shot(split, labels, 5)
    assert np.unique(labels[one.train], return_counts=True)[1].tolist() == [1, 1, 1]
    assert np.unique(labels[five.train], return_counts=True)[1].tolist() == [5, 5, 2]
    assert set(one.train) <= set(five.train) <= set(split.train)
    assert one.test is five.test is split.test
    assert five.protocol.endswith("; at most 5 training cells of a type")
    assert few_shot(split, labels, None) is split


def test_every_setting_learns_from_a_single_cell_of_each_type(tmp_path: Path) -> None:
    model = pretrain(tiny_recipe(write_shards(tmp_path / "shards"), tmp_path / "pretrained"))
    cells = made_up_cells(60, seed=1)
    methods = [annotation_method(name, model, tmp_path / name, name, QUICK) for name in SETTINGS]
    splits = [stratified_split(cells.obs["cell_type"].to_numpy(dtype=str), seed=0)]
    hashes = np.arange(60, dtype=np.uint64)
    rows = learning_curve(methods, cells, "cell_type", splits, cells_per_type=[1, None], cell_hashes=hashes)
    assert {(row["cells_per_type"], row["training_cells"]) for row in rows} == {(1, 3), (None, 48)}
    for most in (1, None):
        judged = {row["method"] for row in rows if row["cells_per_type"] == most}
        assert judged == {*SETTINGS, *(baseline().name for baseline in OBLIGATORY["annotation"])}
    scores = {row["method"]: row["value"] for row in rows if row["metric"] == "accuracy" and not row["cells_per_type"]}
    assert scores["probe"] > 0.5
    by_name = {method.name: method.training_hashes for method in methods}
    assert len(by_name["scratch"]) == 0 < len(by_name["lora"])
    assert sorted(path.name for path in (tmp_path / "probe").iterdir()) == ["annotation-seed0", "annotation-seed0-2"]


def test_an_unknown_setting_and_no_cells_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ScfmError, match=r"task\.setting: 'frozen' is none of annotation; choose one of zero_shot"):
        annotation_method("model", tmp_path, tmp_path, "frozen")
    with pytest.raises(ScfmError, match=r"cells_per_type: \[0\]; give numbers of at least 1"):
        learning_curve([], made_up_cells(9), "cell_type", [], cells_per_type=[0])
