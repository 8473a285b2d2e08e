"""Lists of changed genes where they are easy to get wrong: no change, no cells, no significant gene."""

from __future__ import annotations

import numpy as np
import pytest

from scfm.errors import ScfmError
from scfm.evaluation.metrics import differential_expression as de


@pytest.fixture
def control() -> np.ndarray:
    cells = np.random.default_rng(0).gamma(2, 1, (60, 6))
    cells[:, 4:] = 0  # two genes that control cells lack
    return cells


@pytest.fixture
def perturbed(control: np.ndarray) -> np.ndarray:
    cells = np.random.default_rng(1).gamma(2, 1, (40, 6)) + np.array([4, -1, 0, 0, 1, 0])
    cells[:, 5] = 0
    return np.maximum(cells, 0)


def test_changes_have_a_sign_and_an_order(control: np.ndarray, perturbed: np.ndarray) -> None:
    changes = de.gene_changes(perturbed, control)
    assert changes.significant.tolist() == [True, True, False, False, True, False]
    assert changes.order.tolist() == [4, 0, 1], "a gene that control cells lack changes infinitely"
    assert np.isinf(changes.log2_fold_change[4])
    assert changes.log2_fold_change[1] < 0
    assert (changes.fdr[5], changes.log2_fold_change[5]) == (1, 0), "in no cell: no test and no change"
    assert de.not_dropped_out(perturbed, control).all()
    assert de.not_dropped_out(control, perturbed).tolist() == [True] * 4 + [False, True]
    assert set(de.welch_order(perturbed, control)[:2]) == {0, 4}


def test_a_perfect_and_a_reversed_prediction(control: np.ndarray, perturbed: np.ndarray) -> None:
    truth = de.gene_changes(perturbed, control)
    assert de.overlap(truth, truth) == de.precision(truth, truth, 2) == de.recall(truth, truth) == 1
    assert de.direction_match(truth, truth) == 1
    assert de.recovery(truth, truth)["auroc"] == 1
    reverse = de.GeneChanges(1 - truth.fdr, -truth.log2_fold_change)
    assert de.direction_match(truth, reverse) == 0
    assert de.recovery(truth, reverse)["auroc"] == 0
    assert de.overlap(truth, reverse) == 0


def test_without_a_changed_gene_there_is_nothing_to_score(control: np.ndarray, perturbed: np.ndarray) -> None:
    nothing = de.gene_changes(control[:30], control[30:])
    assert not nothing.significant.any()
    changed = de.gene_changes(perturbed, control)
    assert de.overlap(nothing, changed) == de.precision(changed, nothing) == 0
    for score in (de.recall, de.direction_match, de.fold_change_correlation):
        assert np.isnan(score(nothing, changed))
    assert all(np.isnan(value) for value in de.recovery(nothing, changed).values())


def test_what_cannot_be_tested_is_refused(control: np.ndarray) -> None:
    with pytest.raises(ScfmError, match="same genes"):
        de.gene_changes(control[:, :3], control)
    with pytest.raises(ScfmError, match="1 cells against 60"):
        de.welch_order(control[:1], control)
