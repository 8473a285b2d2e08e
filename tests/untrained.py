"""A tiny model with random weights, which tells made-up types apart: for all that needs a model, not a good one."""

from __future__ import annotations

import torch
from cells import GENES

from scfm.checkpoints.native import ModelFiles
from scfm.data.tokens import TokenConfig
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.pretrained import PretrainedModel
from scfm.recipe import ModelConfig

WIDTH = 32


def untrained_model(seed: int = 0, genes: list[str] = GENES) -> PretrainedModel:
    """Return an scGPT of one layer that knows these genes."""
    vocabulary = Vocabulary.from_genes([Gene.of(None, name) for name in genes])
    shape = ModelConfig(width=WIDTH, heads=2, layers=1, hidden=WIDTH, dropout=0.0)
    files = ModelFiles(shape, TokenConfig(max_genes=60), "counts", vocabulary, [])
    torch.manual_seed(seed)
    return PretrainedModel(files.build(), files, f"untrained {seed}")
