"""Scores of predicted labels over a fixed label list, each with its protocol named.

Everything but calibration and AUROC follows from one confusion matrix, whose last column holds the predictions that are
not in the list: an abstention or a foreign label is an error, never a cell less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scfm.errors import ScfmError
from scfm.evaluation.metrics.metric import Metric

CALIBRATION_BINS = 10


CLASSIFICATION: dict[str, Metric] = {
    "macro_f1": Metric(
        "macro-F1", "unweighted mean of F1 over the fixed label list; F1 of a type never predicted is 0"
    ),
    "accuracy": Metric("accuracy", "share of held-out cells with the right label"),
    "macro_precision": Metric(
        "macro precision", "unweighted mean over the fixed label list; never predicted counts as 0"
    ),
    "macro_recall": Metric("macro recall", "unweighted mean of recall over the fixed label list"),
    "auroc": Metric("AUROC", "one type against the rest, unweighted mean over the types that have held-out cells"),
    "calibration_error": Metric(
        "calibration error",
        f"expected calibration error of the top probability, {CALIBRATION_BINS} equal-width bins; a method that always "
        "gives the class frequencies is well calibrated and useless, so read it beside accuracy",
        higher_is_better=False,
    ),
}


def confusion_codes(
    truth: Sequence[str] | NDArray, predicted: Sequence[str] | NDArray, labels: list[str]
) -> NDArray[np.int64]:
    """Return for each cell its place in the flattened (L, L + 1) confusion matrix.

    Raises ScfmError where a true label is not in the list, since such a cell could never be right.
    """
    column = {name: k for k, name in enumerate(labels)}
    if unlisted := sorted({str(name) for name in truth} - set(labels)):
        raise ScfmError(f"true labels outside the fixed label list: {', '.join(unlisted)}")
    if len(truth) != len(predicted):
        raise ScfmError(f"{len(predicted)} predictions for {len(truth)} cells")
    rows = np.array([column[str(name)] for name in truth], dtype=np.int64)
    columns = np.array([column.get(str(name), len(labels)) for name in predicted], dtype=np.int64)
    return rows * (len(labels) + 1) + columns


def _ratio(part: NDArray, whole: NDArray) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole > 0)


def precision(confusion: NDArray) -> NDArray[np.float64]:
    """Return precision per label, (..., L), of confusion matrices (..., L, L + 1); 0 where never predicted."""
    listed = confusion[..., :-1]
    return _ratio(np.diagonal(listed, axis1=-2, axis2=-1), listed.sum(-2))


def recall(confusion: NDArray) -> NDArray[np.float64]:
    """Return recall per label, (..., L), of confusion matrices (..., L, L + 1); 0 where there is no such cell."""
    return _ratio(np.diagonal(confusion[..., :-1], axis1=-2, axis2=-1), confusion.sum(-1))


def f1(confusion: NDArray) -> NDArray[np.float64]:
    """Return F1 per label, (..., L), of confusion matrices (..., L, L + 1); 0 where neither seen nor predicted."""
    listed = confusion[..., :-1]
    return _ratio(2.0 * np.diagonal(listed, axis1=-2, axis2=-1), confusion.sum(-1) + listed.sum(-2))


def accuracy(confusion: NDArray) -> NDArray[np.float64]:
    """Return the share of cells on the diagonal, (...,), of confusion matrices (..., L, L + 1)."""
    return _ratio(np.trace(confusion[..., :-1], axis1=-2, axis2=-1), confusion.sum((-2, -1)))


# the scores that a confusion matrix determines: those that can be bootstrapped over cells at no cost
FROM_CONFUSION: dict[str, Callable[[NDArray], NDArray[np.float64]]] = {
    "accuracy": accuracy,
    "macro_f1": lambda confusion: f1(confusion).mean(-1),
    "macro_precision": lambda confusion: precision(confusion).mean(-1),
    "macro_recall": lambda confusion: recall(confusion).mean(-1),
}


def auroc(truth: NDArray[np.str_], probabilities: NDArray[np.float64], labels: list[str]) -> float:
    """Return the area under the ROC curve, one label against the rest, averaged over labels that have cells.

    Computed from mid-ranks (Mann-Whitney), so tied probabilities count one half. NaN where all cells share one label.
    """
    from scipy.stats import rankdata

    areas = []
    for k, name in enumerate(labels):
        positive = truth == name
        n_positive, n_negative = int(positive.sum()), int((~positive).sum())
        if n_positive and n_negative:
            rank_sum = rankdata(probabilities[:, k])[positive].sum()
            areas.append((rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))
    return float(np.mean(areas)) if areas else float("nan")


@dataclass(frozen=True)
class Reliability:
    """How often a method is right at each level of confidence: per bin its cells, mean confidence and accuracy."""

    cells: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def error(self) -> float:
        """The expected calibration error (Guo et al. 2017, equation 3)."""
        return float((self.cells * np.abs(self.accuracy - self.confidence)).sum() / self.cells.sum())


def reliability(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> Reliability:
    """Bin cells (n,) by the probability of their predicted label; empty bins hold 0."""
    bin_of = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    cells = np.bincount(bin_of, minlength=CALIBRATION_BINS)
    mean = [np.bincount(bin_of, weights=x, minlength=CALIBRATION_BINS) for x in (confidence, correct)]
    return Reliability(cells, _ratio(mean[0], cells), _ratio(mean[1], cells))


def relative_error(predicted: NDArray[np.floating], truth: NDArray[np.floating]) -> float:
    """Return the mean of |x - y| / (y + 1e-6) over predicted values (n,): scGPT's "mre".

    It says nothing where true values are zero: each of them adds a million times its error.
    """
    return float((np.abs(predicted - truth) / (truth + 1e-6)).mean())


@dataclass(frozen=True)
class ClassificationScores:
    """Scores of one set of predictions.

    Attributes:
        labels: the fixed label list, L names.
        confusion: (L, L + 1) cells, rows the truth, columns the prediction, the last one anything outside the list.
        values: metric name -> score; AUROC and calibration error only where probabilities were given.
        precision, recall, f1: (L,) scores of each label.
        reliability: confidence against accuracy, where probabilities were given.
    """

    labels: list[str]
    confusion: NDArray[np.int64]
    values: dict[str, float]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]
    reliability: Reliability | None


def classification_scores(
    truth: NDArray[np.str_],
    predicted: NDArray[np.str_],
    labels: list[str],
    probabilities: NDArray[np.float64] | None = None,
) -> ClassificationScores:
    """Score predicted labels (n,) against true ones (n,) over a fixed label list of L names.

    Args:
        probabilities: (n, L) in the order of `labels`; mass on labels outside the list is simply absent.

    Raises ScfmError for no cells, true labels outside the list, or probabilities of the wrong shape.
    """
    truth, predicted = np.asarray(truth, dtype=str), np.asarray(predicted, dtype=str)
    if not len(truth):
        raise ScfmError("no cells to score")
    n_labels = len(labels)
    codes = confusion_codes(truth, predicted, labels)
    confusion = np.bincount(codes, minlength=n_labels * (n_labels + 1)).reshape(n_labels, n_labels + 1)
    values = {name: float(score(confusion)) for name, score in FROM_CONFUSION.items()}
    calibration = None
    if probabilities is not None:
        if probabilities.shape != (len(truth), n_labels):
            raise ScfmError(f"probabilities are {probabilities.shape}, expected ({len(truth)}, {n_labels})")
        calibration = reliability(probabilities.max(1), truth == predicted)
        values["auroc"] = auroc(truth, probabilities, labels)
        values["calibration_error"] = calibration.error
    return ClassificationScores(
        labels, confusion, values, precision(confusion), recall(confusion), f1(confusion), calibration
    )
