"""The interval of a difference has the right width, and overlapping test sets do not make it narrower."""

from __future__ import annotations

import numpy as np
import pytest

from scfm.evaluation.bootstrap import Resampled, paired_bootstrap
from scfm.evaluation.metrics import FROM_CONFUSION, confusion_codes

LABELS = ["A", "B"]
N = 400
CELLS = np.arange(N)


def predictions(error_rate: float, seed: int) -> np.ndarray:
    """Codes of a method on N cells, half of them B, wrong at random."""
    truth = np.repeat(LABELS, N // 2)
    wrong = np.random.default_rng(seed).random(N) < error_rate
    return confusion_codes(truth, np.where(wrong, np.where(truth == "A", "B", "A"), truth), LABELS)


def scored(codes: np.ndarray, metric: str = "accuracy") -> Resampled:
    """The score of predictions by the weights of their cells."""
    places = np.eye(6)[codes]
    return lambda weights: FROM_CONFUSION[metric]((weights @ places).reshape(-1, 2, 3))


def accuracies(codes: np.ndarray) -> np.ndarray:
    return np.isin(codes, [0, 4]).astype(float)  # the diagonal of the flat (2, 3) matrix


def test_the_interval_of_accuracy_has_the_width_that_theory_gives() -> None:
    a, b = predictions(0.1, seed=1), predictions(0.2, seed=2)
    found = paired_bootstrap([scored(a)], [scored(b)], [CELLS], n_resamples=4000)
    paired = accuracies(a) - accuracies(b)
    assert found.difference == pytest.approx(paired.mean())
    expected = 2 * 1.96 * paired.std() / np.sqrt(N)
    assert found.high - found.low == pytest.approx(expected, rel=0.06)
    assert found.low < found.difference < found.high
    assert found.units == N


def test_the_same_cells_in_three_splits_are_not_three_times_the_evidence() -> None:
    a, b = (scored(predictions(rate, seed=1), "macro_f1") for rate in (0.1, 0.2))
    once = paired_bootstrap([a], [b], [CELLS])
    thrice = paired_bootstrap([a] * 3, [b] * 3, [CELLS] * 3)
    assert (thrice.difference, thrice.low, thrice.high) == pytest.approx((once.difference, once.low, once.high))


def test_different_cells_in_two_splits_are_more_evidence() -> None:
    a, b = scored(predictions(0.1, seed=1)), scored(predictions(0.2, seed=2))
    once = paired_bootstrap([a], [b], [CELLS])
    twice = paired_bootstrap([a, a], [b, b], [CELLS, CELLS + N])
    assert (twice.high - twice.low) / (once.high - once.low) == pytest.approx(1 / np.sqrt(2), rel=0.1)


def test_a_donor_that_fails_as_a_whole_widens_the_interval_over_donors() -> None:
    donors = np.tile(np.arange(8), N // 8)
    truth = np.repeat(LABELS, N // 2)
    a = scored(confusion_codes(truth, truth, LABELS))
    b = scored(confusion_codes(truth, np.where(donors == 0, "A", truth), LABELS))  # one donor goes wrong
    by_cell = paired_bootstrap([a], [b], [CELLS])
    by_donor = paired_bootstrap([a], [b], [CELLS], donors=[donors])
    assert (by_cell.units, by_donor.units) == (N, 8)
    assert by_donor.difference == by_cell.difference
    assert by_donor.high - by_donor.low > 2 * (by_cell.high - by_cell.low)
    assert by_donor.low == 0  # a third of all resamples of 8 donors lack the one that went wrong


def test_over_donors_cells_vary_too() -> None:
    """Of a single donor all that is left is the resampling of its cells: the interval over cells."""
    a, b = scored(predictions(0.1, seed=1)), scored(predictions(0.2, seed=2))
    by_cell = paired_bootstrap([a], [b], [CELLS], n_resamples=4000)
    of_one = paired_bootstrap([a], [b], [CELLS], donors=[np.zeros(N)], n_resamples=4000)
    assert of_one.high - of_one.low == pytest.approx(by_cell.high - by_cell.low, rel=0.06)


def test_within_strata_a_rare_type_never_drops_out() -> None:
    truth = np.array(["A"] * 50 + ["B"])
    right, wrong = confusion_codes(truth, truth, LABELS), confusion_codes(truth, ["A"] * 51, LABELS)
    both = [[scored(codes, "macro_recall")] for codes in (right, wrong)]
    within = paired_bootstrap(*both, [np.arange(51)], strata=[truth])
    assert (within.low, within.high) == (0.5, 0.5)
    # without strata the only cell of type B is often not drawn, and then both methods score nothing on it
    assert paired_bootstrap(*both, [np.arange(51)]).low == 0


def test_a_resample_without_a_score_is_left_out() -> None:
    """A score that is not defined in some resamples says nothing there, and must not make the interval NaN."""
    first = np.arange(N) == 0

    def defined_with_the_first_cell(weights: np.ndarray) -> np.ndarray:
        return np.where(weights @ first > 0, weights.mean(1), np.nan)

    found = paired_bootstrap([defined_with_the_first_cell], [lambda weights: weights[:, 0] * 0], [CELLS])
    assert (found.low, found.high) == (1, 1)


def test_a_method_against_itself_differs_by_nothing() -> None:
    a = scored(predictions(0.3, seed=1), "macro_f1")
    found = paired_bootstrap([a], [a], [CELLS])
    assert (found.difference, found.low, found.high) == (0, 0, 0)
