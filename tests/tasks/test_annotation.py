"""Annotation: which cells and labels are used, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cells import made_up_cells
from runs import tiny_recipe, write_shards

from scfm.checkpoints.native import read_model, read_weights
from scfm.data.store import CellStore, ObsColumn
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.errors import ScfmError
from scfm.recipe import Recipe, TaskConfig
from scfm.recipe_reader import bundled, like, read_recipe
from scfm.tasks.annotation import labels_of
from scfm.training.finetune import finetune
from scfm.training.run import pretrain


def store_with(codes: list[int], categories: list[str]) -> CellStore:
    column = ObsColumn(np.array(codes), categories)
    return CellStore(Vocabulary.from_genes([Gene.of(None, "A")]), "counts", [], {"cell_type": column})


def test_cells_without_a_label_are_left_out_and_labels_renumbered() -> None:
    store = store_with([0, 0, 1, 2, 2, 2, -1, 3], ["B cell", "unknown", "T cell", "nan"])
    codes, names = labels_of(store, TaskConfig())
    assert names == ["B cell", "T cell"]
    assert codes.tolist() == [0, 0, -1, 1, 1, 1, -1, -1]


@pytest.mark.parametrize(
    ("codes", "categories", "message"),
    [
        ([0, 0, 0], ["B cell", "T cell"], r"names 1 label\(s\); at least 2 are needed"),
        ([0, 0, 1], ["B cell", "T cell"], r"\{'T cell': 1\} have fewer than task\.min_cells = 2"),
    ],
)
def test_too_few_labels_or_cells_are_named(codes: list[int], categories: list[str], message: str) -> None:
    with pytest.raises(ScfmError, match=message):
        labels_of(store_with(codes, categories), TaskConfig())


def test_a_missing_column_lists_those_there_are() -> None:
    with pytest.raises(ScfmError, match=r"'louvain' is not in the data, which carry \['cell_type'\]"):
        labels_of(store_with([0, 1], ["a", "b"]), TaskConfig(label="louvain"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("annotation")
    pretrain(tiny_recipe(write_shards(place / "shards"), place / "pretrained", data={"n_bins": 21}))
    return place


def recipe(place: Path, out: Path, **sections: object) -> Recipe:
    quick = {
        "out": str(out),
        "from": str(place / "pretrained" / "model"),
        "data": {"shards": str(place / "shards"), "cells_per_batch": 16},
        "trainer": {"max_epochs": 2, "accelerator": "cpu"},
    }
    return read_recipe(
        bundled("finetune/annotation.yaml"), quick | sections, like(read_model(place / "pretrained" / "model"))
    )


def test_the_model_keeps_its_shape_and_bins_and_gains_a_head(place: Path, tmp_path: Path) -> None:
    tuned = read_model(finetune(recipe(place, tmp_path / "run")))
    before = read_model(place / "pretrained" / "model")
    assert tuned.model == before.model
    assert (tuned.tokens.n_bins, tuned.tokens.max_genes) == (21, 30)
    assert [(head.task, head.labels) for head in tuned.heads] == [("annotation", ["B cell", "NK cell", "T cell"])]
    assert tuned.training_data["pretraining"] == before.training_data


def test_value_objectives_keep_their_pretrained_heads(place: Path, tmp_path: Path) -> None:
    both = {"objectives": [{"name": "cls"}, {"name": "gep"}], "data": {"mask_ratios": [0.4]}}
    sections = {"shards": str(place / "shards"), "cells_per_batch": 16, "mask_ratios": [0.4]}
    frozen = recipe(place, tmp_path / "run", **both | {"data": sections, "trainable": ["heads.annotation.*"]})
    before, after = (read_weights(model) for model in (place / "pretrained" / "model", finetune(frozen)))
    assert (before["heads.gep.out.weight"] == after["heads.gep.out.weight"]).all()


def test_shards_of_another_vocabulary_are_refused(place: Path, tmp_path: Path) -> None:
    from scfm.data.prepare import prepare

    made_up_cells(40, genes=[f"X{i}" for i in range(30)]).write_h5ad(tmp_path / "other.h5ad")
    prepare([tmp_path / "other.h5ad"], tmp_path / "other", obs=["cell_type"])
    other = recipe(place, tmp_path / "run", data={"shards": str(tmp_path / "other"), "mask_ratios": [0]})
    with pytest.raises(
        ScfmError, match=r"another vocabulary than the model's; prepare the cells again with `scfm prep"
    ):
        finetune(other)
    assert not (tmp_path / "run").exists()


def test_a_pattern_that_matches_nothing_is_an_error(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ScfmError, match=r"trainable: 'encoder\.\*' matches no parameter"):
        finetune(recipe(place, tmp_path / "run", trainable=["encoder.*"]))


def test_an_unknown_task_is_named(place: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ScfmError, match=r"task\.name: 'telepathy' is not known; choose one of \['annotation', 'integration'\]"
    ):
        finetune(recipe(place, tmp_path / "run", task={"name": "telepathy"}))
