"""What is judged beside the baselines: a pretrained model, made an annotator on the training cells of each split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scfm.errors import ScfmError
from scfm.recipe_reader import merged

if TYPE_CHECKING:
    from anndata import AnnData

    from scfm.pretrained import PretrainedModel

# the recipe's task.setting -> what the report says of it
SETTINGS = {
    "zero_shot": "pretrained model, untouched; the nearest training cells in its embedding vote",
    "probe": "pretrained model, frozen; logistic regression on its embedding of the training cells",
    "full": "pretrained model with a classifier, fine-tuned on the training cells",
    "scratch": "the same network from random weights, trained on the training cells alone",
    "lora": "pretrained model with a classifier, of which low-rank updates and the classifier are trained",
}


class FineTuned:
    """A pretrained model, made an annotator on each split's training cells.

    Args:
        name: what the report calls it.
        model: model directory to start from, anew for every split.
        runs: folder that receives a run directory per split.
        sections: recipe sections over those of the bundled recipe for annotation with such a model.
        setting: what of the model learns, a key of SETTINGS; None as the recipe's `task.setting` has it.

    Raises:
        ScfmError: there is no such setting.
    """

    def __init__(
        self,
        name: str,
        model: str | Path,
        runs: str | Path,
        sections: dict[str, Any] | None = None,
        setting: str | None = None,
    ) -> None:
        self.name = name
        self.model = Path(model)
        self.runs = Path(runs)
        self.sections = merged(sections or {}, {"task": {"setting": setting}} if setting else {})
        self.setting = self.sections.get("task", {}).get("setting", "full")
        if self.setting not in SETTINGS:
            raise ScfmError(
                f"task.setting: {self.setting!r} is none of annotation; choose one of {', '.join(SETTINGS)}"
            )
        self.classes: list[str] = []
        self.tuned: PretrainedModel | None = None
        self.training_hashes: NDArray[np.uint64] | None = None
        self.novelty: NDArray[np.float64] | None = None

    def describe(self) -> str:
        return SETTINGS[self.setting]

    @property
    def parameters(self) -> int | None:
        """How many numbers the tuned model has; None before it is fitted."""
        return None if self.tuned is None else sum(one.numel() for one in self.tuned.network.parameters())

    def pretrained(self, adata: AnnData, seed: int) -> PretrainedModel:
        """Return the model to start from, for these training cells and this seed."""
        from scfm.pretrained import load

        return load(self.model)

    def fit(self, adata: AnnData, label: str, seed: int) -> FineTuned:
        start = self.pretrained(adata, seed)
        # hashes of the pretraining cells alone: fine-tuning adds the split's own training cells
        self.training_hashes = start.files.cell_hashes
        if self.setting == "scratch":
            self.training_hashes = np.empty(0, np.uint64)
        # a type of a single training cell is learned here as the baselines learn it
        task = {"name": "annotation", "label": label, "min_cells": 1}
        run = {"seed": seed, "out": str(new_folder(self.runs / f"annotation-seed{seed}")), "task": task}
        self.tuned = start.finetune(adata, **merged(self.sections, run))
        self.classes = [name for head in self.tuned.files.heads for name in head.labels or []]
        return self

    def predict(self, adata: AnnData) -> tuple[NDArray, NDArray]:
        assert self.tuned is not None
        result = self.tuned.predict(adata.copy())
        self.novelty = result.obs["annotation_novelty"].to_numpy() if "annotation_novelty" in result.obs else None
        return result.obs["annotation"].to_numpy(dtype=str), result.obsm["annotation_probabilities"]

    def embed(self, adata: AnnData) -> NDArray:
        assert self.tuned is not None
        return self.tuned.embed(adata.copy()).obsm["X_scfm"]


def new_folder(place: Path) -> Path:
    """Return where the run of a seed goes: beside earlier ones where several splits have that seed."""
    again = (place.with_name(f"{place.name}-{k}") for k in range(2, 10_000))
    return place if not place.exists() else next(other for other in again if not other.exists())


def annotation_method(
    name: str, model: str | Path, runs: str | Path, setting: str = "full", sections: dict[str, Any] | None = None
) -> FineTuned:
    """Return a pretrained model as an annotator in one of the SETTINGS: zero_shot, probe, full, scratch or lora.

    Args:
        name: what the report calls it.
        model: model directory to start from, anew for every split.
        runs: folder that receives a run directory per split; a folder of its own for each method.
        setting: what of the model learns.
        sections: recipe sections over those of the bundled recipe for annotation with such a model.

    Raises:
        ScfmError: there is no such setting.
    """
    return FineTuned(name, model, runs, sections, setting)
