"""Reference mapping: held-out cells take over the labels of their nearest training cells, with a confidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scfm.baselines import BalancedLogisticRegression, KNNOnPCA, MajorityClass
from scfm.errors import ScfmError
from scfm.evaluation.abstaining import KEPT, Abstaining
from scfm.evaluation.metrics import ClassificationScores, reliability
from scfm.evaluation.page import Figure
from scfm.evaluation.protocol import Method, ModelInput
from scfm.evaluation.protocols.annotation import Annotation
from scfm.evaluation.protocols.novel_types import AnnotationOfNovelTypes

if TYPE_CHECKING:
    from scfm.evaluation.harness import Comparison


class Mapping(AnnotationOfNovelTypes):
    """An index of the training cells, which nothing is trained on, is asked for the labels of the held-out cells."""

    name = "mapping"
    question = "which type a held-out cell takes over from its nearest training cells, or that they are too far to say"
    metrics = ("macro_f1", "accuracy", "known_kept", "assigned_accuracy", "auroc", "calibration_error")
    terminal = ("macro_f1", "accuracy", "known_kept")
    settings = ("index",)

    def baselines(self) -> Sequence[Method]:
        return [Abstaining(baseline()) for baseline in (MajorityClass, KNNOnPCA, BalancedLogisticRegression)]

    def model(self, given: ModelInput) -> Method:
        from scfm.pretrained import load
        from scfm.tasks.mapping import ReferenceMapping

        if given.setting not in (None, *self.settings):
            raise ScfmError(f"--setting {given.setting}: nothing is trained for mapping; leave it out")
        if given.sections:
            raise ScfmError("--config: nothing is trained for mapping; leave it out")
        return ReferenceMapping(given.name, load(given.path), known_share=KEPT)

    def scored(
        self,
        method: Any,
        truth: NDArray[np.str_],
        predicted: NDArray[np.str_],
        probabilities: NDArray,
        labels: list[str],
    ) -> ClassificationScores:
        scores = super().scored(method, truth, predicted, probabilities, labels)
        if "calibration_error" not in self.metrics:
            return scores
        # the confidence is in the label that the cell would have, whether or not it is close enough to be given it
        best = np.array(method.classes)[probabilities.argmax(1)]
        calibration = reliability(probabilities.max(1), best == truth)
        return replace(scores, reliability=calibration, values=scores.values | {"calibration_error": calibration.error})

    def figures(self, comparison: Comparison) -> list[Figure]:
        return Annotation.figures(self, comparison)


class MappingOfNovelTypes(Mapping):
    """The same, where some held-out cells are of a type that the reference lacks."""

    name = "mapping, novel types"
    metrics = AnnotationOfNovelTypes.metrics
    terminal = AnnotationOfNovelTypes.terminal

    def figures(self, comparison: Comparison) -> list[Figure]:
        return AnnotationOfNovelTypes.figures(self, comparison)
