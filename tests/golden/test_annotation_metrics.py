"""Annotation scores equal scikit-learn's stored ones, with and without a label outside the list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_values import stored

from scfm.evaluation.metrics import classification_scores

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    return stored(shared, "annotation")


@pytest.mark.parametrize(
    ("predictions", "expected"), [("y_pred", "expected"), ("y_pred_with_unknown", "expected_with_unknown")]
)
def test_scores_over_the_union_of_labels(golden: dict[str, Any], predictions: str, expected: str) -> None:
    wanted = golden[expected]
    scores = classification_scores(golden["y_true"], golden[predictions], wanted["confusion_labels"])
    for name in ("accuracy", "macro_precision", "macro_recall", "macro_f1"):
        assert scores.values[name] == pytest.approx(wanted[name], abs=1e-12), name
    assert scores.values["accuracy"] == pytest.approx(wanted["micro_f1"], abs=1e-12)
    np.testing.assert_array_equal(scores.confusion[:, :-1], wanted["confusion"])
    per_class = [wanted["per_class"][name] for name in scores.labels]
    np.testing.assert_allclose(scores.precision, [one["precision"] for one in per_class], atol=1e-12)
    np.testing.assert_allclose(scores.recall, [one["recall"] for one in per_class], atol=1e-12)
    np.testing.assert_allclose(scores.f1, [one["f1-score"] for one in per_class], atol=1e-12)
    support = scores.confusion.sum(1)
    assert support.tolist() == [one["support"] for one in per_class]
    for average, weights in (("macro avg", np.ones(len(support))), ("weighted avg", support)):
        mine = {
            "precision": np.average(scores.precision, weights=weights),
            "recall": np.average(scores.recall, weights=weights),
            "f1-score": np.average(scores.f1, weights=weights),
            "support": support.sum(),
        }
        assert mine == pytest.approx(wanted["per_class"][average], abs=1e-12)
    assert mine["f1-score"] == pytest.approx(wanted["weighted_f1"], abs=1e-12)
    # we report neither, but our confusion matrix holds both
    table, n = scores.confusion[:, :-1], support.sum()
    by_chance = (support * table.sum(0)).sum() / n**2
    agreement = np.trace(table) / n - by_chance
    assert agreement / (1 - by_chance) == pytest.approx(wanted["cohen_kappa"], abs=1e-12)
    spread = (1 - (support.astype(float) ** 2).sum() / n**2) * (1 - (table.sum(0).astype(float) ** 2).sum() / n**2)
    assert agreement / np.sqrt(spread) == pytest.approx(wanted["mcc"], abs=1e-12)


def test_macro_f1_over_true_labels_only(golden: dict[str, Any]) -> None:
    for predictions, expected in (("y_pred", "expected"), ("y_pred_with_unknown", "expected_with_unknown")):
        scores = classification_scores(golden["y_true"], golden[predictions], golden["classes"])
        assert scores.values["macro_f1"] == pytest.approx(golden[expected]["macro_f1_true_labels_only"], abs=1e-12)
        # recall averages over the types that have cells, which is what sklearn calls balanced accuracy
        assert scores.values["macro_recall"] == pytest.approx(golden[expected]["balanced_accuracy"], abs=1e-12)


def test_auroc_one_against_the_rest(golden: dict[str, Any]) -> None:
    scores = classification_scores(golden["y_true"], golden["y_pred"], golden["classes"], np.array(golden["prob"]))
    assert scores.values["auroc"] == pytest.approx(golden["auroc_ovr_macro"], abs=1e-9)


def test_majority_vote(golden: dict[str, Any]) -> None:
    names, counts = np.unique(golden["y_true"], return_counts=True)
    scores = classification_scores(
        golden["y_true"], [names[counts.argmax()]] * len(golden["y_true"]), golden["classes"]
    )
    assert scores.values["accuracy"] == pytest.approx(golden["majority_vote_accuracy"], abs=1e-12)
    assert scores.values["macro_f1"] == pytest.approx(golden["majority_macro_f1"], abs=1e-12)


def test_unassigned_cells_are_not_dropped(golden: dict[str, Any]) -> None:
    truth, predicted = np.array(golden["y_true"]), np.array(golden["y_pred_with_unknown"])
    trap, kept = golden["TRAP_dropping_unassigned_cells"], np.isin(predicted, golden["classes"])
    flattered = classification_scores(truth[kept], predicted[kept], golden["classes"]).values
    assert flattered["accuracy"] == pytest.approx(trap["accuracy"], abs=1e-12)
    assert flattered["macro_f1"] == pytest.approx(trap["macro_f1"], abs=1e-12)
    honest = classification_scores(truth, predicted, golden["classes"])
    assert honest.values["accuracy"] < flattered["accuracy"]
    assert 1 - honest.confusion[:, -1].sum() / len(truth) == pytest.approx(trap["coverage"], abs=1e-12)
