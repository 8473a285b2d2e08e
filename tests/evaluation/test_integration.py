"""Integration in the harness: embedders, controls, what a metric cannot tell, and the bootstrap of embedding scores."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from cells import made_up_cells
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from scfm.baselines import HVGPCA
from scfm.errors import ScfmError
from scfm.evaluation import plots
from scfm.evaluation.asked import splits_of
from scfm.evaluation.controls import SplitHalfEmbedding
from scfm.evaluation.embedding_resampling import EmbeddingParts
from scfm.evaluation.harness import Comparison, compare
from scfm.evaluation.metrics import embedding_scores
from scfm.evaluation.metrics.embedding import principal_component_regression
from scfm.evaluation.protocol import LabelledCells
from scfm.evaluation.protocols.integration import Integration
from scfm.evaluation.report import write_report
from scfm.evaluation.verdict import caveats, differences, uninformative


class Without(Integration):
    """Integration with the one baseline that needs nothing installed."""

    def baselines(self) -> list[Any]:
        return [HVGPCA(components=10)]


class Seer:
    """Embeds every type at a place of its own, and keeps what it was given."""

    name = "seer"

    def __init__(self, adata: anndata.AnnData) -> None:
        _, self.code = np.unique(adata.obs["cell_type"].astype(str), return_inverse=True)

    def describe(self) -> str:
        return "knows the types"

    def fit_embed(self, adata: anndata.AnnData, batch: str | None, seed: int) -> NDArray:
        self.given = adata
        return np.eye(3)[self.code] + 0.1 * np.random.default_rng(seed).standard_normal((adata.n_obs, 3))


class Short(Seer):
    name = "short"

    def fit_embed(self, adata: anndata.AnnData, batch: str | None, seed: int) -> NDArray:
        return super().fit_embed(adata, batch, seed)[1:]


def cells_with_donors() -> anndata.AnnData:
    cells = made_up_cells(90)
    cells.obs["donor_id"] = [f"d{k % 5}" for k in range(90)]
    return cells


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    adata = cells_with_donors()
    protocol = Without()
    splits = splits_of(protocol, LabelledCells(adata, "cell_type", "batch"), "random", (), 2)
    methods = [Seer(adata), Short(adata)]
    return compare(methods, adata, "cell_type", splits, task=protocol, batch="batch", donor="donor_id")


def test_an_embedder_gets_all_cells_and_of_obs_the_batch_alone(comparison: Comparison) -> None:
    seer = Seer(comparison.cells.adata)
    cells = comparison.cells
    outcome = Without().run(seer, cells, comparison.splits[0], [], lambda _: nullcontext(), True)
    assert list(seer.given.obs.columns) == ["batch"]
    assert seer.given.n_obs == 90
    assert set(outcome.scores.values) <= {*Integration.metrics, *Integration.further}
    assert list(cells.adata.obs.columns) == ["cell_type", "batch", "donor_id"]


def test_controls_bound_what_the_scores_can_say(comparison: Comparison) -> None:
    of = {
        name: comparison.summary(name, "s_bio").mean
        for name in comparison.ranked("model", "negative control", "positive control")
    }
    assert of["noise embedding"] < 0.4 < 0.9 < of["seer"]
    assert of["shuffled cells"] < 0.4
    assert of["true labels"] > 0.9
    assert of["noise embedding"] < of["split half"] <= of["true labels"]
    # noise mixes batches as well as anything does
    assert comparison.summary("noise embedding", "asw_batch").mean > 0.9


def test_in_the_ceiling_types_stay_as_they_are_and_batches_differ_as_by_chance() -> None:
    adata = made_up_cells(120)
    batches, labels = (adata.obs[name].to_numpy(dtype=str) for name in ("batch", "cell_type"))
    counts = adata.X.toarray()
    counts[batches == "batch1", ::4] += 20
    adata.X = csr_matrix(counts)
    apart = HVGPCA().fit_embed(adata, "batch", 0)
    ceiling = SplitHalfEmbedding(labels).fit_embed(adata, "batch", 0)
    explained = [principal_component_regression(embedding, batches) for embedding in (apart, ceiling)]
    assert explained[0] > 0.1
    assert explained[1] < 0.2 * explained[0]
    for name in np.unique(labels):
        middles = [embedding[labels == name].mean(0) for embedding in (ceiling, apart)]
        np.testing.assert_allclose(*middles, atol=1e-4, rtol=0)


def test_a_score_that_noise_wins_decides_nothing(comparison: Comparison) -> None:
    class Lost(Seer):
        """Mixes batches worse than noise does, and types too."""

        def fit_embed(self, adata: anndata.AnnData, batch: str | None, seed: int) -> NDArray:
            return super().fit_embed(adata, batch, seed) + 9.0 * (adata.obs["batch"] == "batch0").to_numpy()[:, None]

    adata = comparison.cells.adata
    task, splits = Without(), comparison.splits[:1]
    found = compare([Lost(adata)], adata, "cell_type", splits, task=task, batch="batch", donor="donor_id")
    silent = uninformative(found)
    assert "asw_batch" in silent or "bras" in silent
    verdicts = {one.metric: one for one in differences(found)}
    for metric, one in verdicts.items():
        assert (one.outcome == "uninformative") == (metric in silent)


def test_the_bootstrap_scores_equal_the_scores(comparison: Comparison) -> None:
    rng = np.random.default_rng(0)
    labels, batches = rng.choice(["a", "b", "c"], 120), rng.choice(["x", "y"], 120)
    batches[labels == "c"] = "x"
    before = rng.normal(size=(120, 20)) + 3 * (batches == "x")[:, None] * rng.normal(size=20)
    embedding = np.eye(3)[np.unique(labels, return_inverse=True)[1]] + 0.4 * rng.normal(size=(120, 3))
    scores = embedding_scores(embedding, labels, batches, before=before, seed=3)
    parts = EmbeddingParts.of(embedding, labels, batches, before, seed=3)
    once = parts.scores(np.ones((1, 120)))
    for metric in EmbeddingParts.METRICS:
        assert once[metric][0] == pytest.approx(scores[metric], abs=1e-9), metric
    # a cell that is drawn twice is not two cells: resamples scatter around the score, not beside it
    rng = np.random.default_rng(1)
    drawn = np.array([np.bincount(rng.integers(120, size=120), minlength=120) for _ in range(400)], dtype=float)
    again = parts.scores(drawn)
    for metric in ("pcr_comparison", "nmi_leiden", "ari_leiden", "asw_label", "graph_connectivity"):
        assert again[metric].mean() == pytest.approx(scores[metric], abs=0.25 * again[metric].std() + 1e-9), metric
    shuffled = EmbeddingParts.of(rng.permutation(embedding), labels, batches, before, seed=3)
    nothing = shuffled.scores(np.ones((1, 120)))["nmi_leiden"][0]
    assert shuffled.scores(drawn)["nmi_leiden"].mean() == pytest.approx(nothing, rel=0.15)  # twice it if not corrected
    # of a type that no resample draws nothing is known, and nothing is made up
    without_c = parts.scores((labels != "c")[None].astype(float))
    assert all(np.isfinite(without_c[metric]).all() for metric in EmbeddingParts.METRICS)


def test_intervals_are_over_cells_and_donors(comparison: Comparison) -> None:
    of_seer = {one.metric: one for one in differences(comparison)}
    assert set(of_seer) == {"s_bio", "s_batch"}
    assert of_seer["s_bio"].interval.units == 90
    assert of_seer["s_bio"].donors is not None
    assert of_seer["s_bio"].donors.units == 5
    means = [comparison.summary(name, "s_bio").mean for name in ("seer", "HVG + PCA")]
    assert of_seer["s_bio"].interval.difference == pytest.approx(means[0] - means[1], abs=1e-6)
    assert any(note.startswith("Only 5 donors") for note in caveats(comparison))


def test_the_report_says_transductive_and_why_a_method_failed(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "umap_of", lambda embedding: embedding[:, :2])  # whose compilation takes 20 seconds
    page = write_report(comparison, tmp_path, title="Batches").read_text()
    assert "Transductive: every method saw all these cells" in page
    assert "failed: the embedding is (89, 3), expected (90, d)" in page
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["transductive"] is True
    assert [failure["seed"] for failure in found["failures"]] == [0, 1]
    assert found["methods"]["true labels"]["kind"] == "positive control"


def test_a_score_that_is_not_installed_is_said(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Integration, "further", ("clisi", "kbet"))
    assert not any("kBET" in note for note in caveats(comparison))
    monkeypatch.setattr(Integration, "further", ("clisi",))
    assert any("pip install 'scfm[eval]'" in note for note in caveats(comparison))


def test_there_is_nothing_to_hold_out() -> None:
    cells = LabelledCells(cells_with_donors(), "cell_type", "batch")
    with pytest.raises(ScfmError, match="integration is transductive"):
        splits_of(Integration(), cells, "donor", (), 3)
