"""Every score that scfm gives, one file per kind of task; `METRICS` says how each is computed."""

from __future__ import annotations

from scfm.evaluation.metrics.classification import (
    CALIBRATION_BINS,
    CLASSIFICATION,
    FROM_CONFUSION,
    ClassificationScores,
    Reliability,
    accuracy,
    auroc,
    classification_scores,
    confusion_codes,
    f1,
    precision,
    recall,
    relative_error,
    reliability,
)
from scfm.evaluation.metrics.metric import Metric

METRICS: dict[str, Metric] = {**CLASSIFICATION}

__all__ = [
    "CALIBRATION_BINS",
    "CLASSIFICATION",
    "FROM_CONFUSION",
    "METRICS",
    "ClassificationScores",
    "Metric",
    "Reliability",
    "accuracy",
    "auroc",
    "classification_scores",
    "confusion_codes",
    "f1",
    "precision",
    "recall",
    "relative_error",
    "reliability",
]
