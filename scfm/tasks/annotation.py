"""Cell-type annotation: a pretrained model, labelled cells, a classifier."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from scfm.checkpoints.native import ModelFiles
from scfm.data.store import CellStore
from scfm.errors import ScfmError
from scfm.evaluation.splits import stratified_split
from scfm.objectives import build_objectives
from scfm.recipe import ModelConfig, Recipe, TaskConfig
from scfm.tasks.finetuning import all_hashes, before, expect_same_values, on_anndata, on_shards, paced_recipe, start
from scfm.tasks.frozen import fit_frozen, frozen_head
from scfm.tasks.novel_types import set_threshold

if TYPE_CHECKING:
    from anndata import AnnData

    from scfm.pretrained import PretrainedModel

SMALL = 128  # models no wider than that want ten times the rate of large ones
# what a model's own card calls the run that made it
STAGES = {
    "full": "fine-tuning",
    "scratch": "from-scratch training",
    "lora": "fine-tuning (LoRA)",
    "probe": "linear-probe",
    "zero_shot": "zero-shot",
}


def finetune(recipe: Recipe, resume: str | None = None) -> Path:
    """Fine-tune `recipe.from_model` on the labelled cells of a shard directory; return the new model directory.

    Raises:
        ScfmError: the recipe cannot work, the shards have another vocabulary, or a label has too few cells.
    """
    return on_shards(recipe, run_on, resume)


def finetune_anndata(model: PretrainedModel, adata: AnnData, keys: dict[str, Any]) -> PretrainedModel:
    """Return a new model, fine-tuned to predict a label of `adata.obs`.

    Args:
        model: where to start, loaded from a model directory.
        adata: labelled cells.
        keys: recipe keys over those of `default_recipe`; without `out` the run is temporary.
    """
    default = default_recipe(model.files.model)
    return on_anndata(model, adata, keys, default, run_on, lambda recipe: [(recipe.task or TaskConfig()).label])


def default_recipe(model: ModelConfig) -> str:
    """Return the bundled recipe that a model is fine-tuned by where none is given."""
    if model.name == "scbert":
        return "finetune/scbert-annotation.yaml"
    return f"finetune/annotation{'-quickstart' if model.width <= SMALL else ''}.yaml"


def run_on(recipe: Recipe, files: ModelFiles, store: CellStore, origin: dict[str, Any], resume: str | None) -> Path:
    """Fit a classifier on the cells of a store, wherever it came from, in the setting that the recipe names."""
    from scfm.training.run import Job, fit, held_out_note, indices_of, token_config
    from scfm.training.rundir import is_main_process, open_run

    task = recipe.task or TaskConfig()
    expect_same_values(files, store)
    labels, names = labels_of(store, task)
    held_out = origin.get("manifest", {}).get("held_out")
    train, valid = split_rows(
        np.flatnonzero(labels >= 0), labels, recipe, store.n_cells - held_out["cells"] if held_out else None
    )
    notes = [held_out_note(held_out, len(valid))] if held_out else []
    rows = np.concatenate([train, valid])
    counts = np.bincount(labels[rows], minlength=len(names))
    weights = len(rows) / (len(names) * counts) if task.class_weights == "balanced" else None
    unread: list[str] = []  # what only value decoders read would never get a gradient without one
    if not any(objective.name in ("gep", "gepc", "cell_prompt") for objective in recipe.objectives):
        unread = ["backbone.cell_conditions.", "backbone.modality."]
        files = replace(files, gene_conditions=without(files.gene_conditions, recipe.model.modality))
        recipe = replace(recipe, model=replace(recipe.model, cell_conditions=[], modality=None))
    cell_conditions, condition_names = indices_of(store, recipe.cell_conditions)
    frozen = task.setting in ("probe", "zero_shot")
    objectives = build_objectives(
        recipe.objectives,
        n_bins=recipe.data.n_bins,
        labels=names,
        class_weights=None if weights is None else torch.tensor(weights, dtype=torch.float32),
        categories=condition_names,
    )
    heads = [frozen_head(task, names, len(train))] if frozen else [h for each in objectives for h in each.heads()]
    run = open_run(recipe, resume)
    scratch = task.setting == "scratch"
    new = replace(
        files,
        model=recipe.model,
        tokens=token_config(recipe),
        heads=list({head.task: head for head in heads}.values()),
        cell_conditions=condition_names,
        training_data={"stage": STAGES[task.setting], **origin, **({} if scratch else before(files))},
        cell_hashes=all_hashes(store, rows, None if scratch else files.cell_hashes),
    )
    torch.manual_seed(recipe.seed)
    network = new.build()
    start(network, new, files, recipe, unread)
    known = {**cell_conditions, "label": labels}
    paced, why = paced_recipe(recipe, task, len(train))
    job = Job(paced, store, network, new, objectives, train, valid, known, [*notes, *why])
    if not frozen:
        fit(job, run)
    elif is_main_process():
        fit_frozen(job, run, task)
    if task.novel_types != "none" and is_main_process():
        set_threshold(run.model, store, valid, cell_conditions, task.novel_types, task.known_kept)
    return run.model


def without(conditions: dict[str, list[str]], name: str | None) -> dict[str, list[str]]:
    return {other: names for other, names in conditions.items() if other != name}


def labels_of(store: CellStore, task: TaskConfig) -> tuple[NDArray[np.int64], list[str]]:
    """Return (N,) label codes, -1 for none, and the label names. Raises ScfmError where a label has too few cells."""
    if task.label not in store.obs:
        raise ScfmError(
            f"task.label: obs column {task.label!r} is not in the data, which carry {sorted(store.obs)}; "
            f"build the shards with `scfm prepare --obs {task.label}`"
        )
    column = store.obs[task.label]
    codes = np.asarray(column.codes, np.int64)
    counts = np.bincount(codes[codes >= 0], minlength=len(column.categories))
    kept = [
        code
        for code, name in enumerate(column.categories)
        if counts[code] and name.strip().lower() not in [value.lower() for value in task.unlabelled]
    ]
    if len(kept) < 2:
        raise ScfmError(f"task.label: obs column {task.label!r} names {len(kept)} label(s); at least 2 are needed")
    rare = {column.categories[code]: int(counts[code]) for code in kept if counts[code] < task.min_cells}
    if rare:
        raise ScfmError(
            f"task.label: {rare} have fewer than task.min_cells = {task.min_cells} cells; merge or drop these labels"
        )
    recode = np.full(len(column.categories) + 1, -1, np.int64)
    recode[kept] = np.arange(len(kept))
    return recode[codes], [column.categories[code] for code in kept]


def split_rows(
    rows: NDArray[np.int64], labels: NDArray[np.int64], recipe: Recipe, first_held_out: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return training and validation rows, each label on both sides.

    Where groups were held out when the shards were built, validation has their cells, from row `first_held_out` on.
    Raises ScfmError where a label then has no cell to train on.
    """
    most = (recipe.task or TaskConfig()).cells_per_type
    if first_held_out is not None:
        train, valid = (
            few_per_type(side, labels, most, recipe.seed)
            for side in (rows[rows < first_held_out], rows[rows >= first_held_out])
        )
        unseen = set(labels[valid].tolist()) - set(labels[train].tolist())
        if unseen:
            raise ScfmError(
                f"task.label: {len(unseen)} labels have only cells that were held out when the shards were built; "
                "hold out other groups, or list these labels in task.unlabelled"
            )
        return train, valid
    rows = few_per_type(rows, labels, most, recipe.seed)
    single = np.bincount(labels[rows]).max() == 1  # a single cell of a type cannot be on both sides
    if recipe.data.valid_fraction == 0 or single:
        return rows, rows[:0]
    split = stratified_split(labels[rows], recipe.data.valid_fraction, recipe.seed)
    return rows[split.train], rows[split.test]


def few_per_type(rows: NDArray[np.int64], labels: NDArray, most: int | None, seed: int) -> NDArray[np.int64]:
    """Return at most so many rows of each label, drawn by the seed: what fewer are drawn is among what more are.

    Args:
        rows: to draw from.
        labels: of all rows.
        most: rows of a label; None keeps all.
        seed: of the draw.
    """
    if most is None:
        return rows
    drawn = np.random.default_rng(seed).permutation(rows)
    kept = [drawn[labels[drawn] == label][:most] for label in np.unique(labels[rows])]
    return np.sort(np.concatenate(kept))
