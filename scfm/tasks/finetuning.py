"""What all fine-tuning tasks share: where cells and weights come from, how long it takes, what is remembered of it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from scfm.checkpoints.native import ModelFiles, load_weights, read_model, read_weights, save_model
from scfm.data.hashing import store_hashes
from scfm.data.remote import find_shards
from scfm.data.sources import store_from_anndata
from scfm.data.store import CellStore
from scfm.errors import ScfmError
from scfm.model.heads import HeadSpec
from scfm.recipe import Recipe, TaskConfig
from scfm.recipe_check import check
from scfm.recipe_reader import bundled, like, read_recipe

if TYPE_CHECKING:
    from anndata import AnnData

    from scfm.pretrained import PretrainedModel

# a task on the cells of a store: recipe, the model to start from, cells, their origin, resume -> model directory
RunOn = Callable[[Recipe, ModelFiles, CellStore, dict[str, Any], str | None], Path]


def on_shards(recipe: Recipe, run_on: RunOn, resume: str | None) -> Path:
    """Run a task on the shard directory that a recipe names, from the model that it names.

    Raises ScfmError where the recipe names neither or cannot work, or the shards have another vocabulary.
    """
    check(recipe)
    if recipe.from_model is None:
        raise ScfmError("from: is not set; name the model directory to start from (--from MODEL)")
    if recipe.data.shards is None:
        raise ScfmError("data.shards: is not set; name a directory written by `scfm prepare`")
    shards = find_shards(recipe.data.shards, recipe.data.cache, recipe.data.cache_gb)
    files = read_model(recipe.from_model)
    store = shards.open()
    if store.vocabulary.hash != files.vocabulary.hash:
        raise ScfmError(
            f"{shards.location}: its genes are numbered by another vocabulary than the model's; prepare the cells "
            f"again with `scfm prepare ... --vocabulary {Path(recipe.from_model) / 'vocab.json'}`"
        )
    return run_on(recipe, files, store, {"manifest": shards.manifest}, resume)


def on_anndata(
    model: PretrainedModel,
    adata: AnnData,
    keys: dict[str, Any],
    default: str,
    run_on: RunOn,
    columns: Callable[[Recipe], Sequence[str]],
) -> PretrainedModel:
    """Run a task on cells in memory; return the new model.

    Args:
        model: where to start.
        adata: the cells.
        keys: recipe keys over those of the default recipe; without `out` the run is temporary.
        default: name of a bundled recipe.
        run_on: the task.
        columns: the obs columns that the task reads, besides those that the recipe's model and objectives name.
    """
    from scfm.pretrained import load

    with tempfile.TemporaryDirectory() as folder:
        start = Path(model.source)
        if not start.is_dir():  # a model that was never saved
            start = Path(folder) / "start"
            save_model(start, model.network, model.files)
        given = {"out": str(Path(folder) / "run"), **keys, "from": str(start)}
        recipe = read_recipe(bundled(default), given, like(model.files))
        check(recipe)
        asked = [*columns(recipe), *recipe.cell_conditions, recipe.data.sample_by]
        store = store_from_anndata(
            adata,
            model.files.vocabulary,
            accept_normalised=model.files.value_kind == "normalised",
            obs_columns=list(dict.fromkeys(column for column in asked if column)),
        )
        tuned = load(run_on(recipe, model.files, store, {}, None))
        if "out" not in keys:  # the run is about to go: keep what is still read from it, and name no lost folder
            tuned.files.cell_hashes = np.array(tuned.files.cell_hashes)
            tuned.source = f"{model.source}, fine-tuned"
    return tuned


def expect_same_values(files: ModelFiles, store: CellStore) -> None:
    """Raise ScfmError where a model was trained on other values (counts, normalised ones) than the cells hold."""
    if store.value_kind != files.value_kind:
        raise ScfmError(f"the model was trained on {files.value_kind}, these cells hold {store.value_kind}")


def start(
    network: nn.Module,
    new: ModelFiles,
    files: ModelFiles,
    recipe: Recipe,
    unread: Sequence[str] = (),
    fresh: Sequence[str] = (),
) -> None:
    """Give a network the weights that it starts from: those of the pretrained model, shared heads among them.

    From scratch it keeps its random ones; a gene table, which no training made, it gets all the same.

    Args:
        network: as the new model has it.
        new: the new model.
        files: the pretrained model, which `recipe.from_model` holds.
        recipe: the run.
        unread: starts of the names of pretrained weights that the new model has no place for.
        fresh: starts of the names of backbone weights that stay random whatever the pretrained model has there.

    Raises ScfmError where the weights do not fit.
    """
    source = str(recipe.from_model)
    pretrained = {n: w for n, w in read_weights(source).items() if not n.startswith((*unread, *fresh))}
    pretrained |= {n: w for n, w in network.state_dict().items() if n.startswith(tuple(fresh))}
    if recipe.task and recipe.task.setting == "scratch":
        if recipe.model.gene_table:
            load_weights(network, pretrained, source, prefix="backbone.gene_embedding.")
        return
    load_weights(network, pretrained, source, prefix="backbone.")
    for head in new.heads:
        if any(replace(former, nonzero=head.nonzero) == head for former in files.heads):
            adopt_head(network, head, pretrained, source)


def adopt_head(network: nn.Module, head: HeadSpec, pretrained: dict[str, Tensor], source: str) -> None:
    """Copy the weights of a head that the pretrained model has too.

    What a value decoder reads besides, as the batch, gets weights of zero, so that it predicts at first what it did
    before. Only whether a gene is expressed (`nonzero`) may be new; that starts from random weights.
    """
    prefix = f"heads.{head.task}."
    own = {name: tensor for name, tensor in network.state_dict().items() if name.startswith(prefix)}
    given = {name: tensor for name, tensor in own.items() if name.startswith(f"{prefix}nonzero.")}
    given |= {name: grown(tensor, own[name]) for name, tensor in pretrained.items() if name in own}
    load_weights(network, given, source, prefix=prefix)


def grown(tensor: Tensor, own: Tensor) -> Tensor:
    """Return a tensor in the shape of another where that is nowhere smaller, zeros behind what it held."""
    if tensor.dim() != own.dim() or any(a > b for a, b in zip(tensor.shape, own.shape, strict=True)):
        return tensor
    larger = own.new_zeros(own.shape)
    larger[tuple(slice(size) for size in tensor.shape)] = tensor
    return larger


def before(files: ModelFiles) -> dict[str, Any]:
    """Return what the card of a new model says of the training of the one that it started from."""
    return {"pretraining": files.training_data}


def paced_recipe(recipe: Recipe, task: TaskConfig, n_cells: int) -> tuple[Recipe, list[str]]:
    """Return the recipe with rate, batch and epochs that fit setting and cells, and what the log says of it."""
    notes = []
    if task.setting == "lora":
        recipe = replace(recipe, optimizer=replace(recipe.optimizer, lr=recipe.optimizer.lr * task.lora.lr_factor))
    if n_cells < recipe.data.cells_per_batch:
        notes.append(f"{n_cells} cells in a step: there are no {recipe.data.cells_per_batch} to learn from")
        recipe = replace(recipe, data=replace(recipe.data, cells_per_batch=n_cells))
    trainer, epoch = recipe.trainer, max(1, n_cells // recipe.data.cells_per_batch)
    if trainer.max_epochs is not None and 0 < epoch * trainer.max_epochs < task.min_steps:
        longer = math.ceil(task.min_steps / (epoch * trainer.max_epochs))
        epochs, every = trainer.max_epochs * longer, (trainer.check_val_every_n_epoch or 1) * longer
        recipe = replace(recipe, trainer=replace(trainer, max_epochs=epochs, check_val_every_n_epoch=every))
        notes.append(f"{epochs} epochs, a validation every {every}, to reach task.min_steps {task.min_steps}")
    return recipe, notes


def all_hashes(store: CellStore, rows: NDArray[np.int64], before: NDArray[np.uint64] | None) -> NDArray[np.uint64]:
    """Return the sorted hashes of the cells used here and of those that the model had seen before."""
    hashes = store_hashes(store)[rows]
    return np.sort(np.concatenate([hashes, hashes[:0] if before is None else before]))
