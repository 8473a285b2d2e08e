"""The sparse arithmetic of the parameter-free pipelines equals scipy's and scikit-learn's on dense matrices."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from scipy.stats import norm, rankdata

from scfm.baselines import ParameterFree, principal_components
from scfm.baselines.parameter_free import anova_f
from scfm.baselines.rank_scores import ShiftedRows, rank_scores
from scfm.errors import ScfmError


@pytest.fixture(scope="module")
def counts() -> csr_matrix:
    """90 cells of 60 genes, some never seen, with every cell's zeros and ties."""
    rng = np.random.default_rng(0)
    values = rng.poisson(rng.gamma(0.5, 2.0, 60), (90, 60)).astype(float)
    values[:30, :5] += rng.poisson(4, (30, 5))
    values[:, 7] = 0
    return csr_matrix(values)


LABELS = np.repeat(["A", "B", "C"], 30)


def test_scores_are_normal_quantiles_of_average_ranks(counts: csr_matrix) -> None:
    expected = norm.ppf(rankdata(counts.toarray(), axis=1) / 61)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = rank_scores(counts)
    np.testing.assert_allclose(found.dense(), expected, atol=1e-13)
    np.testing.assert_allclose(found.lengths(), 1, atol=1e-12)
    assert found.sparse.nnz == counts.nnz


def test_only_the_order_of_values_matters(counts: csr_matrix) -> None:
    np.testing.assert_array_equal(rank_scores(counts).dense(), rank_scores(counts.log1p() * 3).dense())


def test_cells_without_zeros_and_cells_without_counts() -> None:
    found = rank_scores(csr_matrix(np.array([[3.0, 1, 2, 1], [0, 0, 0, 0]]))).dense()
    expected = norm.ppf(np.array([4, 1.5, 3, 1.5]) / 5)
    np.testing.assert_allclose(found[0], expected / np.linalg.norm(expected), atol=1e-14)
    np.testing.assert_array_equal(found[1], 0)


def test_products_and_moments_equal_the_dense_matrix(counts: csr_matrix) -> None:
    rows = ShiftedRows(counts, np.linspace(-5, 5, 90) + 100)
    dense = rows.dense()
    rng = np.random.default_rng(1)
    for shape in ((60,), (60, 3)):
        vectors = rng.standard_normal(shape)
        np.testing.assert_allclose(rows.times(vectors), dense @ vectors)
    for shape in ((90,), (90, 3)):
        vectors = rng.standard_normal(shape)
        np.testing.assert_allclose(rows.transposed_times(vectors), dense.T @ vectors)
    mean, variance = rows.column_moments()
    np.testing.assert_allclose(mean, dense.mean(axis=0))
    np.testing.assert_allclose(variance, dense.var(axis=0))
    np.testing.assert_allclose(rows.column_squares(), (dense**2).sum(axis=0))
    np.testing.assert_allclose(rows.lengths(), np.linalg.norm(dense, axis=1))


def test_f_statistics_equal_scikit_learns(counts: csr_matrix) -> None:
    from sklearn.feature_selection import f_classif

    for cells in (rank_scores(counts), ShiftedRows(counts, np.zeros(90))):
        seen = cells.column_moments()[1] > 1e-20
        np.testing.assert_allclose(anova_f(cells, LABELS)[seen], f_classif(cells.dense()[:, seen], LABELS)[0])
    assert np.isnan(anova_f(ShiftedRows(counts, np.zeros(90)), LABELS)[7])


@pytest.mark.parametrize("route", ["iteration", "dense"])
def test_components_equal_scikit_learns_up_to_sign(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    if route == "iteration":
        monkeypatch.setattr(principal_components, "DENSE_UP_TO", 0)
    rng = np.random.default_rng(2)
    values = rng.standard_normal((90, 8)) @ (rng.standard_normal((8, 60)) * np.geomspace(9, 1, 8)[:, None])
    cells = rank_scores(csr_matrix(np.exp(values + 0.1 * rng.standard_normal((90, 60)))))
    found = principal_components.WhitenedComponents.fit(cells, 5).transform(cells)
    scaled = StandardScaler().fit_transform(cells.dense())
    expected = PCA(5, whiten=True, svd_solver="full").fit_transform(scaled)
    np.testing.assert_allclose(np.abs((found * expected).mean(axis=0)), 89 / 90, rtol=1e-4)
    np.testing.assert_allclose(found.std(axis=0, ddof=1), 1, rtol=1e-4)


def test_directions_of_mere_rounding_are_not_whitened() -> None:
    rng = np.random.default_rng(3)
    twice = rng.poisson(3, (20, 6)).astype(float)
    cells = ShiftedRows(csr_matrix(np.hstack([twice, twice])), np.zeros(20))
    assert principal_components.WhitenedComponents.fit(cells, 12).rotation.shape == (12, 6)


def cells_of(counts: csr_matrix) -> anndata.AnnData:
    return anndata.AnnData(counts, obs=pd.DataFrame({"type": LABELS}, index=map(str, range(90))))


@pytest.mark.parametrize("kind", ["centroid", "pca_lr"])
def test_genes_scaling_and_components_do_not_see_held_out_cells(counts: csr_matrix, kind) -> None:
    adata = cells_of(counts)
    fitted = ParameterFree(kind, "rank", 10, 4).fit(adata[:80], "type")
    alone = fitted.predict(adata[80:82])[1]
    changed = adata.copy()
    changed.X[82:] = changed.X[82:] * 7
    np.testing.assert_array_equal(fitted.predict(changed[80:82])[1], alone)
    np.testing.assert_allclose(fitted.predict(changed[80:])[1][:2], alone, atol=1e-12)


def test_the_genes_of_largest_f_are_kept(counts: csr_matrix) -> None:
    fitted = ParameterFree("pca_lr", "log1p", 5, 3).fit(cells_of(counts), "type")
    expression = fitted.rule.apply(cells_of(counts))
    scores = np.nan_to_num(anova_f(ShiftedRows(expression, np.zeros(90)), LABELS), nan=-1)
    assert scores[fitted.genes].min() >= np.delete(scores, fitted.genes).max()
    assert len(fitted.genes) == 5


def test_a_cell_that_resembles_nothing_has_equal_shares(counts: csr_matrix) -> None:
    fitted = ParameterFree("centroid").fit(cells_of(counts), "type")
    empty = anndata.AnnData(csr_matrix((1, 60)))
    np.testing.assert_array_equal(fitted.project(empty), 0)
    np.testing.assert_allclose(fitted.predict(empty)[1], 1 / 3)


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(ScfmError, match="no parameter-free 'pca' on 'rank'"):
        ParameterFree("pca")  # type: ignore[arg-type]
