"""Batch integration: one embedding for cells of several batches, types kept apart and batches mixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm.baselines import HVGPCA, OBLIGATORY
from scfm.errors import ScfmError
from scfm.evaluation import plots
from scfm.evaluation.asked import counts_of
from scfm.evaluation.controls import NoiseEmbedding, ShuffledCells, SplitHalfEmbedding, TrueLabels, Untrained
from scfm.evaluation.embedding_resampling import EmbeddingParts
from scfm.evaluation.metrics import EMBEDDING, S_BATCH, S_BIO, embedding_scores
from scfm.evaluation.page import Figure
from scfm.evaluation.protocol import (
    EvaluationProtocol,
    Kind,
    LabelledCells,
    Method,
    ModelInput,
    Outcome,
    Resampled,
    Step,
)
from scfm.evaluation.splits import Split
from scfm.evaluation.trade_off_plot import trade_off

if TYPE_CHECKING:
    from scfm.evaluation.harness import Comparison, Run

SHOWN = 4  # embeddings beside each other
MAIN = ("s_bio", "s_batch", "s_final", *S_BIO, *S_BATCH)


class Embedder(Method, Protocol):
    """What gives cells of several batches one embedding: a foundation model, Harmony, your own method."""

    def fit_embed(self, adata: anndata.AnnData, batch: str | None, seed: int) -> NDArray[np.float32]:
        """Return the embedding (n, d) of all cells: counts in `X`, batches in obs, no labels."""
        ...


@dataclass(frozen=True)
class EmbeddingScores:
    """Scores of an embedding, by metric."""

    values: dict[str, float]


class Integration(EvaluationProtocol):
    """Embed all cells, knowing their batches and not their types; judged by types and batches."""

    name = "integration"
    question = "whether an embedding of cells of several batches keeps types apart and mixes batches"
    transductive = True
    needs_batch = True
    metrics = MAIN
    further: ClassVar[tuple[str, ...]] = tuple(
        name for name in EMBEDDING if name not in MAIN and (name != "kbet" or find_spec("scib_metrics"))
    )
    headline = ("s_bio", "s_batch")
    terminal = ("s_bio", "s_batch", "s_final")
    main = "s_final"
    settings = ("zero_shot", "full", "scratch")

    def __init__(self) -> None:
        self._before: tuple[LabelledCells, NDArray] | None = None
        self._parts: dict[int, tuple[Outcome, EmbeddingParts]] = {}

    def baselines(self) -> Sequence[Method]:
        return [baseline() for baseline in OBLIGATORY[self.name]]

    def controls(self, cells: LabelledCells) -> Sequence[tuple[Method, Kind]]:
        return [
            (NoiseEmbedding(), "negative control"),
            (ShuffledCells(), "negative control"),
            (SplitHalfEmbedding(cells.truth), "positive control"),
            (TrueLabels(cells.truth), "positive control"),
        ]

    def model(self, given: ModelInput) -> Method:
        from scfm.evaluation.embedders import embedder

        return embedder(given)

    def untrained(self, given: ModelInput) -> Method:
        return Untrained(given.path, given.name)

    def before(self, cells: LabelledCells) -> NDArray:
        """Return the principal components of the expression itself, with which PCR is compared; computed once."""
        if self._before is None or self._before[0] is not cells:
            self._before = cells, HVGPCA().fit_embed(unlabelled(cells), cells.batch)
        return self._before[1]

    def run(
        self,
        method: Any,
        cells: LabelledCells,
        split: Split,
        labels: list[str],
        clock: Callable[[Step], AbstractContextManager[None]],
        shown: bool,
    ) -> Outcome:
        given, n = unlabelled(cells), len(cells.truth)
        with clock("fit"):
            embedding = np.asarray(method.fit_embed(given, cells.batch, split.seed))
        if embedding.ndim != 2 or len(embedding) != n:
            raise ScfmError(f"the embedding is {embedding.shape}, expected ({n}, d): cells, dimensions")
        found = embedding_scores(
            embedding,
            cells.truth,
            cells.batches,
            before=self.before(cells),
            seed=split.seed,
            with_kbet="kbet" in self.further,
        )
        return Outcome(EmbeddingScores(found), embedding=embedding)

    def resampled(self, comparison: Comparison, run: Run, metric: str) -> Resampled | None:
        if metric not in EmbeddingParts.METRICS or run.outcome is None or run.outcome.embedding is None:
            return None
        known = self._parts.get(id(run.outcome))
        if known is None:  # the outcome is kept with its parts, so that no other can come to have its id
            cells, embedding = comparison.cells, run.outcome.embedding
            assert cells.batches is not None
            known = run.outcome, EmbeddingParts.of(embedding, cells.truth, cells.batches, self.before(cells), run.seed)
            self._parts[id(run.outcome)] = known
        parts = known[1]
        return lambda weights: parts.scores(weights)[metric]

    def figures(self, comparison: Comparison) -> list[Figure]:
        cells = comparison.cells
        assert cells.batches is not None
        found = comparison.embeddings()
        best = [comparison.best(self.main, "model"), HVGPCA.name, comparison.best(self.main, "baseline")]
        wanted = [name for name in [*best, *comparison.ranked("model", "baseline")] if name in found]
        panels = {name: found[name] for name in list(dict.fromkeys(wanted))[:SHOWN]}
        return [
            Figure(
                trade_off(comparison, "s_batch", "s_bio"),
                "Types kept against batches mixed",
                "Means over seeds; dotted lines join points of equal S_final. Noise mixes batches best of all, and the "
                "true labels show what can be reached: neither axis means anything alone.",
            ),
            Figure(
                plots.umap_rows(panels, {"type": cells.truth, "batch": cells.batches}),
                "Embeddings",
                "UMAP of all cells, first seed; above by type, below by batch, points in random order.",
            ),
        ]

    def caveats(self, comparison: Comparison) -> list[str]:
        batches = comparison.cells.batches
        assert batches is not None
        alone = [name for name in comparison.labels if len(set(batches[comparison.truth == name])) == 1]
        said = [
            "NMI and ARI are of the Leiden resolution that fits the types best, so tuned on the labels, for every "
            "method alike; the k-means scores are not.",
            "Intervals are percentiles over resampled cells; embeddings, clusters and components stay. A cell that is "
            "drawn twice makes no pair with itself (ARI, PCR), and entropies are corrected for it (NMI).",
        ]
        if "kbet" not in self.further:
            said.append("kBET is not among the scores: scib-metrics computes it (pip install 'scfm[eval]').")
        if alone:
            said.append(f"Found in one batch only, so that mixing says nothing of them: {', '.join(alone)}.")
        return said


def unlabelled(cells: LabelledCells) -> anndata.AnnData:
    """Return the cells as embedders get them: counts in X, of obs only the batch."""
    counts = counts_of(cells.adata)
    assert cells.batches is not None
    obs = pd.DataFrame({cells.batch: pd.Categorical(cells.batches)}, index=counts.obs_names)
    return anndata.AnnData(counts.X.copy(), obs=obs, var=counts.var.copy())
