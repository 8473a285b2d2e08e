"""What is judged beside the baselines: a pretrained model, fine-tuned on the training cells of each split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scfm.recipe_reader import merged

if TYPE_CHECKING:
    from anndata import AnnData

    from scfm.pretrained import PretrainedModel


class FineTuned:
    """A pretrained model, fine-tuned for annotation on each split's training cells.

    Args:
        name: what the report calls it.
        model: model directory to start from, anew for every split.
        runs: folder that receives a run directory per split.
        sections: recipe sections over those of the bundled recipe for annotation with such a model.
    """

    def __init__(self, name: str, model: Path, runs: Path, sections: dict[str, Any] | None = None) -> None:
        self.name = name
        self.model = model
        self.runs = runs
        self.sections = sections or {}
        self.classes: list[str] = []
        self.tuned: PretrainedModel | None = None
        self.training_hashes: NDArray[np.uint64] | None = None

    def describe(self) -> str:
        return "pretrained model with a classifier, fine-tuned on the training cells"

    def pretrained(self, adata: AnnData, seed: int) -> PretrainedModel:
        """Return the model to start from, for these training cells and this seed."""
        from scfm.pretrained import load

        return load(self.model)

    def fit(self, adata: AnnData, label: str, seed: int) -> FineTuned:
        start = self.pretrained(adata, seed)
        # hashes of the pretraining cells alone: fine-tuning adds the split's own training cells
        self.training_hashes = start.files.cell_hashes
        run = {"seed": seed, "out": str(self.runs / f"annotation-seed{seed}"), "task": {"label": label}}
        self.tuned = start.finetune(adata, **merged(self.sections, run))
        self.classes = [name for head in self.tuned.files.heads for name in head.labels or []]
        return self

    def predict(self, adata: AnnData) -> tuple[NDArray, NDArray]:
        assert self.tuned is not None
        result = self.tuned.predict(adata.copy())
        return result.obs["annotation"].to_numpy(dtype=str), result.obsm["annotation_probabilities"]

    def embed(self, adata: AnnData) -> NDArray:
        assert self.tuned is not None
        return self.tuned.embed(adata.copy()).obsm["X_scfm"]
