"""Every method runs on the same cells and seeds, sees no label of a held-out cell, and has the baselines beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from comparisons import FewBaselines, Oracle, compared, three_types

from scfm.baselines import OBLIGATORY
from scfm.baselines.inputs import read_labels
from scfm.errors import ScfmError
from scfm.evaluation.harness import compare, run_method
from scfm.evaluation.leakage import TrainedOn
from scfm.evaluation.protocol import LabelledCells
from scfm.evaluation.splits import Split, stratified_split
from scfm.evaluation.verdict import against_best_baseline, caveats

BASELINES = ["majority class", "kNN on PCA", "logistic regression"]
QUICK = FewBaselines()
NEGATIVE, POSITIVE = ["noise embedding", "shuffled labels"], ["split half", "true labels"]


def test_baselines_and_controls_are_there_without_being_asked_for() -> None:
    adata = three_types()
    comparison = compare([], adata, "type", [stratified_split(read_labels(adata, "type"), 0.3)])
    assert comparison.names("baseline") == [baseline.name for baseline in OBLIGATORY["annotation"]]
    assert comparison.names("negative control") == NEGATIVE
    assert comparison.names("positive control") == POSITIVE
    assert comparison.passed


def test_every_method_runs_on_every_split_with_its_seed() -> None:
    comparison = compared()
    assert list(comparison.kinds) == ["oracle", *BASELINES, *NEGATIVE, *POSITIVE]
    for name in comparison.kinds:
        assert [(run.split, run.seed) for run in comparison.runs_of(name)] == [(0, 0), (1, 1), (2, 2)]


def test_held_out_cells_come_without_their_labels() -> None:
    adata = three_types()
    adata.obs["donor"] = "d1"
    method = Oracle(adata)
    split = stratified_split(read_labels(adata, "type"), 0.3, seed=7)
    compare([method], adata, "type", [split], task=QUICK)
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
    first, again = compared(wrong=0.2), compared.__wrapped__(wrong=0.2)
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
    assert comparison.best("calibration_error", "baseline") == min(errors, key=lambda name: errors[name])
    assert comparison.best("macro_f1", "baseline") != "majority class"


def test_overlap_with_the_training_cells_is_counted_per_split() -> None:
    adata = three_types()
    hashes = np.arange(adata.n_obs, dtype=np.uint64)
    split = stratified_split(read_labels(adata, "type"), 0.3)
    method = Oracle(adata)
    method.training_hashes = hashes[split.test[:4]]
    comparison = compare([method], adata, "type", [split], task=QUICK, cell_hashes=hashes)
    leakage = comparison.runs_of("oracle")[0].leakage
    assert leakage is not None
    assert (leakage.seen, leakage.cells) == (4, len(split.test))
    assert comparison.runs_of("kNN on PCA")[0].leakage is None
    with pytest.raises(ScfmError, match="oracle knows its training cells: pass cell_hashes"):
        compare([method], adata, "type", [split], task=QUICK)


def test_identical_profiles_across_the_split_are_counted() -> None:
    adata = three_types()
    hashes = np.arange(adata.n_obs, dtype=np.uint64)
    split = stratified_split(read_labels(adata, "type"), 0.3)
    hashes[split.test[0]] = hashes[split.train[0]]
    comparison = compare([], adata, "type", [split], task=QUICK, cell_hashes=hashes)
    assert comparison.duplicates is not None
    assert comparison.duplicates[0].seen == 1


def test_types_that_are_never_held_out_are_listed_and_not_scored() -> None:
    adata = three_types()
    truth = read_labels(adata, "type")
    rows = np.arange(adata.n_obs)
    test = rows[(truth != "NK") & (rows % 3 == 0)]
    comparison = compare([], adata, "type", [Split(np.setdiff1d(rows, test), test, 0, "by hand")], task=QUICK)
    assert comparison.labels == ["B", "T"]
    assert comparison.excluded == ["NK"]
    assert comparison.support == [int((truth == "B").sum()), int((truth == "T").sum())]
    assert comparison.held_out == [int((truth[test] == name).sum()) for name in ("B", "T")]
    assert "Not scored, because the test set has no such cell, only the training cells: NK." in caveats(comparison)


def test_embeddings_cover_the_first_split_training_cells_first() -> None:
    comparison = compared()
    split = comparison.splits[0]
    assert {"kNN on PCA", "noise embedding"} <= set(comparison.embeddings())
    assert all(len(found) == len(split.train) + len(split.test) for found in comparison.embeddings().values())
    assert comparison.embeddings(split=1) == {}


class Stranger(Oracle):
    """Is sure that every cell is of a type that no held-out cell has."""

    def predict(self, adata: anndata.AnnData) -> tuple[Any, Any]:
        return np.repeat("NK", adata.n_obs), np.tile([0.05, 0.9, 0.05], (adata.n_obs, 1))


def test_who_is_sure_of_a_type_outside_the_list_is_sure_all_the_same() -> None:
    adata = three_types()
    rows = np.arange(adata.n_obs)
    test = rows[(read_labels(adata, "type") != "NK") & (rows % 3 == 0)]
    split = Split(np.setdiff1d(rows, test), test, 0, "by hand")
    (run,) = compare([Stranger(adata)], adata, "type", [split], task=QUICK).runs_of("oracle")
    assert run.scores.reliability.cells[8] == len(test)  # 0.8 to 0.9, and not the 0.05 of the next best type
    assert run.scores.values["calibration_error"] == pytest.approx(0.9)


def test_a_method_that_takes_more_threads_leaves_the_next_what_it_had() -> None:
    class Greedy(Oracle):
        def fit(self, adata: anndata.AnnData, label: str, seed: int) -> None:
            super().fit(adata, label, seed)
            torch.set_num_threads(threads + 1)

    threads, adata = torch.get_num_threads(), three_types()
    cells, split = LabelledCells(adata, "type"), stratified_split(read_labels(adata, "type"), 0.3)
    run = run_method(QUICK, Greedy(adata), "model", cells, split, 0, ["B", "NK", "T"], shown=False)
    assert run.failure is None
    assert torch.get_num_threads() == threads


class Short(Oracle):
    """Forgets the probabilities of its last class."""

    def predict(self, adata: anndata.AnnData) -> tuple[Any, Any]:
        labels, probabilities = super().predict(adata)
        return labels, probabilities[:, :-1]


def test_what_cannot_be_compared_is_refused() -> None:
    adata = three_types()
    split = stratified_split(read_labels(adata, "type"), 0.3)
    with pytest.raises(ScfmError, match="no task 'cooking' can be evaluated; there is annotation"):
        compare([], adata, "type", [split], task="cooking")
    with pytest.raises(ScfmError, match="no split"):
        compare([], adata, "type", [], task=QUICK)
    with pytest.raises(ScfmError, match="method names repeat"):
        compare([Oracle(adata, name="kNN on PCA")], adata, "type", [split], task=QUICK)
    with pytest.raises(ScfmError, match="the name of a method is text to be printed in tables; 3 is not"):
        compare([Oracle(adata, name=3)], adata, "type", [split], task=QUICK)  # type: ignore[arg-type]
    with pytest.raises(ScfmError, match="integration: names no batch column"):
        compare([], adata, "type", [split], task="integration")


class Clumsy(Oracle):
    """Stumbles over some seeds."""

    def fit(self, adata: anndata.AnnData, label: str, seed: int) -> None:
        super().fit(adata, label, seed)
        if seed in (1, 2):
            raise KeyError(f"gene {seed}")


def test_a_method_that_fails_is_a_row_with_the_reason_and_the_others_go_on() -> None:
    adata = three_types()
    splits = [stratified_split(read_labels(adata, "type"), 0.3, seed) for seed in range(3)]
    comparison = compare([Short(adata, name="short"), Clumsy(adata, name="clumsy")], adata, "type", splits, task=QUICK)
    assert not comparison.passed
    assert comparison.failure("short") == "failed: probabilities are (45, 2), expected (45, 3): cells, classes"
    assert comparison.failure("clumsy") == "failed (seed 1, 2): KeyError: 'gene 1'"
    assert comparison.names("model") == ["short", "clumsy"]
    assert comparison.ranked("model") == []
    assert comparison.ranked("baseline") == BASELINES
    assert len(comparison.runs_of("clumsy")) == 1
    rows = [row for row in comparison.rows() if row["method"] == "clumsy" and row["seed"] == 1]
    assert [(row["metric"], row["value"], row["failure"]) for row in rows] == [(None, None, "KeyError: 'gene 1'")]
    trace = next(run.trace for run in comparison.runs if run.failure and run.method == "clumsy")
    assert trace is not None
    assert 'raise KeyError(f"gene {seed}")' in trace


def test_costs_are_measured_where_the_system_tells() -> None:
    runs = compared().runs_of("logistic regression")
    assert all(run.seconds_fit > 0 and run.seconds_predict > 0 for run in runs)
    assert all(run.peak_mib is None or 10 < run.peak_mib < 100_000 for run in runs)
    assert Path("/proc/self/clear_refs").exists() == (runs[0].peak_mib is not None)


def test_strict_refuses_what_is_known_before_anything_is_fitted() -> None:
    adata = three_types()
    hashes = np.arange(adata.n_obs, dtype=np.uint64)
    split = stratified_split(read_labels(adata, "type"), 0.3)
    method = Oracle(adata)
    seen = TrainedOn(hashes[split.test[:4]], hashes)
    with pytest.raises(ScfmError, match=r"--strict: oracle was trained on .* 4 of 45 held-out cells"):
        compare([method], adata, "type", [split], task=QUICK, trained_on={"oracle": seen}, strict=True)
    assert method.seen == []
    with pytest.raises(ScfmError, match="--strict: oracle does not say which cells"):
        compare([method], adata, "type", [split], task=QUICK, strict=True)
    clean = TrainedOn(hashes[split.train], hashes)
    assert compare([method], adata, "type", [split], task=QUICK, trained_on={"oracle": clean}, strict=True).passed


def test_the_truth_scores_one_where_a_type_is_held_out_in_some_splits_only() -> None:
    adata = three_types()
    truth, rows = read_labels(adata, "type"), np.arange(adata.n_obs)
    tests = [rows[rows % 3 == 0], rows[(rows % 3 == 1) & (truth != "NK")]]
    splits = [Split(np.setdiff1d(rows, test), test, seed, "by hand") for seed, test in enumerate(tests)]
    comparison = compare([Oracle(adata)], adata, "type", splits, task=QUICK)
    assert comparison.labels == ["B", "NK", "T"]
    assert [run.values["macro_f1"] for run in comparison.runs_of("oracle")] == [1, 1]
    best = against_best_baseline(comparison, "oracle", "macro_f1")
    assert best is not None
    assert best.interval.difference == pytest.approx(1 - comparison.summary(best.baseline, "macro_f1").mean)
