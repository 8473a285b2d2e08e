"""What the most frequent bin scores: the accuracy that a model of masked bins must beat (Boiarsky et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from scfm.baselines.mean_value import TRAINING_BATCHES

if TYPE_CHECKING:
    from scfm.training.datamodule import CellDataModule

PREFIX = "baseline_accuracy/"


def majority_bin_accuracies(data: CellDataModule, n_bins: int) -> dict[str, float]:
    """Return how often two guesses of the hidden bins of the validation cells are right, hidden genes alike.

    `most frequent bin` is that of hidden genes in at most 100 global batches of training cells; `most frequent bin of
    the cell` is that of the genes that the cell shows, bin 0 aside (the lowest of several; the former where none is).

    Args:
        data: serves the same masked cells that the model is trained and validated on; all hidden genes are expressed.
        n_bins: value bins.
    """
    counts = np.zeros(n_bins)
    training = data.pack_loader(data.train_rows, shuffle=True, rank=0, world_size=1)
    for packs in islice(training.batches(epoch=0), TRAINING_BATCHES):
        for pack in packs:
            assert pack.targets is not None
            counts += np.bincount(pack.targets[pack.predicted].long().numpy(), minlength=n_bins)
    everywhere = int(counts[1:].argmax()) + 1
    right, n = np.zeros(2), 0
    validation = data.pack_loader(data.valid_rows, shuffle=False, rank=0, world_size=1)
    for packs in validation.batches(epoch=0):
        for pack in packs:
            assert pack.targets is not None
            cell, bins = pack.cell_of_token.numpy(), pack.targets.long().numpy()
            shown = ~pack.unknown_mask.numpy() & (bins > 0)
            of_cell = np.zeros((pack.n_cells, n_bins))
            np.add.at(of_cell, (cell[shown], bins[shown]), 1)
            own = np.where(of_cell.any(1), of_cell.argmax(1), everywhere)
            hidden = pack.predicted.numpy()
            right += [(bins[hidden] == everywhere).sum(), (bins[hidden] == own[cell[hidden]]).sum()]
            n += len(hidden)
    names = ("most frequent bin", "most frequent bin of the cell")
    return {PREFIX + name: float(share) for name, share in zip(names, right / max(n, 1), strict=True)}


def majority_bins_of(metrics: Sequence[tuple[int, str, float]]) -> dict[str, float]:
    """Return the accuracies that a run has logged, by plain name, from the rows of its metrics.csv."""
    return {name.removeprefix(PREFIX): value for _, name, value in metrics if name.startswith(PREFIX)}
