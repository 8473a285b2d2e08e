"""The baselines learn what they should on real cells, and look at nothing but the training cells."""

from __future__ import annotations

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from scfm.baselines import (
    HVGPCA,
    OBLIGATORY,
    SCVI,
    BalancedLogisticRegression,
    Harmony,
    KNNOnPCA,
    MajorityClass,
    ParameterFree,
    ParameterFreeCentroid,
    ParameterFreePCA,
    SparseLogisticRegression,
)
from scfm.baselines.hvg_pca import highly_variable
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
    [
        (MajorityClass(), 0.34, 0.05),
        (KNNOnPCA(), 0.79, 0.63),
        (BalancedLogisticRegression(), 0.85, 0.72),
        (SparseLogisticRegression(), 0.80, 0.63),
        (ParameterFreeCentroid(), 0.81, 0.70),
        (ParameterFreePCA(), 0.83, 0.69),
        (ParameterFree("pca_lr", "log1p"), 0.83, 0.69),
    ],
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


@pytest.mark.parametrize("baseline", [KNNOnPCA, BalancedLogisticRegression, SparseLogisticRegression, ParameterFreePCA])
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


@pytest.mark.parametrize(
    "baseline", [BalancedLogisticRegression, SparseLogisticRegression, ParameterFreeCentroid, ParameterFreePCA]
)
def test_one_label_is_nothing_to_learn(two_types: anndata.AnnData, baseline) -> None:
    with pytest.raises(ScfmError, match="all 45 training cells have the same value"):
        baseline().fit(two_types[:45], "type")


def test_a_strong_l1_penalty_keeps_the_two_genes_that_tell(two_types: anndata.AnnData) -> None:
    two_types.var_names = list("abcdefgh")
    assert set(SparseLogisticRegression(0.2).fit(two_types, "type").genes) <= {"a", "b"}


@pytest.fixture
def two_batches() -> anndata.AnnData:
    """240 cells of two types in two batches; genes 0 to 4 tell the types, gene 9 the batches, 60 genes in all."""
    rng = np.random.default_rng(1)
    counts = rng.poisson(5, (240, 60))
    types, batches = np.tile(["A", "B"], 120), np.repeat(["x", "y"], 120)
    counts[types == "A", :5] += rng.poisson(20, (120, 5))
    counts[batches == "y", 9] += rng.poisson(60, 120)
    obs = pd.DataFrame({"type": types, "batch": batches}, index=map(str, range(240)))
    return anndata.AnnData(csr_matrix(counts.astype(np.float32)), obs=obs)


def test_variable_genes_are_scanpys(two_batches: anndata.AnnData) -> None:
    import scanpy

    batches = two_batches.obs["batch"].to_numpy(str)
    expression = HVGPCA(None).fit(two_batches).rule.apply(two_batches)
    cells = anndata.AnnData(expression, obs=two_batches.obs)
    for names, key in ((None, None), (batches, "batch")):
        table = scanpy.pp.highly_variable_genes(cells, n_top_genes=12, batch_key=key, inplace=False)
        found = highly_variable(expression, 12, names)
        np.testing.assert_array_equal(found, np.flatnonzero(table["highly_variable"]))
    np.testing.assert_array_equal(highly_variable(expression, 60), np.arange(60))


def test_batches_of_one_cell_have_no_say(two_batches: anndata.AnnData) -> None:
    expression = HVGPCA(None).fit(two_batches).rule.apply(two_batches)
    lone = np.array([*["x"] * 239, "y"])
    np.testing.assert_array_equal(
        highly_variable(expression, 5, lone), highly_variable(expression[:239], 5, lone[:239])
    )
    with pytest.raises(ScfmError, match="each of the 240 cells is a batch of its own"):
        highly_variable(expression, 5, np.arange(240).astype(str))


def batch_gap(embedding: np.ndarray, adata: anndata.AnnData) -> float:
    """Return the distance between batch means over that between type means."""
    batch, kind = (adata.obs["batch"] == "x").to_numpy(), (adata.obs["type"] == "A").to_numpy()
    apart = [np.linalg.norm(embedding[one].mean(0) - embedding[~one].mean(0)) for one in (batch, kind)]
    return apart[0] / apart[1]


def test_harmony_brings_batches_together_and_keeps_types_apart(two_batches: anndata.AnnData) -> None:
    plain, corrected = (method(None, 10).fit_embed(two_batches, "batch", 0) for method in (HVGPCA, Harmony))
    assert plain.shape == corrected.shape == (240, 10)
    assert plain.dtype == corrected.dtype == np.float32
    assert batch_gap(plain, two_batches) > 0.3
    assert batch_gap(corrected, two_batches) < 0.9 * batch_gap(plain, two_batches)
    np.testing.assert_array_equal(Harmony(None, 10).fit_embed(two_batches, "batch", 0), corrected)


def test_harmony_needs_batches(two_batches: anndata.AnnData) -> None:
    with pytest.raises(ScfmError, match="needs the obs column of the batches"):
        Harmony().fit_embed(two_batches, None)
    with pytest.raises(ScfmError, match="all 120 cells have the same value"):
        Harmony().fit_embed(two_batches[:120], "batch")


def test_output_of_another_form_is_refused(two_batches: anndata.AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    import harmonypy

    class Transposed:
        Z_corr = np.zeros((10, 240))

    monkeypatch.setattr(harmonypy, "run_harmony", lambda *_, **__: Transposed())
    with pytest.raises(ScfmError, match=r"returned \(10, 240\) for 240 cells of 10 components"):
        Harmony(None, 10).fit_embed(two_batches, "batch")


def test_scvi_says_how_to_install_it(two_batches: anndata.AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    imported = builtins.__import__

    def without_scvi(name: str, *rest, **named):
        if name == "scvi":
            raise ModuleNotFoundError("No module named 'scvi'", name="scvi")
        return imported(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_scvi)
    with pytest.raises(ScfmError, match=r"pip install 'scfm\[scvi\]'"):
        SCVI().fit_embed(two_batches, "batch")


@pytest.mark.slow
def test_scvi_embeds_where_it_is_installed(two_batches: anndata.AnnData) -> None:
    pytest.importorskip("scvi")
    embedding = SCVI(None, epochs=2).fit_embed(two_batches, "batch", 0)
    assert embedding.shape == (240, 30)
    assert np.isfinite(embedding).all()
