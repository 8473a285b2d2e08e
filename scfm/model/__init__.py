"""Models: what turns a pack of cells into token and cell embeddings and predictions. Knows nothing of files or training."""

from __future__ import annotations

from torch import nn

from scfm.model.scgpt import ScGPT

MODELS: dict[str, type[nn.Module]] = {"scgpt": ScGPT}
