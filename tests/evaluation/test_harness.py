"""Every method runs on the same cells and seeds, sees no label of a held-out cell, and has the baselines beside it."""

from __future__ import annotations

from typing import Any

import anndata
import numpy as np
import pytest
from comparisons import Oracle, compared, three_types

from scfm.baselines.inputs import read_labels
from scfm.errors import ScfmError
from scfm.evaluation.harness import compare
from scfm.evaluation.splits import Split, stratified_split

BASELINES = [
    "majority class",
    "kNN on PCA",
    "logistic regression",
    "L1 logistic regression",
    "parameter-free centroid",
    "parameter-free PCA + LR",
]


def test_the_obligatory_baselines_are_there_without_being_asked_for() -> None:
    comparison = compared()
    assert comparison.names("baseline") == BASELINES
    assert comparison.names("model") == ["oracle"]
    assert len(comparison.runs) == (1 + len(BASELINES)) * 3
    for name in comparison.kinds:
        assert [(run.split, run.seed) for run in comparison.runs_of(name)] == [(0, 0), (1, 1), (2, 2)]


def test_held_out_cells_come_without_their_labels() -> None:
    adata = three_types()
    adata.obs["donor"] = "d1"
    method = Oracle(adata)
    split = stratified_split(read_labels(adata, "type"), 0.3, seed=7)
    compare([method], adata, "type", [split])
    assert method.seen == [(7, len(split.train), ["donor"])]
    assert list(adata.obs.columns) == ["type", "donor"]


def test_scores_are_those_of_the_held_out_cells() -> None:
    comparison = compared(wrong=0.2, seeds=1)
    truth = comparison.truth[comparison.splits[0].test]
    run = comparison.runs_of("oracle")[0]
    assert run.scores.values["accuracy"] == np.mean(run.predicted == truth)
    assert compared(seeds=1).runs_of("oracle")[0].scores.values == {
        "accuracy": 1,
        "macro_f1": 1,
        "macro_precision": 1,
        "macro_recall": 1,
        "auroc": 1,
        "calibration_error": 0,
    }


def test_a_rerun_gives_the_same_scores() -> None:
    first, again = compared(wrong=0.2), compared(wrong=0.2)
    values = [[(row["method"], row["metric"], row["value"]) for row in one.rows()] for one in (first, again)]
    assert values[0] == values[1]
    assert first.data_sha256 == again.data_sha256
    assert first.split_hashes == again.split_hashes
    assert len(set(first.split_hashes)) == 3


def test_the_spread_is_the_sample_deviation_and_absent_for_one_seed() -> None:
    comparison = compared(wrong=0.3)
    values = [run.scores.values["macro_f1"] for run in comparison.runs_of("oracle")]
    assert comparison.summary("oracle", "macro_f1").sd == pytest.approx(np.std(values, ddof=1))
    alone = compared(seeds=1).summary("oracle", "macro_f1")
    assert alone.sd is None
    assert str(alone) == "1.000"


def test_the_best_calibrated_method_is_the_one_with_the_smallest_error() -> None:
    comparison = compared(wrong=0.5)
    errors = {name: comparison.summary(name, "calibration_error").mean for name in BASELINES}
    assert comparison.best("baseline", "calibration_error") == min(errors, key=lambda name: errors[name])
    assert comparison.best("baseline", "macro_f1") != "majority class"


def test_overlap_with_the_training_cells_is_counted_per_split() -> None:
    adata = three_types()
    hashes = np.arange(adata.n_obs, dtype=np.uint64)
    split = stratified_split(read_labels(adata, "type"), 0.3)
    method = Oracle(adata)
    method.training_hashes = hashes[split.test[:4]]
    comparison = compare([method], adata, "type", [split], cell_hashes=hashes)
    leakage = comparison.runs_of("oracle")[0].leakage
    assert leakage is not None
    assert (leakage.seen, leakage.cells) == (4, len(split.test))
    assert comparison.runs_of("kNN on PCA")[0].leakage is None
    with pytest.raises(ScfmError, match="oracle knows its training cells: pass cell_hashes"):
        compare([method], adata, "type", [split])


def test_identical_profiles_across_the_split_are_counted() -> None:
    adata = three_types()
    hashes = np.arange(adata.n_obs, dtype=np.uint64)
    split = stratified_split(read_labels(adata, "type"), 0.3)
    hashes[split.test[0]] = hashes[split.train[0]]
    comparison = compare([], adata, "type", [split], cell_hashes=hashes)
    assert comparison.duplicates is not None
    assert comparison.duplicates[0].seen == 1


def test_types_that_are_never_held_out_are_listed_and_not_scored() -> None:
    adata = three_types()
    truth = read_labels(adata, "type")
    rows = np.arange(adata.n_obs)
    test = rows[(truth != "NK") & (rows % 3 == 0)]
    comparison = compare([], adata, "type", [Split(np.setdiff1d(rows, test), test, 0, "by hand")])
    assert comparison.labels == ["B", "T"]
    assert comparison.excluded == ["NK"]
    assert comparison.support == [int((truth == "B").sum()), int((truth == "T").sum())]


def test_embeddings_cover_the_first_split_training_cells_first() -> None:
    comparison = compared()
    split = comparison.splits[0]
    assert list(comparison.embeddings) == ["kNN on PCA"]
    assert len(comparison.embeddings["kNN on PCA"]) == len(split.train) + len(split.test)


class Short(Oracle):
    """Forgets the probabilities of its last class."""

    def predict(self, adata: anndata.AnnData) -> tuple[Any, Any]:
        labels, probabilities = super().predict(adata)
        return labels, probabilities[:, :-1]


def test_what_cannot_be_compared_is_refused() -> None:
    adata = three_types()
    split = stratified_split(read_labels(adata, "type"), 0.3)
    with pytest.raises(ScfmError, match="no task 'cooking'; there is annotation"):
        compare([], adata, "type", [split], task="cooking")
    with pytest.raises(ScfmError, match="no split"):
        compare([], adata, "type", [])
    with pytest.raises(ScfmError, match="method names repeat"):
        compare([Oracle(adata, name="kNN on PCA")], adata, "type", [split])
    with pytest.raises(ScfmError, match=r"oracle: probabilities are \(\d+, 2\), expected \(\d+, 3\)"):
        compare([Short(adata)], adata, "type", [split])
