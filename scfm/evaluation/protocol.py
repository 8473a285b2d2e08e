"""What a task says of itself to the harness: inputs, metrics, baselines, controls, figures.

A task is one file in `scfm/evaluation/protocols/` with a class that fills this form, and one line in its `__init__.py`.
The harness does the rest alike for all of them: seeds, time, memory, failures, leakage, intervals, table, json, page.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from scfm.baselines.inputs import read_labels
from scfm.evaluation.splits import Split

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

    from scfm.evaluation.harness import Comparison, Run
    from scfm.evaluation.page import Figure

Kind = Literal["model", "baseline", "negative control", "positive control"]
KINDS: tuple[Kind, ...] = ("model", "baseline", "negative control", "positive control")
Step = Literal["fit", "predict"]
# weights (R, n) of the n held-out cells of a run -> R scores
Resampled = Callable[[NDArray[np.float64]], NDArray[np.float64]]


class Method(Protocol):
    """Anything that is judged. What else it must offer (`fit` and `predict`, `fit_embed` ...), its task says."""

    name: str

    def describe(self) -> str:
        """Return what the method does, in one sentence for the report."""
        ...


class Scores(Protocol):
    """What a task makes of the output of a method: `values` by name of the metric, and whatever its figures need."""

    @property
    def values(self) -> dict[str, float]: ...


@dataclass(frozen=True)
class LabelledCells:
    """The cells that a task is asked on, and the obs columns that say what is known of them.

    Attributes:
        adata: the cells, counts in `raw.X` or `X`.
        label: obs column of the labels.
        batch: obs column of the batches, where the task needs one.
        donor: obs column of the donors; intervals are then given over donors too, unless donors are types.
    """

    adata: AnnData
    label: str
    batch: str | None = None
    donor: str | None = None

    @cached_property
    def truth(self) -> NDArray[np.str_]:
        """(N,) labels."""
        return read_labels(self.adata, self.label)

    @cached_property
    def batches(self) -> NDArray[np.str_] | None:
        """(N,) batches, as names whatever their type: a batch is never a number."""
        return None if self.batch is None else read_labels(self.adata, self.batch)

    @cached_property
    def donors(self) -> NDArray[np.str_] | None:
        """(N,) donors."""
        return None if self.donor is None else read_labels(self.adata, self.donor)

    @cached_property
    def donors_are_types(self) -> bool:
        """Whether donors divide the cells just as the labels do, as cell lines do: other donors are other types."""
        if self.donors is None:
            return False
        pairs = set(zip(self.donors.tolist(), self.truth.tolist(), strict=True))
        return len(pairs) == len(set(self.donors)) == len(set(self.truth))

    def without_labels(self, rows: NDArray[np.int64]) -> AnnData:
        """Return a copy of some cells whose label column is not there."""
        cells = self.adata[rows].copy()
        del cells.obs[self.label]
        return cells


@dataclass(frozen=True)
class Outcome:
    """What a method did on one split.

    Attributes:
        scores: its scores.
        predicted: (n_test,) labels, where the task has such.
        embedding: (n_train + n_test, d) of the training cells, then the held-out ones, where the report shows one.
    """

    scores: Scores
    predicted: NDArray[np.str_] | None = None
    embedding: NDArray | None = None


@dataclass(frozen=True)
class ModelInput:
    """A model directory that is to be judged, and how.

    Attributes:
        path: model directory.
        name: what the tables call it.
        runs: folder for what is fine-tuned.
        setting: how the model is used, one of the settings of the task; None for its default.
        sections: recipe sections over those of the bundled recipe.
    """

    path: Path
    name: str
    runs: Path
    setting: str | None = None
    sections: dict[str, Any] = field(default_factory=dict)


class EvaluationProtocol(ABC):
    """A task that the harness evaluates.

    Attributes:
        name: what `scfm evaluate` and `OBLIGATORY` call it.
        question: what is asked, a sentence for the page.
        transductive: whether methods see the test cells while they are fitted (their labels they never see).
        metrics: keys of METRICS in the order of the table.
        further: more metrics, for a table of their own.
        headline: metrics on which a verdict is given, with an interval.
        terminal: metrics that the printed table has room for.
        main: the metric by which the best model and the best baseline are picked for figures.
        needs_batch: whether a batch column must be given.
        settings: ways of using a model, the default first.
    """

    name: ClassVar[str]
    question: ClassVar[str]
    transductive: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]]
    further: ClassVar[tuple[str, ...]] = ()
    headline: ClassVar[tuple[str, ...]]
    terminal: ClassVar[tuple[str, ...]]
    main: ClassVar[str]
    needs_batch: ClassVar[bool] = False
    settings: ClassVar[tuple[str, ...]]

    @abstractmethod
    def baselines(self) -> Sequence[Method]:
        """Return fresh baselines, without which there is no report."""

    @abstractmethod
    def controls(self, cells: LabelledCells) -> Sequence[tuple[Method, Kind]]:
        """Return methods that must lose, and such that know the answer: between them lies all that a metric can say."""

    @abstractmethod
    def model(self, given: ModelInput) -> Method:
        """Return a model directory as a method of this task. Raises ScfmError for a setting that the task lacks."""

    @abstractmethod
    def untrained(self, given: ModelInput) -> Method:
        """Return the same network with random weights, as a negative control."""

    @abstractmethod
    def run(
        self,
        method: Any,
        cells: LabelledCells,
        split: Split,
        labels: list[str],
        clock: Callable[[Step], AbstractContextManager[None]],
        shown: bool,
    ) -> Outcome:
        """Fit a method on a split and score it.

        Args:
            method: what is judged; it gets no label of a held-out cell.
            cells: all cells.
            split: which of them train and which are held out.
            labels: the fixed label list.
            clock: `with clock("fit"): ...` and `with clock("predict"): ...` measure time and memory of these steps.
            shown: whether this is the split whose embeddings the report shows.
        """

    @abstractmethod
    def resampled(self, comparison: Comparison, run: Run, metric: str) -> Resampled | None:
        """Return the score of a run as a function of the weights of its held-out cells; None where there is no such."""

    @abstractmethod
    def figures(self, comparison: Comparison) -> list[Figure]:
        """Draw the figures of the task."""

    def caveats(self, comparison: Comparison) -> list[str]:
        """Return what a reader must know of these data before believing the scores of this task."""
        return []
