"""The simple methods that every score stands beside."""

from __future__ import annotations

from scfm.baselines.knn import KNNOnPCA
from scfm.baselines.logistic import BalancedLogisticRegression
from scfm.baselines.majority import MajorityClass

# task -> the baselines without which no report of it is written
OBLIGATORY: dict[str, tuple[type[MajorityClass] | type[KNNOnPCA] | type[BalancedLogisticRegression], ...]] = {
    "annotation": (MajorityClass, KNNOnPCA, BalancedLogisticRegression),
}

__all__ = ["OBLIGATORY", "BalancedLogisticRegression", "KNNOnPCA", "MajorityClass"]
