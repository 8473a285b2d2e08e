"""Foundation models as embedders of cells of several batches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scfm.errors import ScfmError
from scfm.evaluation.methods import new_folder
from scfm.evaluation.protocol import Method, ModelInput
from scfm.recipe_reader import merged

if TYPE_CHECKING:
    from anndata import AnnData

    from scfm.pretrained import PretrainedModel

# the recipe's task.setting -> what the report says of it
SETTINGS = {
    "full": "pretrained model, fine-tuned on these very cells and their batches; transductive, its epoch chosen by "
    "the prediction of hidden genes of cells set aside",
    "scratch": "the same network and objectives from random weights, trained on these very cells and their batches; "
    "transductive",
}


class ZeroShotEmbedding:
    """The cell embedding of a pretrained model as it is: nothing is fitted.

    Args:
        name: what the report calls it.
        model: model directory.
    """

    def __init__(self, name: str, model: Path) -> None:
        self.name, self.model = name, model
        self.parameters: int | None = None

    def describe(self) -> str:
        return "cell embedding of the model as it is; of batches it knows no more than it was trained on"

    def fit_embed(self, adata: AnnData, batch: str | None, seed: int) -> NDArray[np.float32]:
        from scfm.pretrained import load

        return embedded(self, load(self.model), adata)


class Integrated:
    """The cell embedding of a model that was fine-tuned to mix the batches of the cells it embeds: transductive.

    Args:
        name: what the report calls it.
        model: model directory to start from, anew for every seed.
        runs: folder that receives a run directory per seed.
        setting: a key of SETTINGS.
        sections: recipe sections over those of `recipes/finetune/integration.yaml`.
    """

    def __init__(
        self, name: str, model: Path, runs: Path, setting: str = "full", sections: dict[str, Any] | None = None
    ) -> None:
        self.name, self.model, self.runs = name, model, runs
        self.setting, self.sections = setting, sections or {}
        self.parameters: int | None = None

    def describe(self) -> str:
        return SETTINGS[self.setting]

    def fit_embed(self, adata: AnnData, batch: str | None, seed: int) -> NDArray[np.float32]:
        """Fine-tune on all cells and embed them. Raises ScfmError without a batch column."""
        from scfm.pretrained import load

        if batch is None:
            raise ScfmError("a model is fine-tuned for integration by the obs column of the batches")
        task = {"name": "integration", "batch": batch, "setting": self.setting}
        run = {"seed": seed, "out": str(new_folder(self.runs / f"integration-seed{seed}")), "task": task}
        return embedded(self, load(self.model).finetune(adata, **merged(self.sections, run)), adata)


def embedded(method: ZeroShotEmbedding | Integrated, model: PretrainedModel, adata: AnnData) -> NDArray[np.float32]:
    """Return a model's embedding of cells, (n, D), and tell the method how many parameters gave it."""
    from scfm.pretrained import EMBEDDING

    method.parameters = sum(weights.numel() for weights in model.network.parameters())
    return model.embed(adata.copy()).obsm[EMBEDDING]


def embedder(given: ModelInput) -> Method:
    """Return a model directory as an embedder. Raises ScfmError for a setting that is none of integration."""
    if given.setting in (None, "zero_shot"):
        return ZeroShotEmbedding(given.name, given.path)
    if given.setting not in SETTINGS:
        raise ScfmError(f"--setting {given.setting}: is none of integration; choose zero_shot, {', '.join(SETTINGS)}")
    return Integrated(given.name, given.path, given.runs, given.setting, given.sections)
