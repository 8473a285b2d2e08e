"""What predicting a mean costs: the loss that a model of expression values must beat."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scfm.training.datamodule import CellDataModule

TRAINING_BATCHES = 100
PREFIX = "baseline/"


def mean_value_losses(data: CellDataModule, n_genes: int) -> dict[str, float]:
    """Return the mean squared error of two predictions of the unknown genes of the validation cells.

    `global mean` predicts one number, the mean training target; `gene mean` predicts each gene's mean training target
    (the global mean where a gene was never seen). Targets are bins, or raw values where the
    recipe says so. Means are taken over at most 100 global batches of training cells.

    Args:
        data: serves the same masked cells that the model is trained and validated on.
        n_genes: size of the vocabulary.
    """
    sums, counts = np.zeros(n_genes), np.zeros(n_genes)
    training = data.pack_loader(data.train_rows, shuffle=True, rank=0, world_size=1)
    for packs in islice(training.batches(epoch=0), TRAINING_BATCHES):
        for pack in packs:
            assert pack.targets is not None
            genes, targets = pack.genes[pack.predicted].numpy(), pack.targets[pack.predicted].numpy()
            sums += np.bincount(genes, targets, minlength=n_genes)
            counts += np.bincount(genes, minlength=n_genes)
    global_mean = sums.sum() / counts.sum()
    gene_mean = np.where(counts > 0, sums / np.maximum(counts, 1), global_mean)
    errors, n = np.zeros(2), 0
    validation = data.pack_loader(data.valid_rows, shuffle=False, rank=0, world_size=1)
    for packs in validation.batches(epoch=0):
        for pack in packs:
            assert pack.targets is not None
            genes, targets = pack.genes[pack.predicted].numpy(), pack.targets[pack.predicted].numpy()
            errors += [np.square(targets - global_mean).sum(), np.square(targets - gene_mean[genes]).sum()]
            n += len(targets)
    return {f"{PREFIX}global mean": float(errors[0] / n), f"{PREFIX}gene mean": float(errors[1] / n)}


def baselines_of(metrics: Sequence[tuple[int, str, float]]) -> dict[str, float]:
    """Return the baselines that a run has logged, by plain name, from the rows of its metrics.csv."""
    return {name.removeprefix(PREFIX): value for _, name, value in metrics if name.startswith(PREFIX)}
