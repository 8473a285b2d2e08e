"""The baselines learn what they should on real cells, and look at nothing but the training cells."""

from __future__ import annotations

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from scfm.baselines import OBLIGATORY, BalancedLogisticRegression, KNNOnPCA, MajorityClass
from scfm.baselines.inputs import read_labels
from scfm.errors import ScfmError
from scfm.evaluation.metrics import classification_scores


@pytest.fixture(scope="module")
def pbmcs() -> anndata.AnnData:
    """700 real PBMCs of ten types, log-normalised in `.raw`, bundled with scanpy."""
    import scanpy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return scanpy.datasets.pbmc68k_reduced()


@pytest.fixture
def two_types() -> anndata.AnnData:
    """60 cells of counts: type A expresses gene 0, type B gene 1; A is three times as common."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(20, (60, 8))
    labels = np.array(["A"] * 45 + ["B"] * 15)
    counts[labels == "A", 0] += 40
    counts[labels == "B", 1] += 40
    return anndata.AnnData(
        csr_matrix(counts.astype(np.float32)), obs=pd.DataFrame({"type": labels}, index=map(str, range(60)))
    )


@pytest.mark.parametrize(
    ("baseline", "accuracy", "macro_f1"),
    [(MajorityClass(), 0.34, 0.05), (KNNOnPCA(), 0.79, 0.63), (BalancedLogisticRegression(), 0.85, 0.72)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_five_fold_scores_on_real_pbmcs(pbmcs: anndata.AnnData, baseline, accuracy: float, macro_f1: float) -> None:
    from sklearn.model_selection import StratifiedKFold

    truth = read_labels(pbmcs, "bulk_labels")
    labels = sorted(set(truth))
    folds = []
    for train, test in StratifiedKFold(5, shuffle=True, random_state=0).split(truth, truth):
        predicted, _ = baseline.fit(pbmcs[train], "bulk_labels").predict(pbmcs[test])
        folds.append(classification_scores(truth[test], predicted, labels).values)
    assert np.mean([fold["accuracy"] for fold in folds]) == pytest.approx(accuracy, abs=0.025)
    assert np.mean([fold["macro_f1"] for fold in folds]) == pytest.approx(macro_f1, abs=0.035)


@pytest.mark.parametrize("baseline", OBLIGATORY["annotation"])
def test_probabilities_follow_classes_and_sum_to_one(two_types: anndata.AnnData, baseline) -> None:
    fitted = baseline().fit(two_types, "type", seed=3)
    predicted, probabilities = fitted.predict(two_types)
    assert fitted.classes == ["A", "B"]
    assert probabilities.shape == (60, 2)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    np.testing.assert_array_equal(predicted, np.array(fitted.classes)[probabilities.argmax(1)])


@pytest.mark.parametrize("baseline", [KNNOnPCA, BalancedLogisticRegression])
def test_separable_types_are_learned_from_counts(two_types: anndata.AnnData, baseline) -> None:
    fitted = baseline().fit(two_types[::2], "type")
    np.testing.assert_array_equal(fitted.predict(two_types[1::2])[0], read_labels(two_types, "type")[1::2])


@pytest.mark.parametrize("baseline", OBLIGATORY["annotation"])
def test_a_cell_is_labelled_the_same_alone_and_in_company(two_types: anndata.AnnData, baseline) -> None:
    fitted = baseline().fit(two_types, "type")
    together = fitted.predict(two_types)[1]
    alone = np.concatenate([fitted.predict(two_types[[row]])[1] for row in range(5)])
    np.testing.assert_allclose(alone, together[:5], atol=1e-9)


def test_majority_gives_training_frequencies(two_types: anndata.AnnData) -> None:
    predicted, probabilities = MajorityClass().fit(two_types, "type").predict(two_types[:3])
    assert predicted.tolist() == ["A", "A", "A"]
    np.testing.assert_array_equal(probabilities, [[0.75, 0.25]] * 3)


def test_components_and_neighbours_are_capped_by_the_training_cells(two_types: anndata.AnnData) -> None:
    fitted = KNNOnPCA(components=50, neighbours=10).fit(two_types[[0, 1, 50]], "type")
    assert fitted.embed(two_types).shape == (60, 2)
    assert fitted.predict(two_types)[1][0] == pytest.approx([2 / 3, 1 / 3])


def test_one_label_is_nothing_to_learn(two_types: anndata.AnnData) -> None:
    with pytest.raises(ScfmError, match="all 45 training cells have the same value"):
        BalancedLogisticRegression().fit(two_types[:45], "type")
