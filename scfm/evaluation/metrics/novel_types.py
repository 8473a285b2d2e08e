"""Scores of methods that may call a cell `Unassigned`: what that finds of novel types, and what it costs on known ones.

The truth of a cell whose type no training cell has is `Unassigned` itself (`scfm.tasks.novel_types`). In accuracy and
macro-F1 an abstention is then right for such a cell and an error for any other, never a cell less.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scfm.evaluation.metrics.metric import Metric
from scfm.model.novelty import UNASSIGNED

ABSTENTION: dict[str, Metric] = {
    "novel_found": Metric(
        "novel cells found", f"share called {UNASSIGNED} of the held-out cells of types that no training cell has"
    ),
    "known_kept": Metric(
        "known cells kept",
        "share of the held-out cells of known types that are given a type, be it the wrong one; a method that never "
        "abstains keeps all, so read it beside the share of novel cells found",
    ),
    "known_accuracy": Metric(
        "accuracy, known types",
        f"share of the held-out cells of known types with the right label; {UNASSIGNED} is an error",
    ),
    "assigned_accuracy": Metric(
        "accuracy where assigned", f"share with the right label of the held-out cells that are not called {UNASSIGNED}"
    ),
    "novelty_auroc": Metric(
        "novelty AUROC",
        "how well the novelty of a cell (energy or distance where the method has such, else one minus its largest "
        "probability) tells cells of novel types from others, whatever the threshold; 0.5 is chance",
    ),
}


def abstention_scores(
    truth: NDArray[np.str_], predicted: NDArray[np.str_], novelty: NDArray[np.float64]
) -> dict[str, float]:
    """Score labels (n,), some of them `Unassigned`, and the novelty (n,) of cells; NaN for what is not defined."""
    from sklearn.metrics import roc_auc_score

    novel, assigned = truth == UNASSIGNED, predicted != UNASSIGNED
    right = truth == predicted
    both = novel.any() and not novel.all()
    return {
        "novel_found": _share(~assigned, novel),
        "known_kept": _share(assigned, ~novel),
        "known_accuracy": _share(right, ~novel),
        "assigned_accuracy": _share(right, assigned),
        "novelty_auroc": float(roc_auc_score(novel, novelty)) if both else float("nan"),
    }


def _share(found: NDArray[np.bool_], among: NDArray[np.bool_]) -> float:
    return float(found[among].mean()) if among.any() else float("nan")
