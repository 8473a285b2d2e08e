"""Embedding scores depend on what they should and on nothing else: names, rotation, order, dtype of the batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scfm.errors import ScfmError
from scfm.evaluation.metrics import EMBEDDING, METRICS, S_BATCH, S_BIO, embedding_scores
from scfm.evaluation.metrics import neighbours as nn
from scfm.evaluation.metrics import silhouette as sil
from scfm.evaluation.metrics.embedding import S_FINAL, principal_component_regression
from scfm.evaluation.splits import grouped_split

seeds = st.integers(0, 2**16)


def drawn(seed: int, n: int = 60) -> tuple[NDArray, NDArray, NDArray]:
    rng = np.random.default_rng(seed)
    labels, batches = rng.integers(0, 3, n), rng.integers(0, 3, n)
    return rng.normal(size=(n, 4)) + 2 * np.eye(4)[labels] + np.eye(4)[batches], labels, batches


def geometry(x: NDArray, labels: NDArray, batches: NDArray) -> dict[str, float]:
    """The scores that hold no random step."""
    labels, batches = labels.astype(str), batches.astype(str)
    distances, rows = nn.nearest(x, 14)
    euclidean, cosine = (sil.group_distances(x, labels, batches, metric) for metric in ("euclidean", "cosine"))
    return {
        "asw_label": sil.asw_label(euclidean),
        "asw_batch": sil.batch_mixing(euclidean, "nearest"),
        "bras": sil.batch_mixing(cosine, "mean_other"),
        "pcr": principal_component_regression(x, batches),
        "graph_connectivity": nn.graph_connectivity(nn.fuzzy_graph(distances, rows), labels),
        "ilisi": nn.ilisi(distances, rows, batches),
        "clisi": nn.clisi(distances, rows, labels),
    }


@given(seeds)
@settings(max_examples=15, deadline=None)
def test_rotation_scale_order_and_names_change_nothing(seed: int) -> None:
    x, labels, batches = drawn(seed)
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    order, renamed = rng.permutation(len(x)), rng.permutation(3)
    wanted = pytest.approx(geometry(x, labels, batches), abs=1e-7)
    assert geometry(x @ rotation * 7.5, labels, batches) == wanted
    assert geometry(x[order], labels[order], batches[order]) == wanted
    assert geometry(x, renamed[labels], renamed[batches]) == wanted


@given(seeds)
@settings(max_examples=15, deadline=None)
def test_silhouettes_equal_scikit_learn(seed: int) -> None:
    from sklearn.metrics import silhouette_samples

    x, labels, batches = drawn(seed)
    groups = sil.group_distances(x, labels.astype(str), batches.astype(str), "euclidean")
    np.testing.assert_allclose(sil.label_silhouette(groups), silhouette_samples(x, labels), atol=1e-7)
    by_type = [1 - np.abs(silhouette_samples(x[labels == t], batches[labels == t])).mean() for t in np.unique(labels)]
    assert sil.batch_mixing(groups, "nearest") == pytest.approx(np.mean(by_type), abs=1e-7)


@pytest.fixture(scope="module")
def scores() -> dict[str, float]:
    x, labels, batches = drawn(0, 120)
    return embedding_scores(x, labels, batches, before=x)


def test_an_integer_batch_is_a_category(scores: dict[str, float]) -> None:
    x, labels, batches = drawn(0, 120)
    named = np.array(["spring", "autumn", "2"])[batches]
    assert embedding_scores(x, labels, named, before=x) == pytest.approx(scores, nan_ok=True)
    # what reading it as a number would give: a slope instead of means
    assert np.corrcoef(x[:, 1], batches)[0, 1] ** 2 < principal_component_regression(x[:, [1]], batches.astype(str)) / 2


def test_sums_are_of_the_members_they_name(scores: dict[str, float]) -> None:
    assert scores["s_bio"] == pytest.approx(np.mean([scores[name] for name in S_BIO]))
    assert scores["s_batch"] == pytest.approx(np.mean([scores[name] for name in S_BATCH]))
    assert scores["s_final"] == pytest.approx(0.6 * scores["s_bio"] + 0.4 * scores["s_batch"])
    assert S_FINAL == {"s_bio": 0.6, "s_batch": 0.4}
    assert all(name in EMBEDDING["s_bio"].protocol for name in S_BIO)
    assert all(name in EMBEDDING["s_batch"].protocol for name in S_BATCH)
    assert set(scores) <= set(METRICS)


def test_types_in_every_batch_are_not_isolated(scores: dict[str, float]) -> None:
    assert np.isnan(scores["isolated_label_asw"])
    assert np.isnan(scores["isolated_label_f1"])


def test_duplicate_cells_and_one_cell_types() -> None:
    x = np.repeat(np.eye(3), 10, axis=0)
    labels = np.repeat(["a", "b", "c"], 10)
    labels[0] = "lonely"
    batches = np.tile(["x", "y"], 15)
    found = embedding_scores(x, labels, batches, before=x)
    assert all(np.isfinite(value) for name, value in found.items() if name != "pcr_comparison" and name[:2] != "s_")


@given(seeds, st.integers(2, 6))
@settings(max_examples=25, deadline=None)
def test_a_sample_keeps_every_group(seed: int, n_groups: int) -> None:
    groups = np.random.default_rng(seed).integers(0, n_groups, 500) ** 2
    kept = sil.stratified_sample(groups, 100, seed)
    assert len(kept) <= 100 + 2 * n_groups
    assert set(groups[kept]) == set(groups)
    np.testing.assert_array_equal(kept, np.unique(kept))
    np.testing.assert_array_equal(kept, sil.stratified_sample(groups, 100, seed))


def test_bad_input_is_said() -> None:
    x, labels, batches = drawn(0)
    with pytest.raises(ScfmError, match="1 of 60 cells"):
        embedding_scores(np.where(np.arange(60)[:, None] == 3, np.nan, x), labels, batches)
    with pytest.raises(ScfmError, match="59 labels"):
        embedding_scores(x, labels[1:], batches)
    with pytest.raises(ScfmError, match="two types"):
        embedding_scores(x, np.zeros(60), batches)
    with pytest.raises(ScfmError, match="two batches"):
        embedding_scores(x, labels, np.zeros(60))


@given(seeds, st.integers(2, 9), st.floats(0.05, 0.95))
@settings(max_examples=40, deadline=None)
def test_no_group_stands_on_both_sides(seed: int, n_groups: int, fraction: float) -> None:
    groups = np.append(np.arange(n_groups), np.random.default_rng(seed).integers(0, n_groups, 50)).astype(str)
    split = grouped_split(groups, test_fraction=fraction, seed=seed, unit="donor")
    assert not set(groups[split.train]) & set(groups[split.test])
    assert len(split.train) + len(split.test) == len(groups)
    assert split.protocol.startswith("by donor")


def test_named_groups_are_held_out() -> None:
    split = grouped_split(np.array(["a", "b", "a", "c"]), ["a"], unit="study")
    assert split.test.tolist() == [0, 2]
    with pytest.raises(ScfmError, match="no cell of study z"):
        grouped_split(np.array(["a", "b"]), ["z"], unit="study")
    with pytest.raises(ScfmError, match="needs two"):
        grouped_split(np.array(["a", "a"]), unit="batch")
