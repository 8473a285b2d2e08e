"""What the most frequent bin scores: the accuracy that a model of masked bins must beat (Boiarsky et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scfm.baselines.mean_value import TRAINING_BATCHES

if TYPE_CHECKING:
    from scfm.data.loader import PackLoader
    from scfm.training.datamodule import CellDataModule

PREFIX = "baseline_accuracy/"


class Hidden(NamedTuple):
    """The hidden genes of a pack: their ids, the most frequent bin that their cell shows (0: none), their own bins.

    `told` (bool) marks those that show their value to the model all the same.
    """

    genes: NDArray[np.int64]
    shown: NDArray[np.int64]
    bins: NDArray[np.int64]
    told: NDArray[np.bool_]


def majority_bin_accuracies(data: CellDataModule, n_bins: int) -> dict[str, float]:
    """Return how often four guesses of the hidden bins of the validation cells are right, hidden genes alike.

    `most frequent bin` is that of hidden genes in at most 100 global batches of training cells; `most frequent bin of
    the cell` that of the genes that the cell shows, bin 0 aside (the lowest of several; the former where none is);
    `most frequent bin of the gene` that of each gene in those batches; and `of the gene in such cells` that of each
    gene in training cells of the same most frequent bin. Where there is nothing to count, the one before decides. A
    hidden gene that shows its value (`data.mask_kept`) is told right, as the model can do too.

    Args:
        data: serves the same masked cells that the model is trained and validated on; all hidden genes are expressed.
        n_bins: value bins.
    """
    counts = np.zeros((data.store.vocabulary.n_genes, n_bins, n_bins), np.int64)  # gene, shown, bin
    training = data.pack_loader(data.train_rows, shuffle=True, rank=0, world_size=1)
    for genes, shown, bins, _ in hidden_genes(training, n_bins, TRAINING_BATCHES):
        np.add.at(counts, (genes, shown, bins), 1)
    everywhere = int(counts.sum((0, 1))[1:].argmax()) + 1
    by_gene = counts.sum(1)
    of_gene = np.where(by_gene.any(1), by_gene.argmax(1), everywhere)  # (G,)
    in_such = np.where(counts.any(2), counts.argmax(2), of_gene[:, None])  # (G, shown)
    right, n = np.zeros(4), 0
    validation = data.pack_loader(data.valid_rows, shuffle=False, rank=0, world_size=1)
    for genes, shown, bins, told in hidden_genes(validation, n_bins, None):
        own = np.where(shown > 0, shown, everywhere)
        guesses = (everywhere, own, of_gene[genes], in_such[genes, shown])
        right += [np.sum(told | (guess == bins)) for guess in guesses]
        n += len(bins)
    names = ("", " of the cell", " of the gene", " of the gene in such cells")
    shares = (right / max(n, 1)).tolist()
    return {f"{PREFIX}most frequent bin{name}": share for name, share in zip(names, shares, strict=True)}


def hidden_genes(loader: PackLoader, n_bins: int, n_batches: int | None) -> Iterator[Hidden]:
    """Yield the hidden genes of each pack of the first global batches, of all where their number is None."""
    for packs in islice(loader.batches(epoch=0), n_batches):
        for pack in packs:
            assert pack.targets is not None
            cell, bins = pack.cell_of_token.numpy(), pack.targets.long().numpy()
            shown = ~pack.unknown_mask.numpy() & (bins > 0)
            of_cell = np.zeros((pack.n_cells, n_bins), np.int64)
            np.add.at(of_cell, (cell[shown], bins[shown]), 1)
            where = pack.predicted.numpy()
            told = pack.values.numpy()[where] != loader.tokeniser.config.mask_value
            yield Hidden(pack.genes.long().numpy()[where], of_cell.argmax(1)[cell[where]], bins[where], told)


def majority_bins_of(metrics: Sequence[tuple[int, str, float]]) -> dict[str, float]:
    """Return the accuracies that a run has logged, by plain name, from the rows of its metrics.csv."""
    return {name.removeprefix(PREFIX): value for _, name, value in metrics if name.startswith(PREFIX)}
