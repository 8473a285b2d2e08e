"""A training run from a recipe to a model directory: pretraining, and what fine-tuning shares with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from torch import nn

from scfm.baselines.majority_bin import majority_bin_accuracies
from scfm.baselines.mean_value import baselines_of, mean_value_losses
from scfm.bench.report import device_name
from scfm.ceiling import product_type
from scfm.checkpoints.card import RunFacts, model_card
from scfm.checkpoints.native import ModelFiles, save_model
from scfm.data.hashing import hashes_without, load_hashes, row_hashes
from scfm.data.rows import SomeRows, rows_at, without
from scfm.data.store import CellStore, Codes, ManyCodes
from scfm.data.tokens import TokenConfig
from scfm.data.vocabulary import Vocabulary
from scfm.errors import ScfmError
from scfm.evaluation.training_plots import loss_curves
from scfm.metrics_file import read_metrics
from scfm.model.attention import pick_backend
from scfm.model.lora import UPDATES, add_lora, merge_lora
from scfm.objectives import Objective, build_objectives
from scfm.recipe import ModelConfig, Recipe
from scfm.recipe_check import check
from scfm.training.callbacks import MetricsCsv, Progress
from scfm.training.checkpointing import BestWeights, FinalValidation, NewestCheckpoints, Patience
from scfm.training.datamodule import CellDataModule
from scfm.training.features import redraw_callbacks
from scfm.training.guard import Guard
from scfm.training.launch import build_trainer, own_port, set_up_blocks
from scfm.training.module import FoundationModule
from scfm.training.run_log import RunLog
from scfm.training.rundir import RunDirectory, open_run
from scfm.training.saving import BackgroundCheckpoints, is_full
from scfm.training.together import Together
from scfm.training.wandb_run import wandb_loggers

if TYPE_CHECKING:
    from scfm.training.probe import Probe


@dataclass
class Job:
    """What is trained on what.

    Attributes:
        recipe: the resolved recipe.
        store: the cells.
        network: the model to train, weights in place.
        files: what is written beside the weights.
        objectives: the terms of the loss.
        train_rows: rows of the store to train on.
        valid_rows: rows held out.
        cell_conditions: name -> (N,) index of every row of the store.
        notes: what the log says before the first step.
        hardware: what it runs on, for the card.
    """

    recipe: Recipe
    store: CellStore
    network: nn.Module
    files: ModelFiles
    objectives: Sequence[Objective]
    train_rows: SomeRows
    valid_rows: SomeRows
    cell_conditions: dict[str, Codes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    hardware: str = ""


def pretrain(recipe: Recipe, resume: str | None = None) -> Path:
    """Train a model from scratch on a shard directory; return its model directory.

    Args:
        recipe: the run; `data.shards` names the cells.
        resume: `auto` or a checkpoint path continues a stopped run bit for bit (CPU, fp32).

    Raises:
        ScfmError: the recipe cannot work, or the run directory holds something else.
    """
    from scfm.data.remote import find_shards

    check(recipe)
    if recipe.data.shards is None:
        raise ScfmError("data.shards: is not set; name a directory written by `scfm prepare`")
    shards = find_shards(recipe.data.shards, recipe.data.cache, recipe.data.cache_gb)
    manifest, store = shards.manifest, shards.open(recipe.data.skip_damaged)
    held_out = manifest.get("held_out")
    job = pretraining_job(recipe, store, held_out=held_out["cells"] if held_out else 0)
    if held_out:
        job.notes.append(held_out_note(held_out, len(job.valid_rows)))
    job.files.training_data = {"stage": "pretraining", "manifest": manifest}
    # cells.hash of the shards has all cells; those that only chose the checkpoint were never trained on
    validated = row_hashes(store, np.asarray(job.valid_rows, np.int64))
    job.files.cell_hashes = hashes_without(load_hashes(shards.index / "cells.hash"), validated)
    return fit(job, open_run(recipe, resume))


def pretraining_job(recipe: Recipe, store: CellStore, *, held_out: int = 0) -> Job:
    """Return a fresh model of a recipe, its objectives, and which cells of a store it trains on.

    Args:
        recipe: the run.
        store: the cells.
        held_out: how many cells at the end were held out when the shards were built.

    Raises:
        ScfmError: the recipe starts from a model, or asks for what the cells do not carry.
    """
    if recipe.from_model:
        raise ScfmError("from: pretraining starts from scratch; `scfm finetune` starts from a model directory")
    cell_conditions, cell_names = indices_of(store, recipe.cell_conditions)
    objectives = build_objectives(recipe.objectives, n_bins=recipe.data.n_bins, categories=cell_names)
    gene_tables, gene_names = {}, {}
    for name, path in recipe.data.gene_conditions.items():
        from scfm.data.conditions import read_gene_condition

        gene_tables[name], gene_names[name] = read_gene_condition(Path(path), store.vocabulary)
    files = ModelFiles(
        model=recipe.model,
        tokens=token_config(recipe),
        value_kind=store.value_kind,
        vocabulary=store.vocabulary,
        heads=list({head.task: head for objective in objectives for head in objective.heads()}.values()),
        cell_conditions=cell_names,
        gene_conditions=gene_names,
        gene_tables={name: table.tolist() for name, table in gene_tables.items()},
    )
    torch.manual_seed(recipe.seed)
    network = files.build()
    notes = [fill_gene_vectors(network, recipe, store.vocabulary)] if recipe.model.gene_table else []
    lost = store.lost_rows
    held = held_out - int((lost >= store.n_cells - held_out).sum())
    rows = without(store.n_cells, lost)
    if held_out and store.lost and held in (0, len(rows)):
        raise ScfmError(
            f"data.skip_damaged: all cells to {'train on' if held else 'validate on (held out when built)'} are in "
            f"damaged shards ({store.lost[0].why}); copy them again, or build the shards again"
        )
    train_rows, valid_rows = hold_out(
        len(rows), recipe.data.valid_fraction, recipe.seed, shuffled=store.shuffled, held_out=held
    )
    if len(lost):
        valid_rows = rows_at(rows, np.asarray(valid_rows, np.int64))
        train_rows = without(store.n_cells, np.union1d(lost, valid_rows))
    return Job(recipe, store, network, files, objectives, train_rows, valid_rows, cell_conditions, notes)


def fill_gene_vectors(network: nn.Module, recipe: Recipe, vocabulary: Vocabulary) -> str:
    """Copy the vectors of `model.gene_table` into a fresh network; say how many genes have one.

    Raises ScfmError for a table that does not fit.
    """
    from scfm.data.gene_vectors import read_gene_vectors

    table = str(recipe.model.gene_table)
    vectors, found = read_gene_vectors(Path(table), vocabulary, recipe.model.width)
    network.get_buffer("backbone.gene_embedding.weight").copy_(torch.from_numpy(vectors))
    without = vocabulary.n_genes - found
    return f"gene table {table}: vectors of {found:,} of {vocabulary.n_genes:,} genes; the other {without:,} have zeros"


def fit(job: Job, run: RunDirectory) -> Path:
    """Train a job to the end of its recipe and export its best weights, plots and card; return the model directory.

    Raises:
        ScfmError: the recipe cannot work, the run diverged, or there is no room for the model.
        RunStopped: the run was asked to stop and is saved, or one of its processes was lost.
    """
    from scfm.training.probe import Probe

    log = RunLog(run.log)
    if run.is_finished:
        log.say(f"{run.path}: this run is finished, nothing is left to do; model: {run.model}")
        return run.model
    recipe, validates = job.recipe, len(job.valid_rows) > 0
    for key in ("patience", "probe"):
        if getattr(recipe.checkpoint, key) and not validates:
            raise ScfmError(f"checkpoint.{key}: no cells are held out to judge by; raise data.valid_fraction")
    files = BackgroundCheckpoints(run.checkpoints, recipe.checkpoint.keep)
    guard = Guard(recipe.guard, files, log.say, recipe.trainer.log_every_n_steps)
    together = Together(log.say_anyhow, files.wait)
    module, data = modules_of(job, guard)
    best = BestWeights(run.checkpoints, recipe.checkpoint)
    probes = [Probe(recipe.checkpoint.probe, job, together)] if recipe.checkpoint.probe else []
    progress = Progress(log, recipe.trainer.log_every_n_steps)
    newest = NewestCheckpoints(files, recipe.checkpoint, together, guard, log.say)
    redraws = redraw_callbacks(job.network, recipe.seed)
    judges = [*([best] if validates else []), *([Patience(recipe.checkpoint)] if recipe.checkpoint.patience else [])]
    callbacks = [together, FinalValidation(), *probes, guard, newest, *progress.watchers, *redraws, *judges]
    metrics = MetricsCsv(run.metrics, run.resume_step)
    loggers = [metrics, *wandb_loggers(recipe, run)]
    trainer = build_trainer(recipe, callbacks=callbacks, logger=loggers, default_root_dir=run.path, plugins=[files])
    job.hardware = f"{trainer.world_size} x {device_name(trainer.strategy.root_device)}"
    if trainer.is_global_zero:
        lost = [f"{len(lost.rows):,} cells are left out: {lost.why}" for lost in job.store.lost]
        for line in (opening_line(job, trainer), *data.said, *lost, *job.notes, *(probe.said for probe in probes)):
            log.say(line)
        if validates and run.resume_from is None and (found := measured_baselines(job, data, probes)):
            metrics.log_metrics(found, step=0)
            log.say("  ".join(f"{name} {value:.4g}" for name, value in found.items()))
    with own_port(), together.running(trainer):
        trainer.fit(module, data, ckpt_path=run.resume_from, weights_only=True)
        job.network = module.network
        if trainer.is_global_zero:
            export(job, run, best.best_model_path)
            log.say(f"model: {run.model}")
    return run.model


def measured_baselines(job: Job, data: CellDataModule, probes: Sequence[Probe] = ()) -> dict[str, float]:
    """Return what is to be beaten, as names of metrics: trivial predictions of hidden genes, probes of log counts."""
    names, n_genes = {objective.name for objective in job.objectives}, len(job.store.vocabulary)
    found = mean_value_losses(data, n_genes) if "gep" in names else {}
    found |= majority_bin_accuracies(data, job.recipe.data.n_bins) if "masked_bin" in names else {}
    return found | {name: score for probe in probes for name, score in probe.baseline().items()}


def modules_of(job: Job, guard: Guard | None = None) -> tuple[FoundationModule, CellDataModule]:
    """Return what a trainer takes: the network set up to train, under a guard if there is one, and its cells."""
    recipe = job.recipe
    choose_trainable(job.network, recipe)
    set_up_blocks(job.network, recipe.trainer)
    store = job.files.reading(job.store)
    data = CellDataModule(
        store, job.files.tokeniser(), recipe.data, job.train_rows, job.valid_rows, job.cell_conditions, recipe.seed
    )
    return FoundationModule(job.network, job.objectives, recipe.optimizer, recipe.seed, guard), data


def export(job: Job, run: RunDirectory, best: str) -> None:
    """Write the native model directory with the best weights (the last ones without validation), plots and card.

    Raises ScfmError where there is no room for them.
    """
    if best:
        weights = torch.load(best, weights_only=True, map_location="cpu")["state_dict"]
        job.network.load_state_dict({name.removeprefix("network."): tensor for name, tensor in weights.items()})
    merge_lora(job.network)
    try:
        metrics = read_metrics(run.metrics)
        loss_curves(metrics, run.plots / "losses.png", baselines_of(metrics))
        write_model_directory(job, run)
        run.finish()
    except Exception as error:
        if not is_full(error):
            raise
        raise ScfmError(
            f"{run.model}: no space left to write the model; its weights and the checkpoints are safe in "
            f"{run.checkpoints}. Free some space, and run the same command again with --resume auto"
        ) from error


def write_model_directory(job: Job, run: RunDirectory) -> None:
    """Write the native model directory of a job, and its card, from the weights that its network has."""
    metrics = read_metrics(run.metrics)
    facts = RunFacts(
        sum(p.numel() for p in job.network.parameters()),
        len(job.train_rows),
        len(job.valid_rows),
        job.hardware,
        majority_accuracy(job.cell_conditions.get("label"), job.train_rows, job.valid_rows),
    )
    job.files.card = model_card(job.recipe, job.files, metrics, baselines_of(metrics), facts)
    run.card.write_text(job.files.card, encoding="utf-8")
    save_model(run.model, job.network, job.files, replace=True)


def majority_accuracy(labels: Codes | None, train: SomeRows, valid: SomeRows) -> float | None:
    """Return how often the label that is most frequent in training is right in validation; None without labels."""
    if labels is None or len(valid) == 0:
        return None
    learned, judged = (np.asarray(labels[np.asarray(rows, np.int64)], np.int64) for rows in (train, valid))
    return float((judged == np.bincount(learned).argmax()).mean())


def opening_line(job: Job, trainer: L.Trainer) -> str:
    """Say what is about to run: sizes, cells, device, attention backend and why that one."""
    device = trainer.strategy.root_device
    parameters = sum(p.numel() for p in job.network.parameters())
    trained = sum(p.numel() for p in job.network.parameters() if p.requires_grad)
    some = f", {trained:,} of them trained" if trained < parameters else ""
    model = job.recipe.model
    mixing, reason = mixing_of(model, device, trainer.precision)
    return (
        f"{model.name}: {parameters:,} parameters{some}; {len(job.train_rows):,} training and "
        f"{len(job.valid_rows):,} validation cells, {job.store.vocabulary.n_genes:,} genes; "
        f"{trainer.world_size} x {device.type}, precision {trainer.precision}; attention {mixing} ({reason})"
    )


def mixing_of(model: ModelConfig, device: torch.device, precision: str | int) -> tuple[str, str]:
    """Return what lets the genes of a cell read each other, an attention backend or scBERT's mixer, and why or how."""
    form = model.performer
    head_width = form.head_width if model.name == "scbert" else model.width // model.heads
    if model.name == "scbert" and model.mixer != "softmax":
        features = f"{form.mode}, kernel {form.kernel}, " if model.mixer == "favor" else ""
        return model.mixer, f"{features}{model.heads} heads of {head_width}"
    dtype = product_type(str(precision))
    return pick_backend(device, dtype, head_width, model.backend, model.attention_dropout)


def token_config(recipe: Recipe) -> TokenConfig:
    """Return the part of the recipe's data section that says how a cell becomes tokens."""
    data = recipe.data
    return TokenConfig(
        genes=data.genes,
        max_genes=data.max_genes,
        values=data.values,
        n_bins=data.n_bins,
        tie_policy=data.tie_policy,
        mask_ratios=tuple(data.mask_ratios),
        mask_candidates=data.mask_candidates,
        mask_kept=data.mask_kept,
        cls_value=data.cls_value,
        mask_value=data.mask_value,
        seed=recipe.seed,
    )


def hold_out(
    n_cells: int, fraction: float, seed: int, *, shuffled: bool, held_out: int = 0
) -> tuple[SomeRows, SomeRows]:
    """Return training and validation rows.

    Where whole groups (donors, sources) were held out when the shards were built, these are the last `held_out` cells
    and validation has just them, whatever the fraction. Else either side is a fair sample of the cells: two ranges
    where the shards were shuffled, drawn rows where they were not.
    """
    if held_out:
        return range(n_cells - held_out), range(n_cells - held_out, n_cells)
    n_train = n_cells - round(n_cells * fraction)
    if shuffled:
        return range(n_train), range(n_train, n_cells)
    drawn = np.sort(np.random.default_rng(seed).choice(n_cells, n_cells - n_train, replace=False, shuffle=False))
    return without(n_cells, drawn), drawn


def held_out_note(held_out: Mapping[str, Any], n_cells: int) -> str:
    """Say where the validation cells, so many, come from, where a manifest says which groups were held out."""
    return (
        f"validation: {n_cells:,} cells of {len(held_out['groups']):,} groups of {held_out['by']} that "
        "were held out when the shards were built; data.valid_fraction does not apply"
    )


def indices_of(store: CellStore, columns: Sequence[str]) -> tuple[dict[str, Codes], dict[str, list[str]]]:
    """Return the codes of obs columns and their category names. Raises ScfmError where one is absent or has gaps.

    Codes of mapped shards are read where they lie; those of shards that are fetched are copied, in their own type.
    """
    indices: dict[str, Codes] = {}
    names = {}
    for column in columns:
        if column not in store.obs:
            raise ScfmError(
                f"obs column {column!r}: is not in the data, which carry {sorted(store.obs)}; "
                f"build the shards with `scfm prepare --obs {column}`"
            )
        codes = store.obs[column].codes
        if isinstance(codes, ManyCodes) and not codes.in_memory:
            codes = np.asarray(codes)
        parts = codes.arrays if isinstance(codes, ManyCodes) else [codes]
        if missing := sum(int((part < 0).sum()) for part in parts):
            raise ScfmError(f"obs column {column!r}: {missing:,} cells have no value in it")
        indices[column], names[column] = codes, list(store.obs[column].categories)
    return indices, names


def choose_trainable(network: nn.Module, recipe: Recipe) -> None:
    """Train what a recipe says: the parameters that `trainable` names, or low-rank updates of LoRA and the heads."""
    task = recipe.task
    if task is None or task.setting != "lora":
        set_trainable(network, recipe.trainable)
        return
    add_lora(network, task.lora.rank, task.lora.alpha, task.lora.layers)
    set_trainable(network, [*UPDATES, "heads.*"])


def set_trainable(network: nn.Module, patterns: Sequence[str]) -> None:
    """Train only the parameters whose names match a pattern. Raises ScfmError for a pattern that matches none."""
    names = [name for name, _ in network.named_parameters()]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise ScfmError(f"trainable: {pattern!r} matches no parameter; they are named like {names[:3]} ...")
    for name, parameter in network.named_parameters():
        parameter.requires_grad = any(fnmatch(name, pattern) for pattern in patterns)
