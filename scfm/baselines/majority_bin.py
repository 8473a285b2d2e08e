"""What the most frequent bin scores: the accuracy that a model of masked bins must beat (Boiarsky et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scfm.baselines.mean_value import TRAINING_BATCHES

if TYPE_CHECKING:
    from scfm.training.datamodule import CellDataModule

PREFIX = "baseline_accuracy/"


def majority_bin_accuracies(data: CellDataModule, n_genes: int, n_bins: int) -> dict[str, float]:
    """Return how often three guesses of the hidden bins of the validation cells are right, hidden genes alike.

    `most frequent bin` is that of hidden genes in at most 100 global batches of training cells, and `most frequent bin
    of the gene` that of each gene there; `most frequent bin of the cell` is that of its genes that are not hidden,
    bin 0 aside. Of several bins it is the lowest, and where a gene or a cell has none, the first of the three. A hidden
    gene that shows its value (`data.mask_kept`) is told right, as the model can do too.

    Args:
        data: serves the same masked cells that the model is trained and validated on; all hidden genes are expressed.
        n_genes: size of the vocabulary.
        n_bins: value bins.
    """
    counts = np.zeros((n_genes, n_bins))
    training = data.pack_loader(data.train_rows, shuffle=True, rank=0, world_size=1)
    for packs in islice(training.batches(epoch=0), TRAINING_BATCHES):
        for pack in packs:
            assert pack.targets is not None
            np.add.at(counts, (pack.genes[pack.predicted].numpy(), pack.targets[pack.predicted].long().numpy()), 1)
    everywhere = int(counts.sum(0)[1:].argmax()) + 1
    of_gene = most_frequent(counts, everywhere)
    right, n, hides = np.zeros(3), 0, data.tokeniser.config.mask_value
    validation = data.pack_loader(data.valid_rows, shuffle=False, rank=0, world_size=1)
    for packs in validation.batches(epoch=0):
        for pack in packs:
            assert pack.targets is not None
            cell, bins = pack.cell_of_token.numpy(), pack.targets.long().numpy()
            shown = ~pack.unknown_mask.numpy() & (bins > 0)
            seen = np.zeros((pack.n_cells, n_bins))
            np.add.at(seen, (cell[shown], bins[shown]), 1)
            hidden = pack.predicted.numpy()
            truth, told = bins[hidden], pack.values.numpy()[hidden] != hides
            guesses = (everywhere, of_gene[pack.genes.numpy()[hidden]], most_frequent(seen, everywhere)[cell[hidden]])
            right += [np.sum(told | (truth == guess)) for guess in guesses]
            n += len(hidden)
    names = ("most frequent bin", "most frequent bin of the gene", "most frequent bin of the cell")
    return {PREFIX + name: float(share) for name, share in zip(names, right / max(n, 1), strict=True)}


def most_frequent(counts: NDArray[np.float64], otherwise: int) -> NDArray[np.int64]:
    """Return the most frequent bin of each row of counts (rows, bins), bin 0 aside; `otherwise` where there is none."""
    expressed = counts[:, 1:]
    return np.where(expressed.any(1), expressed.argmax(1) + 1, otherwise)


def majority_bins_of(metrics: Sequence[tuple[int, str, float]]) -> dict[str, float]:
    """Return the accuracies that a run has logged, by plain name, from the rows of its metrics.csv."""
    return {name.removeprefix(PREFIX): value for _, name, value in metrics if name.startswith(PREFIX)}
