"""The interval of a difference has the right width, and overlapping test sets do not make it narrower."""

from __future__ import annotations

import numpy as np
import pytest

from scfm.evaluation.bootstrap import paired_bootstrap
from scfm.evaluation.metrics import FROM_CONFUSION, confusion_codes

LABELS = ["A", "B"]
N = 400


def predictions(error_rate: float, seed: int) -> np.ndarray:
    """Codes of a method on N cells, half of them B, wrong at random."""
    truth = np.repeat(LABELS, N // 2)
    wrong = np.random.default_rng(seed).random(N) < error_rate
    return confusion_codes(truth, np.where(wrong, np.where(truth == "A", "B", "A"), truth), LABELS)


def accuracies(codes: np.ndarray) -> np.ndarray:
    return np.isin(codes, [0, 4]).astype(float)  # the diagonal of the flat (2, 3) matrix


def test_the_interval_of_accuracy_has_the_width_that_theory_gives() -> None:
    a, b = predictions(0.1, seed=1), predictions(0.2, seed=2)
    found = paired_bootstrap([a], [b], [np.arange(N)], 2, FROM_CONFUSION["accuracy"], n_resamples=4000)
    paired = accuracies(a) - accuracies(b)
    assert found.difference == pytest.approx(paired.mean())
    expected = 2 * 1.96 * paired.std() / np.sqrt(N)
    assert found.high - found.low == pytest.approx(expected, rel=0.06)
    assert found.low < found.difference < found.high
    assert found.units == N


def test_the_same_cells_in_three_splits_are_not_three_times_the_evidence() -> None:
    a, b, cells = predictions(0.1, seed=1), predictions(0.2, seed=2), np.arange(N)
    once = paired_bootstrap([a], [b], [cells], 2, FROM_CONFUSION["macro_f1"])
    thrice = paired_bootstrap([a] * 3, [b] * 3, [cells] * 3, 2, FROM_CONFUSION["macro_f1"])
    assert (thrice.difference, thrice.low, thrice.high) == pytest.approx((once.difference, once.low, once.high))


def test_different_cells_in_two_splits_are_more_evidence() -> None:
    a, b, cells = predictions(0.1, seed=1), predictions(0.2, seed=2), np.arange(N)
    once = paired_bootstrap([a], [b], [cells], 2, FROM_CONFUSION["accuracy"])
    twice = paired_bootstrap([a, a], [b, b], [cells, cells + N], 2, FROM_CONFUSION["accuracy"])
    assert (twice.high - twice.low) / (once.high - once.low) == pytest.approx(1 / np.sqrt(2), rel=0.1)


def test_units_that_fail_together_widen_the_interval() -> None:
    donors = np.tile(np.arange(8), N // 8)
    truth = np.repeat(LABELS, N // 2)
    a = confusion_codes(truth, truth, LABELS)
    b = confusion_codes(truth, np.where(donors == 0, "A", truth), LABELS)  # one donor goes wrong
    by_cell = paired_bootstrap([a], [b], [np.arange(N)], 2, FROM_CONFUSION["accuracy"])
    by_donor = paired_bootstrap([a], [b], [donors], 2, FROM_CONFUSION["accuracy"])
    assert by_donor.units == 8
    assert by_donor.high - by_donor.low > 2 * (by_cell.high - by_cell.low)


def test_within_strata_a_rare_type_never_drops_out() -> None:
    truth = np.array(["A"] * 50 + ["B"])
    right, wrong = confusion_codes(truth, truth, LABELS), confusion_codes(truth, ["A"] * 51, LABELS)
    recall = FROM_CONFUSION["macro_recall"]
    within = paired_bootstrap([right], [wrong], [np.arange(51)], 2, recall, strata=[truth])
    assert (within.low, within.high) == (0.5, 0.5)
    # without strata the only cell of type B is often not drawn, and then both methods score nothing on it
    assert paired_bootstrap([right], [wrong], [np.arange(51)], 2, recall).low == 0


def test_a_method_against_itself_differs_by_nothing() -> None:
    a = predictions(0.3, seed=1)
    found = paired_bootstrap([a], [a], [np.arange(N)], 2, FROM_CONFUSION["macro_f1"])
    assert (found.difference, found.low, found.high) == (0, 0, 0)
