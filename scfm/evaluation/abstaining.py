"""Any annotator, made to call cells `Unassigned`: by the rule that `scfm finetune` applies to models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scfm.baselines.inputs import read_labels
from scfm.evaluation.splits import stratified_split
from scfm.model.novelty import UNASSIGNED

if TYPE_CHECKING:
    from anndata import AnnData

VALIDATION = 0.1  # of the training cells, as the bundled recipes set aside
KEPT = 0.95


class Abstaining:
    """A method that leaves cells `Unassigned` whose largest probability is low.

    A tenth of every type of the training cells is set aside; the threshold is such that a share of them keep a label.

    Args:
        method: an annotator: `fit`, `predict`, `classes`, and `embed` where it has such.
        kept: that share.
    """

    def __init__(self, method: Any, kept: float = KEPT) -> None:
        self.method = method
        self.kept = kept
        self.name: str = method.name
        if hasattr(method, "embed"):
            self.embed = method.embed

    @property
    def classes(self) -> list[str]:
        """The types that the method knows, as its probabilities have them."""
        return self.method.classes

    def describe(self) -> str:
        return (
            f"{self.method.describe()}; {UNASSIGNED} where the largest probability is below that of {self.kept:.0%} of "
            f"the {VALIDATION:.0%} of the training cells set aside for it"
        )

    def fit(self, adata: AnnData, label: str, seed: int) -> Abstaining:
        split = stratified_split(read_labels(adata, label), VALIDATION, seed)
        self.method.fit(adata[split.train].copy(), label, seed)
        set_aside = adata[split.test].copy()
        del set_aside.obs[label]
        _, probabilities = self.method.predict(set_aside)
        self.threshold = float(np.quantile(1 - probabilities.max(1), self.kept, method="higher"))
        return self

    def predict(self, adata: AnnData) -> tuple[NDArray, NDArray]:
        labels, probabilities = self.method.predict(adata)
        return np.where(1 - probabilities.max(1) > self.threshold, UNASSIGNED, labels), probabilities
