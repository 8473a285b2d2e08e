"""What a recipe cannot say: values that contradict themselves or each other, each by its key."""

from __future__ import annotations

import math

from scfm.errors import ScfmError
from scfm.recipe import CheckpointConfig, GuardConfig, OptimizerConfig, Recipe
from scfm.recipe_task import wrong_task


def check(recipe: Recipe) -> None:
    """Refuse values that cannot work, naming the key. Raises ScfmError."""
    data, model = recipe.data, recipe.model
    rules = [
        (
            model.width % model.heads == 0 or model.name == "scbert",
            f"model.heads: {model.heads} does not divide model.width {model.width}",
        ),
        (0 <= model.attention_dropout < 1, f"model.attention_dropout: {model.attention_dropout} must lie in [0, 1)"),
        (data.n_bins >= 3, f"data.n_bins: {data.n_bins} is too few; at least 3 (zero, and two bins of values)"),
        (bool(data.mask_ratios), "data.mask_ratios: is empty; [0] hides nothing"),
        (all(0 <= r < 1 for r in data.mask_ratios), f"data.mask_ratios: {data.mask_ratios} must lie in [0, 1)"),
        (0 <= data.mask_kept < 1, f"data.mask_kept: {data.mask_kept} must lie in [0, 1)"),
        (
            data.mask_kept == 0 or model.attention == "full",
            f"data.mask_kept: {data.mask_kept} shows values of unknown genes, which generative attention never reads; "
            "set model.attention to full",
        ),
        (data.max_genes >= 1, f"data.max_genes: {data.max_genes} must be at least 1"),
        (
            data.tokens_per_pack == "auto" or data.tokens_per_pack > data.max_genes,
            f"data.tokens_per_pack: {data.tokens_per_pack} cannot hold one cell of {data.max_genes} genes and <cls>",
        ),
        (data.cells_per_batch >= 1, f"data.cells_per_batch: {data.cells_per_batch} must be at least 1"),
        (0 <= data.valid_fraction < 1, f"data.valid_fraction: {data.valid_fraction} must lie in [0, 1)"),
        (data.sample_power >= 0, f"data.sample_power: {data.sample_power:g} must be at least 0"),
        (data.sample_repeats >= 1, f"data.sample_repeats: {data.sample_repeats:g} must be at least 1"),
        (
            data.sample_by is not None or not data.sample_weights,
            "data.sample_weights: name groups, but data.sample_by does not say of which obs column",
        ),
        (
            all(weight > 0 for weight in data.sample_weights.values()),
            f"data.sample_weights: {data.sample_weights} must be above 0; `scfm prepare --where` leaves cells out",
        ),
        (recipe.checkpoint.patience >= 0, f"checkpoint.patience: {recipe.checkpoint.patience} must be at least 0"),
        *survival_rules(recipe.checkpoint, recipe.guard),
        (recipe.optimizer.lr > 0, f"optimizer.lr: {recipe.optimizer.lr} must be positive"),
        (0 <= recipe.optimizer.momentum < 1, f"optimizer.momentum: {recipe.optimizer.momentum} must lie in [0, 1)"),
        (bool(recipe.objectives), "objectives: is empty; name at least one, e.g. [{name: gep}, {name: gepc}]"),
    ]
    wrong = [message for holds, message in rules if not holds]
    names = [objective.name for objective in recipe.objectives]
    wrong += [f"objectives: {name} stands there twice" for name in sorted(set(names)) if names.count(name) > 1]
    most = [ratio * data.max_genes for ratio in data.mask_ratios]
    hides = any(math.ceil(n) if data.mask_candidates == "expressed" else int(n) for n in most)
    for name in ("gep", "gepc", "cell_prompt", "masked_bin"):
        if name in names and not hides:
            wrong.append(
                f"objectives: {name} predicts unknown genes, but data.mask_ratios {data.mask_ratios} hides none"
            )
    for objective in recipe.objectives:
        if objective.nonzero and objective.loss == "cross_entropy":
            wrong.append(
                f"objectives: {objective.name} has nonzero and loss cross_entropy; bin 0 of the latter says it already"
            )
    for objective in recipe.objectives:
        if data.values == "raw" and objective.loss == "cross_entropy":
            wrong.append(f"objectives: {objective.name} has loss cross_entropy over bins, but data.values is raw")
    if "masked_bin" in names and data.mask_candidates != "expressed":
        wrong.append("objectives: masked_bin predicts bins of expressed genes; set data.mask_candidates: expressed")
    if model.name == "scbert":
        if data.values == "raw":
            wrong.append("data.values: scBERT embeds bins; choose log2 or binned instead of raw")
        if data.mask_value != data.n_bins:
            wrong.append(f"data.mask_value: {data.mask_value:g}; scBERT's hidden genes hold data.n_bins, {data.n_bins}")
        if recipe.trainer.compile and model.mixer == "favor" and model.performer.kernel in ("gelu", "none"):
            wrong.append(f"trainer.compile: the kernel {model.performer.kernel} of model.performer does not compile")
        if data.cls_value not in range(data.n_bins):
            wrong.append(f"data.cls_value: {data.cls_value:g}; scBERT embeds bins, 0 to {data.n_bins - 1}")
    if data.values == "raw" and model.value_encoder == "category":
        wrong.append("model.value_encoder: category embeds bins, but data.values is raw; use continuous or scaling")
    if model.value_encoder == "scaling" and model.attention == "full" and hides:
        wrong.append("model.value_encoder: scaling has no way to mark a hidden value; use continuous or category")
    if recipe.optimizer.schedule == "cosine_restarts":
        wrong += wrong_cycles(recipe.optimizer)
    wrong += wrong_task(recipe.task, recipe.trainable, data.valid_fraction) if recipe.task else []
    if wrong:
        raise ScfmError("the recipe cannot work:\n  " + "\n  ".join(wrong))


def wrong_cycles(optimizer: OptimizerConfig) -> list[str]:
    """Return what keeps the cycles of cosine_restarts from working, by key."""
    warmup, length = optimizer.warmup, optimizer.cycle_epochs
    rules = [
        (
            warmup >= 0 and warmup == int(warmup) and warmup < length,
            f"optimizer.warmup: {warmup:g} must be whole epochs, fewer than the {length} of optimizer.cycle_epochs",
        ),
        (optimizer.cycle_growth >= 1, f"optimizer.cycle_growth: {optimizer.cycle_growth:g} must be at least 1"),
        (0 < optimizer.cycle_decay <= 1, f"optimizer.cycle_decay: {optimizer.cycle_decay:g} must lie in (0, 1]"),
        (
            0 <= optimizer.min_lr <= optimizer.lr,
            f"optimizer.min_lr: {optimizer.min_lr:g} must lie in [0, optimizer.lr]",
        ),
    ]
    return [message for holds, message in rules if not holds]


def survival_rules(checkpoint: CheckpointConfig, guard: GuardConfig) -> list[tuple[bool, str]]:
    """Return what saving and guarding ask of their keys: whether it holds, and what to say where it does not."""
    return [
        (checkpoint.every_steps >= 1, f"checkpoint.every_steps: {checkpoint.every_steps} must be at least 1"),
        (checkpoint.every_minutes >= 0, f"checkpoint.every_minutes: {checkpoint.every_minutes:g} must be at least 0"),
        (checkpoint.keep >= 1, f"checkpoint.keep: {checkpoint.keep} must be at least 1"),
        (
            checkpoint.probe is not None or not checkpoint.best.startswith("probe/"),
            f"checkpoint.best: {checkpoint.best} is measured by a probe; name its cells in checkpoint.probe",
        ),
        (guard.spike >= 0, f"guard.spike: {guard.spike:g} must be at least 0"),
        (guard.window >= 2, f"guard.window: {guard.window} must be at least 2"),
        (guard.patience >= 1, f"guard.patience: {guard.patience} must be at least 1"),
        (guard.rollbacks >= 0, f"guard.rollbacks: {guard.rollbacks} must be at least 0"),
    ]
