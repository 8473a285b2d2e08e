"""Cells and methods that the tests of the harness share."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from scfm.baselines import BalancedLogisticRegression, KNNOnPCA, MajorityClass
from scfm.baselines.inputs import read_labels
from scfm.evaluation.harness import Comparison, Run, compare
from scfm.evaluation.protocols.annotation import Annotation
from scfm.evaluation.splits import stratified_split


class FewBaselines(Annotation):
    """Annotation with the baselines that cost nothing: those of the task are asked for once, in a test of their own."""

    def baselines(self) -> list[Any]:
        return [MajorityClass(), KNNOnPCA(), BalancedLogisticRegression()]


def three_types(cells: int = 150, noise: float = 8.0) -> anndata.AnnData:
    """Counts of 12 genes; each type expresses one of the first three more strongly, the noisier the harder to tell."""
    rng = np.random.default_rng(0)
    types = np.array(["B", "NK", "T"])
    kind = np.repeat([0, 1, 2], [cells // 2, cells // 3, cells - cells // 2 - cells // 3])
    counts = rng.poisson(noise, (cells, 12))
    counts[np.arange(cells), kind] += rng.poisson(6, cells)
    obs = pd.DataFrame({"type": pd.Categorical(types[kind])}, index=[f"cell{k}" for k in range(cells)])
    return anndata.AnnData(csr_matrix(counts.astype(np.float32)), obs=obs)


class Oracle:
    """Knows every cell's label by its name, but is wrong about a share of the cells."""

    def __init__(self, adata: anndata.AnnData, wrong: float = 0.0, name: str = "oracle") -> None:
        self.name = name
        self.known = dict(zip(adata.obs_names, read_labels(adata, "type"), strict=True))
        mistaken = np.random.default_rng(1).random(adata.n_obs) < wrong
        self.mistaken = set(adata.obs_names[mistaken])
        self.classes = sorted(set(self.known.values()))
        self.training_hashes: NDArray[np.uint64] | None = None
        self.seen: list[tuple[int, int, list[str]]] = []

    def describe(self) -> str:
        return "looks the label up"

    def fit(self, adata: anndata.AnnData, label: str, seed: int) -> None:
        self.seed, self.n_train = seed, adata.n_obs

    def predict(self, adata: anndata.AnnData) -> tuple[Any, Any]:
        self.seen.append((self.seed, self.n_train, list(adata.obs.columns)))
        wrong = {name: self.classes[(k + 1) % len(self.classes)] for k, name in enumerate(self.classes)}
        labels = [wrong[self.known[name]] if name in self.mistaken else self.known[name] for name in adata.obs_names]
        probabilities = np.array([[float(name == label) for name in self.classes] for label in labels])
        return np.array(labels), probabilities


@cache
def compared(wrong: float = 0.0, seeds: int = 3, name: str = "oracle", **options: Any) -> Comparison:
    """Compare an oracle with a few baselines; the same comparison where it was made before."""
    adata = three_types()
    splits = [stratified_split(read_labels(adata, "type"), 0.3, seed) for seed in range(seeds)]
    return compare([Oracle(adata, wrong, name)], adata, "type", splits, task=FewBaselines(), **options)


def with_confusion(run: Run, confusion: NDArray[np.int64]) -> Run:
    """Return a run whose predictions were these."""
    assert run.outcome is not None
    return replace(run, outcome=replace(run.outcome, scores=replace(run.scores, confusion=confusion)))
