"""The parameter-free pipelines equal scTOP 2.0.3 and the Souza-Mehta pipeline on scikit-learn, as stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from golden_values import stored as stored_values

from scfm.baselines import ParameterFree
from scfm.baselines.inputs import read_labels
from scfm.baselines.rank_scores import rank_scores
from scfm.evaluation.metrics import classification_scores

pytestmark = pytest.mark.golden

SPLITS = {"random80_20_seed0": ("train_idx", "test_idx"), "leave_batch_b2_out": ("lobo_train", "lobo_test")}
NAMES = {"rank_zscore": "rank", "log1p_cp10k": "log1p"}


@pytest.fixture(scope="module")
def cells(shared: Path) -> anndata.AnnData:
    adata = anndata.read_h5ad(shared / "golden/evaluation/integration_small.h5ad")
    adata.X = adata.layers["counts"]
    return adata


@pytest.fixture(scope="module")
def stored(shared: Path) -> dict[str, np.ndarray]:
    with np.load(shared / "golden/evaluation/paramfree.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def expected(shared: Path) -> dict[str, Any]:
    return stored_values(shared, "paramfree")


@pytest.fixture(scope="module")
def profiles(cells: anndata.AnnData) -> ParameterFree:
    return ParameterFree("centroid").fit(cells, "celltype")


def test_the_transform_of_cells(cells: anndata.AnnData, stored: dict[str, np.ndarray]) -> None:
    ours = rank_scores(cells.X[:12]).dense().T
    np.testing.assert_allclose(ours, stored["process_first12cells"], rtol=0, atol=1e-6)


def test_profiles_differ_only_where_single_precision_ties(
    cells: anndata.AnnData, profiles: ParameterFree, stored: dict[str, np.ndarray]
) -> None:
    """The stored profiles rank 1 + mean in float32, where two genes closer than its precision tie or change places."""
    assert profiles.classes == stored["basis_columns"].tolist()
    np.testing.assert_allclose(profiles.profiles.T, stored["basis"], rtol=0, atol=2e-3)
    fractions = cells.X.toarray().astype(np.float64)
    fractions /= fractions.sum(axis=1, keepdims=True)
    labels = read_labels(cells, "celltype")
    for name, our_profile, their_profile in zip(profiles.classes, profiles.profiles, stored["basis"].T, strict=True):
        mean = fractions[labels == name].mean(axis=0)
        seen = np.flatnonzero(mean)
        apart = np.abs(mean[seen, None] - mean[seen]) + np.eye(len(seen))
        distinct = np.setdiff1d(np.arange(len(mean)), seen[apart.min(axis=1) < np.finfo(np.float32).eps])
        assert len(distinct) > 0.9 * len(mean)
        # a tie also changes the length that the whole profile is divided by, so both are brought to one length
        ours, theirs = (
            profile[distinct] / np.linalg.norm(profile[distinct]) for profile in (our_profile, their_profile)
        )
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_projections(cells: anndata.AnnData, profiles: ParameterFree, stored: dict[str, np.ndarray]) -> None:
    """On the stored profiles, near-ties and all, the projections are the stored ones to single precision."""
    scores = rank_scores(cells.X)
    on_stored = scores.times(np.linalg.pinv(stored["basis"].astype(np.float64)).T)
    np.testing.assert_allclose(on_stored.T, stored["projections"], rtol=0, atol=1e-5)
    ours = profiles.project(cells)
    np.testing.assert_allclose(ours.T, stored["projections"], rtol=0, atol=3e-3)
    np.testing.assert_array_equal(ours.argmax(1), stored["projections"].argmax(0))


def scores_of(method: ParameterFree, train: anndata.AnnData, test: anndata.AnnData) -> dict[str, float]:
    predicted, _ = method.fit(train, "celltype").predict(test)
    truth = read_labels(test, "celltype")
    # scikit-learn's macro-F1 is over the labels that occur in the truth or among the predictions
    labels = sorted({*truth, *predicted})
    return classification_scores(truth, predicted, labels).values


def test_in_sample_scores(cells: anndata.AnnData, expected: dict[str, Any]) -> None:
    found = scores_of(ParameterFree("centroid"), cells, cells)
    assert {name: found[name] for name in ("accuracy", "macro_f1")} == pytest.approx(expected["in_sample"], abs=1e-12)


@pytest.mark.parametrize("split", SPLITS)
def test_centroid_on_held_out_cells(
    cells: anndata.AnnData, stored: dict[str, np.ndarray], expected: dict[str, Any], split: str
) -> None:
    train, test = (stored[rows] for rows in SPLITS[split])
    found = scores_of(ParameterFree("centroid"), cells[train], cells[test])
    wanted = expected["sctop_centroid"][split]
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("features", "components"), [(20_000, 220), (100, 20)])
@pytest.mark.parametrize("values", NAMES)
def test_pipeline_on_held_out_cells(
    cells: anndata.AnnData,
    stored: dict[str, np.ndarray],
    expected: dict[str, Any],
    values: str,
    features: int,
    components: int,
    split: str,
) -> None:
    train, test = (stored[rows] for rows in SPLITS[split])
    method = ParameterFree("pca_lr", NAMES[values], features, components)
    found = scores_of(method, cells[train], cells[test])
    wanted = expected["pf_pipeline"][f"{values}|k{features}|pc{components}|{split}"]
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-12)


def test_every_stored_score_is_compared(expected: dict[str, Any]) -> None:
    assert set(expected["sctop_centroid"]) == set(SPLITS)
    named = {f"{v}|k{k}|pc{pc}|{s}" for v in NAMES for k, pc in ((20_000, 220), (100, 20)) for s in SPLITS}
    assert set(expected["pf_pipeline"]) == named
