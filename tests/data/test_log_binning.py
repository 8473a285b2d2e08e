"""Normalised cells that `data.values: log2` can read, and those that it cannot."""

from __future__ import annotations

import numpy as np
import pytest
from tokenised import N_GENES, VOCABULARY, store_of

from scfm.data.loader import PackLoader
from scfm.data.log_binning import check_logarithms
from scfm.data.order import CellOrder
from scfm.data.tokens import TokenConfig, Tokeniser
from scfm.errors import ScfmError


@pytest.fixture(scope="module")
def per_ten_thousand() -> np.ndarray:
    counts = np.random.default_rng(0).poisson(1.0, (300, N_GENES)).astype(np.float64)
    counts[7] = 0
    counts[8] = np.eye(N_GENES)[3]  # all of its counts are of one gene: the highest value there is
    return 1e4 * counts / np.maximum(counts.sum(1, keepdims=True), 1)


def test_logarithms_to_base_2_are_read(per_ten_thousand: np.ndarray) -> None:
    check_logarithms(store_of(np.log2(1 + per_ten_thousand).astype(np.float32)))
    check_logarithms(store_of(np.log2(1 + per_ten_thousand[:, :40]).astype(np.float32)))  # a part of the genes


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (lambda values: np.log1p(values), "these cells hold natural logarithms"),
        (lambda values: values, r"end at 13\.3; these cells hold \d+"),
        (lambda values: np.log2(1 + 100 * values), r"end at 13\.3; these cells hold 1\d\."),
    ],
    ids=["natural", "none", "per-million"],
)
def test_other_values_are_refused(per_ten_thousand: np.ndarray, scale: object, message: str) -> None:
    store = store_of(scale(per_ten_thousand).astype(np.float32))  # type: ignore[operator]
    tokeniser = Tokeniser(TokenConfig(values="log2"), VOCABULARY, store.value_kind)
    with pytest.raises(ScfmError, match=message):
        PackLoader(store, CellOrder(range(300), 10, seed=0), tokeniser, tokens_per_pack=4000)


def test_counts_and_no_cells_need_no_check(per_ten_thousand: np.ndarray) -> None:
    check_logarithms(store_of(np.ceil(per_ten_thousand).astype(np.uint16)))
    check_logarithms(store_of(per_ten_thousand[:0].astype(np.float32)))
