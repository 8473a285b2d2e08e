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
from scfm.evaluation.metrics.embedding import EMBEDDING, S_BATCH, S_BIO, embedding_scores
from scfm.evaluation.metrics.metric import Metric
from scfm.evaluation.metrics.novel_types import ABSTENTION, abstention_scores

METRICS: dict[str, Metric] = {**CLASSIFICATION, **ABSTENTION, **EMBEDDING}

__all__ = [
    "ABSTENTION",
    "CALIBRATION_BINS",
    "CLASSIFICATION",
    "EMBEDDING",
    "FROM_CONFUSION",
    "METRICS",
    "S_BATCH",
    "S_BIO",
    "ClassificationScores",
    "Metric",
    "Reliability",
    "abstention_scores",
    "accuracy",
    "auroc",
    "classification_scores",
    "confusion_codes",
    "embedding_scores",
    "f1",
    "precision",
    "recall",
    "relative_error",
    "reliability",
]
