"""Annotation where some held-out cells are of a type that no training cell has: those should be called `Unassigned`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from scfm.baselines import OBLIGATORY
from scfm.errors import ScfmError
from scfm.evaluation.abstaining import KEPT, Abstaining
from scfm.evaluation.metrics import ClassificationScores, abstention_scores
from scfm.evaluation.page import Figure
from scfm.evaluation.protocol import Kind, LabelledCells, Method, ModelInput
from scfm.evaluation.protocols.annotation import Annotation
from scfm.model.novelty import UNASSIGNED
from scfm.recipe_reader import merged

if TYPE_CHECKING:
    from scfm.evaluation.harness import Comparison


@runtime_checkable
class TellsNovelty(Protocol):
    """A method that has a measure of its own of how little a cell resembles the training types."""

    @property
    def novelty(self) -> NDArray[np.float64] | None:
        """Novelty (n,) of the cells that were predicted last, None where this model has no such measure."""
        ...


class AnnotationOfNovelTypes(Annotation):
    """Annotation in which every method may abstain, and must where a cell's type was withheld from it."""

    name = "annotation, novel types"
    question = "which type a held-out cell has, or that it has none of those that the training cells have"
    metrics = ("macro_f1", "accuracy", "novelty_auroc", "novel_found", "known_kept", "known_accuracy")
    terminal = ("macro_f1", "novelty_auroc", "novel_found")

    def baselines(self) -> Sequence[Method]:
        return [Abstaining(baseline()) for baseline in OBLIGATORY[Annotation.name]]

    def controls(self, cells: LabelledCells) -> Sequence[tuple[Method, Kind]]:
        # positive controls know which cells are novel
        return [
            (Abstaining(method) if kind == "negative control" else method, kind)
            for method, kind in super().controls(cells)
        ]

    def model(self, given: ModelInput) -> Method:
        task = given.sections.get("task", {})
        if task.get("known_kept", KEPT) != KEPT:
            raise ScfmError(
                f"task.known_kept: {task['known_kept']}; with --novel all methods keep {KEPT:.0%} of their validation "
                "cells, so that what they find can be compared; leave the key out"
            )
        score = task.get("novel_types", "none")
        chosen = {"task": {"novel_types": "energy" if score == "none" else score}}
        return super().model(replace(given, sections=merged(given.sections, chosen)))

    def untrained(self, given: ModelInput) -> Method:
        return Abstaining(super().untrained(given))

    def scored(
        self,
        method: Any,
        truth: NDArray[np.str_],
        predicted: NDArray[np.str_],
        probabilities: NDArray,
        labels: list[str],
    ) -> ClassificationScores:
        scores = super().scored(method, truth, predicted, probabilities, labels)
        novelty = method.novelty if isinstance(method, TellsNovelty) else None
        if novelty is None:
            known = [k for k, name in enumerate(method.classes) if name != UNASSIGNED]
            novelty = 1 - np.asarray(probabilities)[:, known].max(1)
        values = scores.values | abstention_scores(truth, predicted, novelty)
        return replace(scores, values={name: values[name] for name in self.metrics})

    def figures(self, comparison: Comparison) -> list[Figure]:
        # probabilities are of the known types alone: for a novel cell there is none to be right with
        return [figure for figure in super().figures(comparison) if figure.title != "Calibration"]
