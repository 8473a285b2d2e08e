"""Run every method on the same splits with the same seeds, the obligatory baselines always among them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from scfm.baselines import OBLIGATORY
from scfm.baselines.inputs import read_labels
from scfm.errors import ScfmError
from scfm.evaluation.leakage import Leakage, count_leakage
from scfm.evaluation.metrics import METRICS, ClassificationScores, classification_scores
from scfm.evaluation.provenance import data_hash
from scfm.evaluation.splits import Split

if TYPE_CHECKING:
    import anndata

Kind = Literal["model", "baseline"]


class Method(Protocol):
    """Anything that learns labels from cells and predicts them: a foundation model, a baseline, your own classifier.

    `fit` starts afresh each time it is called. After it, `classes` names the columns of the probabilities.
    """

    name: str
    classes: list[str]

    def describe(self) -> str:
        """Return what the method does, in one sentence for the report."""
        ...

    def fit(self, adata: anndata.AnnData, label: str, seed: int) -> Any:
        """Learn obs[label] from the training cells."""
        ...

    def predict(self, adata: anndata.AnnData) -> tuple[NDArray, NDArray]:
        """Return labels (n,) and probabilities (n, C) of held-out cells, whose label column is not there."""
        ...


@runtime_checkable
class Embeds(Protocol):
    """A method that also gives cell embeddings."""

    def embed(self, adata: anndata.AnnData) -> NDArray:
        """Return the embedding of each cell, (n, d)."""
        ...


@runtime_checkable
class Pretrained(Protocol):
    """A method that brings along what it saw before it was fitted here."""

    @property
    def training_hashes(self) -> NDArray[np.uint64] | None:
        """The sorted profile hashes of all training cells (`cells.hash`), or None where they are not known."""
        ...


@dataclass(frozen=True)
class Run:
    """One method on one split.

    Attributes:
        predicted: (n_test,) labels, in the order of `split.test`.
        leakage: held-out cells among the training cells, pretraining included; None where those are not known.
        seconds_fit, seconds_predict: wall time.
    """

    method: str
    kind: Kind
    split: int
    seed: int
    predicted: NDArray[np.str_]
    scores: ClassificationScores
    leakage: Leakage | None
    seconds_fit: float
    seconds_predict: float


@dataclass(frozen=True)
class Summary:
    """A score over seeds: its mean and standard deviation (None with a single seed)."""

    mean: float
    sd: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.sd is None else f"{self.mean:.3f} ± {self.sd:.3f}"


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: all a report needs.

    Attributes:
        labels: the fixed label list: every type with a held-out cell in some split.
        support: cells of each listed type in the whole data set.
        excluded: types that are never held out, and so are not scored.
        truth: (N,) label of every cell.
        cell_names: (N,) obs names.
        descriptions: method name -> what it does.
        duplicates: per split, held-out cells whose exact profile is also among the training cells; None without hashes.
        embeddings: method name -> (N_0, d) embeddings of the first split's training cells, then its held-out cells.
    """

    task: str
    label: str
    labels: list[str]
    support: list[int]
    excluded: list[str]
    truth: NDArray[np.str_]
    cell_names: NDArray[np.str_]
    splits: list[Split]
    runs: list[Run]
    kinds: dict[str, Kind]
    descriptions: dict[str, str]
    duplicates: list[Leakage] | None
    data_sha256: str
    embeddings: dict[str, NDArray] = field(default_factory=dict)

    @cached_property
    def split_hashes(self) -> list[str]:
        """The sha256 of each split."""
        return [split.hash(self.cell_names.tolist()) for split in self.splits]

    def runs_of(self, method: str) -> list[Run]:
        """Return a method's runs, one per split."""
        return [run for run in self.runs if run.method == method]

    def names(self, kind: Kind) -> list[str]:
        """Return the names of the models or of the baselines, in the order they ran."""
        return [name for name, its in self.kinds.items() if its == kind]

    def summary(self, method: str, metric: str) -> Summary:
        """Return mean and standard deviation of a score over the splits."""
        values = np.array([run.scores.values[metric] for run in self.runs_of(method)])
        return Summary(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None, len(values))

    def mean_seconds(self, method: str) -> float:
        """Return the wall time to fit and predict, averaged over the splits."""
        return float(np.mean([run.seconds_fit + run.seconds_predict for run in self.runs_of(method)]))

    def best(self, kind: Kind, metric: str) -> str | None:
        """Return the model or baseline with the best mean score, or None where there is none of that kind."""
        sign = 1 if METRICS[metric].higher_is_better else -1
        return max(self.names(kind), key=lambda name: sign * self.summary(name, metric).mean, default=None)

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row per method, seed and metric."""
        return [
            {
                "task": self.task,
                "method": run.method,
                "kind": run.kind,
                "seed": run.seed,
                "split": self.split_hashes[run.split],
                "metric": metric,
                "value": value,
                "seconds_fit": round(run.seconds_fit, 3),
                "seconds_predict": round(run.seconds_predict, 3),
            }
            for run in self.runs
            for metric, value in run.scores.values.items()
        ]


def _aligned(probabilities: NDArray, classes: list[str], labels: list[str], method: str, n: int) -> NDArray[np.float64]:
    """Return probabilities (n, L) in the order of the label list; a type that the method does not know gets 0."""
    if probabilities.shape != (n, len(classes)):
        raise ScfmError(
            f"{method}: probabilities are {probabilities.shape}, expected ({n}, {len(classes)}): cells, classes"
        )
    aligned = np.zeros((n, len(labels)))
    for k, name in enumerate(labels):
        if name in classes:
            aligned[:, k] = probabilities[:, classes.index(name)]
    return aligned


def compare(
    methods: Sequence[Method],
    adata: anndata.AnnData,
    label: str,
    splits: Sequence[Split],
    *,
    task: str = "annotation",
    cell_hashes: NDArray[np.uint64] | None = None,
) -> Comparison:
    """Score methods beside the task's obligatory baselines, all on the same splits with the same seeds.

    Held-out cells are handed to `predict` and `embed` without their labels. Embeddings are taken on the first split.

    Args:
        methods: What is to be judged; the baselines of the task are added here and need not be given.
        label: obs column to predict.
        splits: One per seed, of the rows of `adata`.
        cell_hashes: (N,) profile hash of each row of `adata`; with them overlap with the training cells is counted.

    Raises ScfmError for an unknown task, no split, two methods of one name, missing labels, or a method that knows its
    training cells while `cell_hashes` is absent.
    """
    if task not in OBLIGATORY:
        raise ScfmError(f"no task {task!r}; there is {', '.join(OBLIGATORY)}")
    if not splits:
        raise ScfmError("no split to compare on; draw one per seed with stratified_split")
    baselines: list[Method] = [baseline() for baseline in OBLIGATORY[task]]
    candidates: list[tuple[Method, Kind]] = [(method, "model") for method in methods]
    candidates += [(baseline, "baseline") for baseline in baselines]
    kinds: dict[str, Kind] = {method.name: kind for method, kind in candidates}
    if len(kinds) < len(candidates):
        raise ScfmError(f"method names repeat: {', '.join(method.name for method, _ in candidates)}")
    truth = read_labels(adata, label)
    labels, support = np.unique(truth, return_counts=True)
    held_out = set(truth[np.concatenate([split.test for split in splits])])
    listed = [str(name) for name in labels if name in held_out]

    runs: list[Run] = []
    duplicates: list[Leakage] = []
    embeddings: dict[str, NDArray] = {}
    for k, split in enumerate(splits):
        train, test = adata[split.train].copy(), adata[split.test].copy()
        del test.obs[label]
        if cell_hashes is not None:
            duplicates.append(count_leakage(cell_hashes[split.test], np.sort(cell_hashes[split.train])))
        for method, kind in candidates:
            started = time.perf_counter()
            method.fit(train, label, split.seed)
            fitted = time.perf_counter()
            predicted, probabilities = method.predict(test)
            finished = time.perf_counter()
            leakage = None
            if isinstance(method, Pretrained) and (known := method.training_hashes) is not None:
                if cell_hashes is None:
                    raise ScfmError(f"{method.name} knows its training cells: pass cell_hashes to check for leakage")
                leakage = count_leakage(cell_hashes[split.test], known)
            aligned = _aligned(probabilities, method.classes, listed, method.name, len(split.test))
            predicted = np.asarray(predicted, dtype=str)
            scores = classification_scores(truth[split.test], predicted, listed, aligned)
            seconds = fitted - started, finished - fitted
            runs.append(Run(method.name, kind, k, split.seed, predicted, scores, leakage, *seconds))
            if k == 0 and isinstance(method, Embeds):
                unlabelled = train.copy()
                del unlabelled.obs[label]
                embeddings[method.name] = np.concatenate([method.embed(unlabelled), method.embed(test)])
    return Comparison(
        task=task,
        label=label,
        labels=listed,
        support=[int(n) for name, n in zip(labels, support, strict=True) if name in held_out],
        excluded=[str(name) for name in labels if name not in held_out],
        truth=truth,
        cell_names=adata.obs_names.to_numpy(dtype=str),
        splits=list(splits),
        runs=runs,
        kinds=kinds,
        descriptions={method.name: method.describe() for method, _ in candidates},
        duplicates=duplicates or None,
        data_sha256=data_hash(adata, label),
        embeddings=embeddings,
    )
