"""The words say who wins, and say so when nobody does."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from comparisons import compared, with_confusion

from scfm.errors import ScfmError
from scfm.evaluation.bootstrap import Interval
from scfm.evaluation.leakage import Leakage
from scfm.evaluation.protocol import Kind
from scfm.evaluation.verdict import (
    Difference,
    against_best_baseline,
    anchored,
    capitalised,
    caveats,
    differences,
    signed,
    uninformative,
)


def sentence(difference: float, low: float, high: float) -> str:
    return str(Difference("scGPT", "logistic regression", "macro_f1", Interval(difference, low, high, 100), 0, 3))


def test_a_win_of_the_model() -> None:
    assert sentence(0.05, 0.01, 0.09) == (
        "scGPT beats logistic regression on macro-F1 by 0.050 (95% interval 0.010 to 0.090)."
    )


def test_a_win_of_the_baseline_is_said_in_the_same_words() -> None:
    assert sentence(-0.05, -0.09, -0.01) == (
        "Logistic regression beats scGPT on macro-F1 by 0.050 (95% interval 0.010 to 0.090)."
    )


def test_an_interval_around_zero_is_no_win() -> None:
    assert sentence(-0.02, -0.05, 0.01) == (
        "Logistic regression is 0.020 ahead of scGPT on macro-F1, but the interval includes zero "
        "(95% interval −0.010 to +0.050): these cells do not tell the two apart."
    )
    assert "score the same on macro-F1" in sentence(0.0, -0.01, 0.01)


def test_numbers_and_names_are_typeset() -> None:
    assert [signed(value) for value in (0.1234, -0.1234, -0.0001)] == ["+0.123", "−0.123", "0.000"]
    assert capitalised("logistic regression") == "Logistic regression"
    assert capitalised("kNN on PCA") == "kNN on PCA"
    assert capitalised("macro-F1") == "Macro-F1"
    assert capitalised("parameter-free PCA + LR") == "Parameter-free PCA + LR"


def test_donors_that_are_types_give_no_interval_over_donors() -> None:
    comparison, (donors_of, types_of) = compared(), (np.arange(150) % 5, compared().truth)
    for donors, with_interval in ((donors_of.astype(str), True), (np.char.add("line of ", types_of), False)):
        cells = replace(comparison.cells, adata=comparison.cells.adata.copy(), donor="donor_id")
        cells.adata.obs["donor_id"] = donors
        found = replace(comparison, cells=cells)
        difference = against_best_baseline(found, "oracle", "accuracy")
        assert (difference.donors is not None) == with_interval
        note = "No intervals over donors: donor_id divides the cells just as type does"
        assert any(one.startswith(note) for one in caveats(found)) != with_interval
        assert any(one.startswith("Only 5 donors") for one in caveats(found)) == with_interval


def test_a_perfect_model_beats_the_best_baseline_in_every_seed() -> None:
    comparison = compared()
    found = against_best_baseline(comparison, "oracle", "macro_f1")
    best = comparison.best("macro_f1", "baseline")
    assert found.baseline == best != "majority class"
    assert found.outcome == "model"
    assert (found.seeds_ahead, found.seeds) == (3, 3)
    means = [comparison.summary(name, "macro_f1").mean for name in ("oracle", str(best))]
    assert found.interval.difference == pytest.approx(means[0] - means[1])


def test_a_bad_model_loses_in_words() -> None:
    verdicts = [str(one) for one in differences(compared(wrong=0.9))]
    assert len(verdicts) == 2
    assert all(re.match(r"(Logistic regression|kNN on PCA) beats oracle on", verdict) for verdict in verdicts)


def test_without_a_baseline_there_is_no_verdict() -> None:
    comparison = compared(seeds=1)
    with pytest.raises(ScfmError, match="no baseline"):
        against_best_baseline(replace(comparison, kinds={"oracle": "model"}), "oracle", "macro_f1")


def test_scores_are_placed_between_the_controls() -> None:
    comparison = compared(wrong=0.3)
    bottom = comparison.summary(str(comparison.best("accuracy", "negative control")), "accuracy").mean
    at = comparison.summary("oracle", "accuracy").mean
    assert anchored(comparison, "true labels", "accuracy") == 1
    assert anchored(comparison, "oracle", "accuracy") == pytest.approx((at - bottom) / (1 - bottom))
    assert anchored(comparison, "noise embedding", "accuracy") <= 0
    without = replace(comparison, kinds={name: kind for name, kind in comparison.kinds.items() if kind == "model"})
    assert anchored(without, "oracle", "accuracy") is None
    # the lower the better: the truth, which is never wrong about its confidence, stands at 1 all the same
    assert anchored(comparison, "true labels", "calibration_error") == 1


def test_a_metric_by_which_the_truth_is_no_better_than_noise_says_nothing() -> None:
    comparison = compared()
    swapped: dict[str, Kind] = {"noise embedding": "positive control", "true labels": "negative control"}
    silent = uninformative(replace(comparison, kinds=comparison.kinds | swapped))
    assert "says nothing here: true labels, a negative control" in silent["accuracy"]
    truth_loses = {"shuffled labels": "positive control", "split half": "negative control", "true labels": "baseline"}
    silent = uninformative(
        replace(comparison, kinds={**comparison.kinds, **truth_loses, "noise embedding": "baseline"})
    )
    assert silent["macro_f1"].startswith("Macro-F1 says nothing here: shuffled labels, which knows the answer, scores")


def test_one_seed_is_called_one_seed() -> None:
    assert any(note.startswith("One seed only") for note in caveats(compared(seeds=1)))
    assert not any(note.startswith("One seed only") for note in caveats(compared(seeds=2)))


def test_leakage_is_always_spoken_of() -> None:
    comparison = compared(seeds=2)
    assert "Oracle does not say which cells it was trained on: leakage is not ruled out." in caveats(comparison)

    def with_leakage(*seen: int) -> list[str]:
        counted = iter(seen)
        runs = [replace(run, leakage=Leakage(50, next(counted))) for run in comparison.runs_of("oracle")]
        return caveats(replace(comparison, runs=runs))

    assert "No held-out cell was among those that oracle was trained on, pretraining included." in with_leakage(0, 0)
    assert any("5 of 50 held-out cells (10.0%)" in note for note in with_leakage(0, 5))


def test_rare_left_out_and_foreign_types_and_duplicates_are_noted() -> None:
    comparison = compared(seeds=1)
    first = comparison.runs[0]
    confusion = np.pad(first.scores.confusion[:, :-1], ((0, 0), (0, 1)), constant_values=2)
    notes = caveats(
        replace(
            comparison,
            support=[75, 50, 19],
            excluded=["Platelet"],
            duplicates=[Leakage(45, 2)],
            runs=[with_confusion(first, confusion), *comparison.runs[1:]],
        )
    )
    assert "Fewer than 20 cells in all, so their F1 moves in large steps: T." in notes
    alone = "Not scored, because the test set has no such cell, only the training cells: Platelet."
    assert alone in notes
    assert "Not scored, because never held out: Platelet." in caveats(replace(compared(), excluded=["Platelet"]))
    assert "Oracle gave 6 cells a label outside the list; they count as errors." in notes
    assert any(note.startswith("Training and held-out cells share identical profiles: 2 of 45") for note in notes)
