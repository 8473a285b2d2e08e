"""Batch integration: a pretrained model learns to embed the cells of a data set with their batches mixed.

The objectives are those of scGPT's integration: gene expression prediction (GEP) and the same from the cell embedding
(GEPC), each with whether a gene is expressed at all, elastic cell similarity (ECS), a head that must not tell the batch
(DAR), and input statistics of each batch of its own (DSBN). Labels play no part.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from scfm.baselines.hvg_pca import highly_variable
from scfm.checkpoints.native import ModelFiles
from scfm.data.expression import joined, take_cells
from scfm.data.store import CellStore
from scfm.errors import ScfmError
from scfm.evaluation.splits import stratified_split
from scfm.objectives import build_objectives
from scfm.recipe import Recipe, TaskConfig
from scfm.tasks.finetuning import all_hashes, before, expect_same_values, on_anndata, on_shards, paced_recipe, start

if TYPE_CHECKING:
    from anndata import AnnData

    from scfm.pretrained import PretrainedModel

RECIPE = "finetune/integration.yaml"
# what a model's own card calls the run that made it
STAGES = {"full": "integration", "scratch": "integration from scratch"}
FEWEST_COUNTS = 3  # genes with fewer in all cells are never read (scGPT)
CELLS_THAT_CHOOSE = 50_000  # at most so many say which genes vary


def finetune(recipe: Recipe, resume: str | None = None) -> Path:
    """Integrate the cells of a shard directory with `recipe.from_model`; return the new model directory.

    Raises:
        ScfmError: the recipe cannot work, the shards have another vocabulary, or there are fewer than two batches.
    """
    return on_shards(recipe, run_on, resume)


def finetune_anndata(model: PretrainedModel, adata: AnnData, keys: dict[str, Any]) -> PretrainedModel:
    """Return a new model, fine-tuned to embed the cells of `adata` with their batches mixed.

    Args:
        model: where to start, loaded from a model directory.
        adata: cells of several batches; labels are not needed and not read.
        keys: recipe keys over those of `recipes/finetune/integration.yaml`; without `out` the run is temporary.
    """
    return on_anndata(model, adata, keys, RECIPE, run_on, lambda recipe: [(recipe.task or TaskConfig()).batch])


def run_on(recipe: Recipe, files: ModelFiles, store: CellStore, origin: dict[str, Any], resume: str | None) -> Path:
    """Fine-tune on all cells of a store, but for those that validate."""
    from scfm.training.run import Job, fit, held_out_note, indices_of, token_config
    from scfm.training.rundir import open_run

    task = recipe.task or TaskConfig(name="integration")
    recipe = with_batch(recipe, task)
    expect_same_values(files, store)
    column, all_names = indices_of(store, [task.batch])
    batches = np.array(all_names[task.batch])[column[task.batch]]  # (N,) names: no batch is ever a number
    held_out = origin.get("manifest", {}).get("held_out")
    train, valid = split_rows(batches, recipe, store.n_cells - held_out["cells"] if held_out else None)
    codes, names = batch_codes(batches, train)
    if len(names) < 2:
        raise ScfmError(
            f"task.batch: obs column {task.batch!r} names {len(names)} batch among the training cells; integration "
            "needs at least 2"
        )
    read, notes = genes_to_read(store, train, batches, files, recipe, task)
    notes += [held_out_note(held_out, len(valid))] if held_out else []
    objectives = build_objectives(recipe.objectives, n_bins=recipe.data.n_bins, categories={task.batch: names})
    run = open_run(recipe, resume)
    scratch = task.setting == "scratch"
    new = replace(
        files,
        model=recipe.model,
        tokens=token_config(recipe),
        heads=list({head.task: head for objective in objectives for head in objective.heads()}.values()),
        cell_conditions={task.batch: names},
        genes_read=read,
        training_data={"stage": STAGES[task.setting], **origin, **({} if scratch else before(files))},
        cell_hashes=all_hashes(store, np.concatenate([train, valid]), None if scratch else files.cell_hashes),
    )
    torch.manual_seed(recipe.seed)
    network = new.build()
    # a model that reads hidden values has no flag for unknown genes
    unread = ["backbone.unknown_flag"] if recipe.model.attention == "full" else []
    start(network, new, files, recipe, unread, fresh=["backbone.cell_conditions.", "backbone.input_norm."])
    paced, why = paced_recipe(recipe, task, len(train))
    return fit(Job(paced, store, network, new, objectives, train, valid, {task.batch: codes}, [*notes, *why]), run)


def with_batch(recipe: Recipe, task: TaskConfig) -> Recipe:
    """Return the recipe with `task.batch` wherever model and objectives ask for it.

    Raises ScfmError for what integration is not: another model than scGPT, or a setting that trains no batch.
    """
    if recipe.model.name != "scgpt":
        raise ScfmError(
            f"task.name: integration trains a cell embedding by scGPT's objectives, and this model is "
            f"{recipe.model.name}; embed its cells as they are: scfm embed"
        )
    if task.setting not in STAGES:
        raise ScfmError(
            f"task.setting: {task.setting} is none of integration, whose weights for batches are new; "
            f"choose one of {', '.join(STAGES)}"
        )
    if "gep" not in [objective.name for objective in recipe.objectives]:
        raise ScfmError("objectives: gep is missing, by which integration is validated; its weight may be small")
    domain = task.batch if recipe.model.input_norm == "domain" else None
    return replace(
        recipe,
        task=task,
        model=replace(recipe.model, cell_conditions=[task.batch], domain=domain),
        objectives=[
            replace(objective, condition=task.batch) if objective.name == "dar" else objective
            for objective in recipe.objectives
        ],
    )


def split_rows(
    batches: NDArray[np.str_], recipe: Recipe, first_held_out: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return training and validation rows: a share of each batch, or the cells that were held out when built."""
    rows = np.arange(len(batches))
    if first_held_out is not None:
        return rows[:first_held_out], rows[first_held_out:]
    if recipe.data.valid_fraction == 0 or len(set(batches)) < 2:
        return rows, rows[:0]
    split = stratified_split(batches, recipe.data.valid_fraction, recipe.seed)
    return split.train, split.test


def batch_codes(batches: NDArray[np.str_], train: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[str]]:
    """Return (N,) codes and the names behind them: of batches with training cells, by name; -1 for all others.

    A batch without a training cell would keep the statistics it was made with, and spoil those of all batches together.
    """
    names = np.unique(batches[train])
    place = np.searchsorted(names, batches).clip(max=max(len(names) - 1, 0))
    return np.where(names[place] == batches, place, -1).astype(np.int64), names.tolist()


def genes_to_read(
    store: CellStore,
    train: NDArray[np.int64],
    batches: NDArray[np.str_],
    files: ModelFiles,
    recipe: Recipe,
    task: TaskConfig,
) -> tuple[list[str] | None, list[str]]:
    """Return ids of the genes that vary most within batches, None for all of the vocabulary, and what the log says.

    Raises ScfmError where no gene has counts enough.
    """
    if task.genes is None:
        return files.genes_read, []
    chosen = train
    if len(train) > CELLS_THAT_CHOOSE:
        chosen = np.sort(np.random.default_rng(recipe.seed).permutation(train)[:CELLS_THAT_CHOOSE])
    expression, enough = log_expression(files.reading(store), chosen)
    if not len(enough):
        raise ScfmError(f"no gene of the vocabulary has {FEWEST_COUNTS} counts in the {len(chosen):,} training cells")
    columns = enough[highly_variable(expression[:, enough], task.genes, batches[chosen])]
    note = f"genes: {len(columns):,} that vary most within batches, of {len(enough):,} with {FEWEST_COUNTS} counts"
    return [store.vocabulary.entries[entry].id for entry in columns], [note]


def log_expression(store: CellStore, rows: NDArray[np.int64]) -> tuple[csr_matrix, NDArray[np.int64]]:
    """Return log expression (n, genes of the vocabulary) of some rows, and the genes with counts enough, ascending.

    Counts are scaled to 10,000 a cell and log1p-transformed; normalised values are used as they are.
    """
    blocks = []
    at = np.empty(len(rows), np.int64)  # where each row stands in them
    done = 0
    for block, cells, places in store.parts(rows):
        blocks.append(take_cells(block, places))
        at[cells] = done + np.arange(len(cells))
        done += len(cells)
    cells_in = joined(blocks)
    values = csr_matrix(
        (cells_in.values.astype(np.float64), cells_in.genes.astype(np.int64), cells_in.offsets.astype(np.int64)),
        shape=(done, store.vocabulary.n_genes),
    )[at]
    totals = np.asarray(values.sum(axis=0)).ravel()
    if store.value_kind == "normalised":
        return values, np.flatnonzero(totals > 0)
    of_cells = np.asarray(values.sum(axis=1)).ravel()
    values.data *= np.repeat(10_000 / np.maximum(of_cells, 1), np.diff(values.indptr))
    np.log1p(values.data, out=values.data)
    return values, np.flatnonzero(totals >= FEWEST_COUNTS)
