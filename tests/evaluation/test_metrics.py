"""Scores over a fixed label list: foreign labels are errors, undefined scores are zero, ties count one half."""

from __future__ import annotations

import numpy as np
import pytest

from scfm.errors import ScfmError
from scfm.evaluation.metrics import CALIBRATION_BINS, auroc, classification_scores, reliability


def test_scores_of_a_case_small_enough_to_check_by_hand() -> None:
    scores = classification_scores(["A", "A", "A", "B"], ["A", "A", "B", "B"], ["A", "B"])
    np.testing.assert_array_equal(scores.confusion, [[2, 1, 0], [0, 1, 0]])
    np.testing.assert_allclose(scores.f1, [0.8, 2 / 3])
    assert scores.values["accuracy"] == 0.75
    assert scores.values["macro_precision"] == pytest.approx((1 + 0.5) / 2)
    assert scores.values["macro_recall"] == pytest.approx((2 / 3 + 1) / 2)
    assert scores.values["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)


def test_an_abstention_is_an_error_and_never_a_cell_less() -> None:
    scores = classification_scores(["A", "B"], ["A", "unassigned"], ["A", "B"])
    assert scores.values["accuracy"] == 0.5
    assert scores.confusion[:, -1].tolist() == [0, 1]


def test_a_type_of_the_list_that_is_neither_seen_nor_predicted_counts_as_zero() -> None:
    assert classification_scores(["A", "B"], ["A", "B"], ["A", "B", "C"]).values["macro_f1"] == pytest.approx(2 / 3)


def test_truth_outside_the_list_is_refused() -> None:
    with pytest.raises(ScfmError, match="outside the fixed label list: C"):
        classification_scores(["A", "C"], ["A", "A"], ["A", "B"])
    with pytest.raises(ScfmError, match="no cells"):
        classification_scores([], [], ["A", "B"])
    with pytest.raises(ScfmError, match="3 predictions for 2 cells"):
        classification_scores(["A", "B"], ["A", "A", "A"], ["A", "B"])
    with pytest.raises(ScfmError, match=r"expected \(2, 2\)"):
        classification_scores(["A", "B"], ["A", "B"], ["A", "B"], np.ones((2, 3)))


def test_auroc_counts_ties_one_half_and_skips_types_without_cells() -> None:
    truth = np.array(["A", "A", "B", "B"])
    constant = np.full((4, 3), 1 / 3)
    assert auroc(truth, constant, ["A", "B", "C"]) == 0.5
    perfect = np.array([[0.9, 0.1, 0], [0.8, 0.2, 0], [0.3, 0.7, 0], [0.1, 0.9, 0]])
    assert auroc(truth, perfect, ["A", "B", "C"]) == 1
    assert np.isnan(auroc(np.array(["A"]), np.ones((1, 1)), ["A"]))


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    # 8 cells at confidence 0.75 of which 6 are right, 2 cells at 0.95 of which 1 is right
    confidence = np.array([0.75] * 8 + [0.95] * 2)
    correct = np.array([True] * 6 + [False] * 2 + [True, False])
    found = reliability(confidence, correct)
    assert found.error == pytest.approx(0.2 * 0.45)
    assert found.cells.sum() == 10


def test_confidence_on_a_bin_edge_belongs_to_the_bin_below() -> None:
    found = reliability(np.array([0.0, 0.1, 1.0]), np.array([True, True, True]))
    assert found.cells[0] == 2
    assert found.cells[CALIBRATION_BINS - 1] == 1
