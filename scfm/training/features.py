"""New random features for scBERT's mixers while it trains."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import lightning as L
import torch

from scfm.data.batch import PackedBatch
from scfm.model.performer import Favor


class RedrawFeatures(L.Callback):
    """Draws the random features of all layers anew every so many optimizer steps, before a training step.

    The matrices are a function of the seed, the number of the redraw and the layer: every process of a run draws the
    same, a resumed run draws what an unbroken one would, and no other random draw moves. They are saved with the
    weights. Validation never draws.

    Args:
        mixers: those with random features, by layer.
        every: optimizer steps between two draws.
        seed: of the recipe.
    """

    def __init__(self, mixers: list[Favor], every: int, seed: int) -> None:
        self.mixers, self.every, self.seed = mixers, every, seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: list[PackedBatch], batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == 0 or step % self.every:
            return
        for layer, mixer in enumerate(self.mixers):
            key = f"{self.seed}/{step // self.every}/{layer}".encode()
            seed = int.from_bytes(blake2b(key, digest_size=7).digest(), "little")
            mixer.redraw(torch.Generator().manual_seed(seed))


def redraw_callbacks(network: Any, seed: int) -> list[RedrawFeatures]:
    """Return what draws the features of a network anew: nothing where it has none, keeps them, or counts by itself."""
    backbone: Any = getattr(network, "backbone", None)
    mixers = backbone.random_features() if hasattr(backbone, "random_features") else []
    if not mixers or backbone.config.performer.mode == "compat" or backbone.config.performer.redraw_every == 0:
        return []
    return [RedrawFeatures(mixers, backbone.config.performer.redraw_every, seed)]
