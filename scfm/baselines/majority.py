"""The floor: every cell gets the commonest training label."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scfm.baselines.inputs import read_labels

if TYPE_CHECKING:
    import anndata


class MajorityClass:
    """Predict the commonest training label for every cell, with the label frequencies as probabilities."""

    name = "majority class"

    def describe(self) -> str:
        return "every cell gets the commonest training label; probabilities are the training frequencies"

    def fit(self, adata: anndata.AnnData, label: str, seed: int = 0) -> MajorityClass:
        """Count the labels of the training cells. Raises ScfmError for missing labels."""
        classes, counts = np.unique(read_labels(adata, label), return_counts=True)
        self.classes: list[str] = classes.tolist()
        self.frequencies = counts / counts.sum()
        return self

    def predict(self, adata: anndata.AnnData) -> tuple[NDArray[np.str_], NDArray[np.float64]]:
        """Return labels (n,) and probabilities (n, C), columns as in `classes`."""
        commonest = self.classes[int(self.frequencies.argmax())]
        return np.full(adata.n_obs, commonest), np.tile(self.frequencies, (adata.n_obs, 1))
