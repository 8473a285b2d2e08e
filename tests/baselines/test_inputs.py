"""One rule reads counts and normalised values as log expression; held-out cells are read as training cells were."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from scfm.baselines.inputs import ExpressionRule, read_labels
from scfm.errors import ScfmError


def cells(values: list[list[float]], genes: str = "abc") -> anndata.AnnData:
    return anndata.AnnData(csr_matrix(np.array(values, dtype=np.float64)), var=pd.DataFrame(index=list(genes)))


def test_counts_are_scaled_to_ten_thousand_and_logged() -> None:
    adata = cells([[1, 3, 0], [0, 0, 0]])
    expression = ExpressionRule.learn(adata).apply(adata).toarray()
    np.testing.assert_allclose(expression, [[np.log1p(2500), np.log1p(7500), 0], [0, 0, 0]])


def test_normalised_values_are_used_as_they_are() -> None:
    adata = cells([[0.5, 1.25, 0]])
    rule = ExpressionRule.learn(adata)
    assert rule.value_kind == "normalised"
    np.testing.assert_array_equal(rule.apply(adata).toarray(), [[0.5, 1.25, 0]])


def test_raw_comes_before_scaled_x() -> None:
    adata = cells([[1, 3, 0]])
    adata.raw = adata.copy()
    adata.X = csr_matrix([[-1.0, 2.0, 0.3]])
    assert ExpressionRule.learn(adata).value_kind == "counts"


def test_the_callers_matrix_is_left_alone() -> None:
    adata = cells([[1, 3, 0]])
    before = adata.X.copy()
    ExpressionRule.learn(adata).apply(adata)
    np.testing.assert_array_equal(adata.X.toarray(), before.toarray())


def test_genes_are_brought_into_training_order() -> None:
    rule = ExpressionRule.learn(cells([[0.5, 1.5, 2.5]], genes="abc"))
    np.testing.assert_array_equal(rule.apply(cells([[2.5, 0.5, 1.5]], genes="cab")).toarray(), [[0.5, 1.5, 2.5]])


def test_cells_without_any_count_can_be_predicted_after_normalised_training() -> None:
    rule = ExpressionRule.learn(cells([[0.5, 1.5, 2.5]]))
    assert rule.apply(cells([[0, 0, 0]])).nnz == 0


@pytest.mark.parametrize(
    ("values", "genes", "message"),
    [
        ([[np.nan, 1, 2]], "abc", "NaN"),
        ([[-1, 1, 2]], "abc", "scaled"),
        ([[1, 1, 2]], "aab", "repeat"),
    ],
)
def test_unusable_training_values_are_named(values: list[list[float]], genes: str, message: str) -> None:
    with pytest.raises(ScfmError, match=message):
        ExpressionRule.learn(cells(values, genes))


def test_held_out_cells_must_hold_the_same_genes_and_kind_of_values() -> None:
    rule = ExpressionRule.learn(cells([[0.5, 1.5, 2.5]]))
    with pytest.raises(ScfmError, match=r"1 of 3 training genes .* e\.g\. c"):
        rule.apply(cells([[0.5, 1.5, 2.5]], genes="abx"))
    with pytest.raises(ScfmError, match="held normalised values and these cells do not"):
        rule.apply(cells([[1, 2, 3]]))


def test_missing_labels_are_an_error_that_counts_them() -> None:
    adata = cells([[1, 2, 3], [1, 2, 3]])
    adata.obs["type"] = pd.Categorical(["B", None])
    with pytest.raises(ScfmError, match=r"1 of 2 cells have no value in obs\['type'\]"):
        read_labels(adata, "type")
    with pytest.raises(ScfmError, match="it has type"):
        read_labels(adata, "cell_type")
