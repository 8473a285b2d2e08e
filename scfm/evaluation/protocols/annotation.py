"""Annotation: predict the type of held-out cells from labelled training cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from scfm.baselines import OBLIGATORY, KNNOnPCA
from scfm.errors import ScfmError
from scfm.evaluation import plots
from scfm.evaluation.controls import NearestIn, Oracle, ShuffledLabels, SplitHalf, noise, random_weights
from scfm.evaluation.metrics import (
    FROM_CONFUSION,
    ClassificationScores,
    classification_scores,
    confusion_codes,
    reliability,
)
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
from scfm.evaluation.verdict import capitalised
from scfm.model.novelty import UNASSIGNED

if TYPE_CHECKING:
    import anndata

    from scfm.evaluation.harness import Comparison, Run


class Annotator(Method, Protocol):
    """What learns labels from cells and predicts them: a foundation model, a baseline, your own classifier.

    `fit` starts afresh each time it is called. After it, `classes` names the columns of the probabilities.
    """

    classes: list[str]

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


class Annotation(EvaluationProtocol):
    """Fitted on the training cells and their labels, judged by the labels of the held-out cells."""

    name = "annotation"
    question = "which type a held-out cell has, learned from labelled training cells"
    metrics = ("macro_f1", "accuracy", "macro_precision", "macro_recall", "auroc", "calibration_error")
    headline = ("macro_f1", "accuracy")
    terminal = ("macro_f1", "accuracy", "auroc")
    main = "macro_f1"
    settings: ClassVar[tuple[str, ...]] = ("full", "probe", "zero_shot", "lora", "scratch")

    def baselines(self) -> Sequence[Method]:
        return [baseline() for baseline in OBLIGATORY[self.name]]

    def controls(self, cells: LabelledCells) -> Sequence[tuple[Method, Kind]]:
        known = dict(zip(cells.adata.obs_names, cells.truth.tolist(), strict=True))
        return [
            (
                NearestIn("noise embedding", "independent random numbers in place of an embedding", noise),
                "negative control",
            ),
            (ShuffledLabels(), "negative control"),
            (SplitHalf(known), "positive control"),
            (Oracle(known), "positive control"),
        ]

    def model(self, given: ModelInput) -> Method:
        from scfm.evaluation.methods import annotation_method

        return annotation_method(given.name, given.path, given.runs, given.setting or self.settings[0], given.sections)

    def untrained(self, given: ModelInput) -> Method:
        what = "the same network with random weights, never trained"
        return NearestIn(given.name, what, random_weights(given.path))

    def run(
        self,
        method: Any,
        cells: LabelledCells,
        split: Split,
        labels: list[str],
        clock: Callable[[Step], AbstractContextManager[None]],
        shown: bool,
    ) -> Outcome:
        train, test = cells.adata[split.train].copy(), cells.without_labels(split.test)
        with clock("fit"):
            method.fit(train, cells.label, split.seed)
        with clock("predict"):
            predicted, probabilities = method.predict(test)
        predicted = np.asarray(predicted, dtype=str)
        scores = self.scored(method, cells.truth[split.test], predicted, probabilities, labels)
        embedding = None
        if shown and isinstance(method, Embeds):
            embedding = np.concatenate([method.embed(cells.without_labels(split.train)), method.embed(test)])
        return Outcome(scores, predicted, embedding)

    def scored(
        self,
        method: Any,
        truth: NDArray[np.str_],
        predicted: NDArray[np.str_],
        probabilities: NDArray,
        labels: list[str],
    ) -> ClassificationScores:
        """Score labels (n,) and probabilities (n, classes of the method) of held-out cells, over the label list.

        Confidence is the top probability of all the method's classes: one that calls a cell something outside the list
        was sure of that.
        """
        aligned = in_order(probabilities, method.classes, labels, len(truth))
        scores = classification_scores(truth, predicted, labels, aligned)
        # means are over the types with a held-out cell in this split: the truth itself would not score 1 on others
        here = held_out_types(truth, labels)
        columns = [labels.index(name) for name in here]
        values = classification_scores(truth, predicted, here, aligned[:, columns]).values
        calibration = reliability(np.asarray(probabilities, np.float64).max(1), predicted == truth)
        return replace(scores, reliability=calibration, values=values | {"calibration_error": calibration.error})

    def resampled(self, comparison: Comparison, run: Run, metric: str) -> Resampled | None:
        from scipy.sparse import csr_matrix

        if metric not in FROM_CONFUSION:
            return None
        truth = comparison.truth[comparison.splits[run.split].test]
        labels = held_out_types(truth, comparison.labels)
        codes = confusion_codes(truth, run.predicted, labels)
        n, n_labels = len(codes), len(labels)
        places = csr_matrix((np.ones(n), (np.arange(n), codes)), shape=(n, n_labels * (n_labels + 1)))
        score = FROM_CONFUSION[metric]
        return lambda weights: score((weights @ places).reshape(-1, n_labels, n_labels + 1))

    def figures(self, comparison: Comparison) -> list[Figure]:
        model, baseline = (comparison.best(self.main, kind) for kind in ("model", "baseline"))
        pair = [name for name in (model, baseline) if name is not None]
        n_seeds = len(comparison.splits)
        over = f"all {n_seeds} splits" if n_seeds > 1 else "the split"
        found = comparison.embeddings()
        drawn = []
        if panels := {name: found[name] for name in comparison.ranked("model") if name in found}:
            split = comparison.splits[0]
            panels = {f"{name}, cell embedding": one for name, one in list(distinct(panels).items())[:2]}
            panels |= {"PCA of log expression": found[KNNOnPCA.name]} if KNNOnPCA.name in found else {}
            drawn.append(
                Figure(
                    plots.umap_pair(panels, comparison.truth[[*split.train, *split.test]], len(split.train)),
                    "Cell embeddings",
                    f"UMAP of the first split: training cells pale, {len(split.test):,} held-out cells on top. Below "
                    "each panel, measured in the embedding and not in the picture: the mean share of a held-out cell's "
                    "10 nearest training cells that have its type. PCA never saw a label; a fine-tuned embedding did.",
                )
            )
        return [
            *drawn,
            Figure(
                plots.per_class_f1(comparison),
                "F1 by type",
                "Commonest type first, held-out cells in brackets; mean over seeds, lines span the seeds.",
            ),
            Figure(
                plots.confusion(comparison, pair),
                "Confusion",
                f"Held-out cells of {over}; shade is the share of the true type, numbers are cells.",
            ),
            Figure(
                plots.calibration(comparison, pair),
                "Calibration",
                f"Held-out cells of {over}, binned by the probability of the predicted label; dots grow with the cells "
                "in the bin, bars are 95% intervals; on the dashed line a method is as often right as it says.",
            ),
            *([self.learning_curve(comparison)] if comparison.curve else []),
        ]

    def learning_curve(self, comparison: Comparison) -> Figure:
        """Draw how scores rise with the number of labelled cells."""
        return Figure(
            plots.learning_curve(comparison, self.headline),
            "Learning curve",
            "Training cells of each type cut to a few, the same held-out cells throughout; mean over seeds, bars span "
            "the standard deviation; on the right all training cells.",
        )

    def caveats(self, comparison: Comparison) -> list[str]:
        said = []
        if comparison.excluded:
            missing = ", ".join(comparison.excluded)
            if len({split.test.tobytes() for split in comparison.splits}) == 1:
                said.append(f"Not scored, because the test set has no such cell, only the training cells: {missing}.")
            else:
                said.append(f"Not scored, because never held out: {missing}.")
        rare = [name for name, n in zip(comparison.labels, comparison.support, strict=True) if n < 20]
        if rare:
            said.append(f"Fewer than 20 cells in all, so their F1 moves in large steps: {', '.join(rare)}.")
        for name in comparison.names("model", "baseline"):
            runs = comparison.runs_of(name)
            outside = sum(int(run.scores.confusion[:, -1].sum()) for run in runs)
            unassigned = 0
            if UNASSIGNED not in comparison.labels:
                unassigned = sum(int((run.predicted == UNASSIGNED).sum()) for run in runs)
            if unassigned:
                said.append(f"{capitalised(name)} left {unassigned:,} cells {UNASSIGNED}; they count as errors.")
            if outside > unassigned:
                said.append(
                    f"{capitalised(name)} gave {outside - unassigned:,} cells a label outside the list; they count as "
                    "errors."
                )
        return said


def distinct(embeddings: dict[str, NDArray]) -> dict[str, NDArray]:
    """Return each embedding once: settings that leave a model as it is share one."""
    kept: dict[str, NDArray] = {}
    for name, embedding in embeddings.items():
        if not any(np.array_equal(embedding, one) for one in kept.values()):
            kept[name] = embedding
    return kept


def held_out_types(truth: NDArray[np.str_], labels: list[str]) -> list[str]:
    """Return those of the label list that are the type of some held-out cell."""
    there = set(truth.tolist())
    return [name for name in labels if name in there]


def in_order(probabilities: NDArray, classes: list[str], labels: list[str], n: int) -> NDArray[np.float64]:
    """Return probabilities (n, L) in the order of the label list; a type that the method does not know gets 0.

    Raises ScfmError for probabilities of another shape than (n, classes).
    """
    if probabilities.shape != (n, len(classes)):
        raise ScfmError(f"probabilities are {probabilities.shape}, expected ({n}, {len(classes)}): cells, classes")
    aligned = np.zeros((n, len(labels)))
    for k, name in enumerate(labels):
        if name in classes:
            aligned[:, k] = probabilities[:, classes.index(name)]
    return aligned
