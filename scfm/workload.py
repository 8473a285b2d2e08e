"""What a recipe's cells ask of its model: their number, their lengths, and how they fall into packs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scfm.data.packing import deal, filled_length
from scfm.data.shards import open_shards, read_manifest
from scfm.errors import ScfmError
from scfm.flops import Work
from scfm.recipe import Recipe

PUBLISHED_VOCABULARY = 60_697  # tokens of scGPT's whole-human model
SAMPLED_CELLS = 100_000


@dataclass(frozen=True)
class Cells:
    """The cells of a run.

    Attributes:
        count: cells, those held out included; None where nobody said.
        lengths: (n,) int32 tokens of a sample of cells, `<cls>` included, in the order of the store.
        vocabulary: tokens of the vocabulary, special ones included.
        obs: names of the values of each obs column.
        said: where count, lengths and vocabulary come from, in words.
    """

    count: int | None
    lengths: NDArray[np.int32]
    vocabulary: int
    obs: dict[str, list[str]] = field(default_factory=dict)
    said: tuple[str, ...] = ()

    @property
    def tokens_per_cell(self) -> float:
        return float(self.lengths.mean())


def cells_of(recipe: Recipe, count: int | None, vocabulary: int | None) -> Cells:
    """Return the cells of a recipe's shards, or without shards what can be assumed: every cell has `max_genes` genes.

    Args:
        recipe: its data section counts.
        count: number of cells, instead of that of the shards.
        vocabulary: tokens of the vocabulary; not with shards, which have their own.

    Raises ScfmError where the shards cannot be read, or hold no cells.
    """
    data = recipe.data
    if data.shards is None:
        size = vocabulary or PUBLISHED_VOCABULARY
        genes = size if data.genes == "all" else data.max_genes
        number = "--cells" if count is not None else "not known: give data.shards or --cells"
        said = (
            f"cells: {number}",
            f"tokens per cell: assumed, every cell has data.max_genes {data.max_genes:,} genes",
            f"vocabulary: {'--vocabulary' if vocabulary else 'assumed, as of the published scGPT'}",
        )
        return Cells(count, np.array([min(genes, data.max_genes) + 1], np.int32), size, said=said)
    if vocabulary is not None:
        raise ScfmError("--vocabulary: the shards of data.shards have a vocabulary; leave the option out")
    manifest, store = read_manifest(Path(data.shards)), open_shards(data.shards)
    if store.n_cells == 0:
        raise ScfmError(f"{data.shards}: holds no cells")
    rows = np.unique(np.linspace(0, store.n_cells - 1, min(store.n_cells, SAMPLED_CELLS)).astype(np.int64))
    found = np.full(len(rows), store.vocabulary.n_genes) if data.genes == "all" else store.n_genes(rows)
    said = (
        f"cells: {'--cells' if count is not None else f'manifest of {data.shards}'}",
        f"tokens per cell: {len(rows):,} cells of {data.shards}, at most data.max_genes {data.max_genes:,} genes each "
        f"(the manifest's mean is {manifest['tokens'] / manifest['cells']:,.0f} genes)",
        f"vocabulary: {data.shards}",
    )
    lengths = (np.minimum(found, data.max_genes) + 1).astype(np.int32)
    obs = dict(manifest["obs"])
    return Cells(count or manifest["cells"], lengths, len(store.vocabulary), obs, said)


def mean_work(recipe: Recipe, cells: Cells, count: float) -> Work:
    """Return the work of so many cells, each length under each mask ratio, rounded to whole tokens."""
    length = cells.lengths.astype(np.int64)[:, None]  # (n, 1)
    unknown = ((length - 1) * np.asarray(recipe.data.mask_ratios)).astype(np.int64)  # (n, ratios), as the tokeniser's
    known = length - unknown
    pairs = length * known + unknown if recipe.model.attention == "generative" else np.square(length)
    return Work(*(round(count * float(mean)) for mean in (length.mean(), 1.0, unknown.mean(), pairs.mean())))


@dataclass(frozen=True)
class Packs:
    """How a global batch falls into packs.

    Attributes:
        rounds: packs of each process in one step.
        tokens: tokens of the largest pack, filling included.
        filling: tokens of pseudo-cells in the global batch.
    """

    rounds: int
    tokens: int
    filling: int


def packs_of(recipe: Recipe, cells: Cells, processes: int) -> Packs:
    """Deal a global batch of sampled cells, as the loader does; `tokens_per_pack` is a number here."""
    data = recipe.data
    assert data.tokens_per_pack != "auto"
    drawn = np.random.default_rng(recipe.seed).choice(cells.lengths, data.cells_per_batch)
    seats = deal(drawn, processes, data.tokens_per_pack)
    sizes = [int(drawn[pack].sum()) for rank in seats for pack in rank]
    if not data.fill_packs:
        return Packs(len(seats[0]), max(sizes), 0)
    size = filled_length(drawn, seats, data.tokens_per_pack)
    return Packs(len(seats[0]), size, len(sizes) * size - sum(sizes))


def schedule_of(recipe: Recipe, train_cells: int | None) -> tuple[int | None, float]:
    """Return the optimizer steps of a recipe (None where unknown) and how often it validates."""
    trainer, batch = recipe.trainer, recipe.data.cells_per_batch
    per_epoch: int | None = None
    if train_cells is not None:
        per_epoch = train_cells // batch
        if per_epoch == 0:
            raise ScfmError(f"data.cells_per_batch: {batch} cells per batch, but only {train_cells} cells to read")
        limit = trainer.limit_train_batches
        if limit is not None:
            per_epoch = min(per_epoch, limit) if isinstance(limit, int) else max(int(per_epoch * limit), 1)
    given = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and per_epoch is not None:
        given.append(trainer.max_epochs * per_epoch)
    if not given:
        return None, 0.0
    steps = min(given)
    every = trainer.val_check_interval if trainer.val_check_interval is not None else 1.0
    if isinstance(every, int):
        return steps, max(steps / every, 1.0)
    epochs = steps / per_epoch if per_epoch else 0.0
    return steps, max(epochs / every / (trainer.check_val_every_n_epoch or 1), 1.0)
