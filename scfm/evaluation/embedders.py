"""Foundation models as embedders of cells of several batches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scfm.errors import ScfmError
from scfm.evaluation.protocol import Method, ModelInput

if TYPE_CHECKING:
    from anndata import AnnData


class ZeroShotEmbedding:
    """The cell embedding of a pretrained model as it is: nothing is fitted, and no batch is looked at.

    Args:
        name: what the report calls it.
        model: model directory.
    """

    def __init__(self, name: str, model: Path) -> None:
        self.name, self.model = name, model
        self.parameters: int | None = None

    def describe(self) -> str:
        return "cell embedding of the pretrained model, untouched; it is not told the batches"

    def fit_embed(self, adata: AnnData, batch: str | None, seed: int) -> NDArray[np.float32]:
        from scfm.pretrained import EMBEDDING, load

        model = load(self.model)
        self.parameters = sum(weights.numel() for weights in model.network.parameters())
        return model.embed(adata).obsm[EMBEDDING]


def embedder(given: ModelInput) -> Method:
    """Return a model directory as an embedder. Raises ScfmError for a setting that is none of integration."""
    if given.setting not in (None, "zero_shot"):
        raise ScfmError(f"--setting {given.setting}: is none of integration; choose zero_shot")
    return ZeroShotEmbedding(given.name, given.path)
