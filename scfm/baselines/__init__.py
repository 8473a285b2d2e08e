"""The simple methods that every score stands beside."""

from __future__ import annotations

from typing import Any

from scfm.baselines.harmony import Harmony
from scfm.baselines.hvg_pca import HVGPCA
from scfm.baselines.knn import KNNOnPCA
from scfm.baselines.logistic import BalancedLogisticRegression
from scfm.baselines.majority import MajorityClass
from scfm.baselines.parameter_free import ParameterFree, ParameterFreeCentroid, ParameterFreePCA
from scfm.baselines.scvi import SCVI
from scfm.baselines.sparse_logistic import SparseLogisticRegression

# task -> the baselines without which no report of it is written
OBLIGATORY: dict[str, tuple[type[Any], ...]] = {
    "annotation": (
        MajorityClass,
        KNNOnPCA,
        BalancedLogisticRegression,
        SparseLogisticRegression,
        ParameterFreeCentroid,
        ParameterFreePCA,
    ),
    "integration": (HVGPCA, Harmony),
}

__all__ = [
    "HVGPCA",
    "OBLIGATORY",
    "SCVI",
    "BalancedLogisticRegression",
    "Harmony",
    "KNNOnPCA",
    "MajorityClass",
    "ParameterFree",
    "ParameterFreeCentroid",
    "ParameterFreePCA",
    "SparseLogisticRegression",
]
