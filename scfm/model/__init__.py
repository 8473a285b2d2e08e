"""Models: from a pack of cells to token and cell embeddings and predictions; no files, no training, no devices here."""

from __future__ import annotations

from torch import nn

from scfm.model.scbert import ScBERT
from scfm.model.scgpt import ScGPT

MODELS: dict[str, type[nn.Module]] = {"scgpt": ScGPT, "scbert": ScBERT}
