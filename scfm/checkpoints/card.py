"""The model card: README.md of a model, filled from the run and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scfm.baselines.majority_bin import majority_bins_of
from scfm.checkpoints.card_data import data_section, limits_section
from scfm.checkpoints.native import ModelFiles
from scfm.checkpoints.report import Report
from scfm.metrics_file import hours_of
from scfm.recipe import CheckpointConfig, ModelConfig, Recipe
from scfm.run_status import spoken
from scfm.version import __version__

LICENCE = [
    "## Licence",
    "Not chosen yet: whoever publishes the model sets `license:` in the head of this file, as the licences of the data "
    "above allow. scfm itself is under Apache-2.0.",
    "",
]
PAPERS = {
    "scGPT": "Cui et al., Nature Methods 2024",
    "scBERT": "Yang et al., Nature Machine Intelligence 2022",
}


@dataclass(frozen=True)
class RunFacts:
    """What only the run itself knows.

    Attributes:
        n_parameters: all weights of the model.
        n_train, n_valid: cells trained on, and held out to validate.
        hardware: what it ran on, in words; empty where nothing says it.
        majority: accuracy of always guessing the most frequent label, on the validation cells; None without labels.
    """

    n_parameters: int
    n_train: int
    n_valid: int
    hardware: str = ""
    majority: float | None = None


def model_card(
    recipe: Recipe,
    files: ModelFiles,
    metrics: Sequence[tuple[int, str, float]],
    baselines: dict[str, float],
    facts: RunFacts,
) -> str:
    """Return the card as Markdown.

    Args:
        recipe: the resolved recipe of the run.
        files: the model's own description.
        metrics: rows of metrics.csv.
        baselines: mean squared error of predicting a mean, where it was measured.
        facts: what the run knows besides.
    """
    model, tokens = files.model, files.tokens
    stage = files.training_data.get("stage", "training")
    lines = [
        *header(model.name),
        f"# {model.name}, {facts.n_parameters:,} parameters",
        "",
        f"A single-cell foundation model, written by scfm {__version__} at the end of a {stage} run; every figure "
        "below comes from that run.",
        "",
        *how_to_load(bool(labels_of(files))),
        "## Model",
        "| | |",
        "|---|---|",
        f"| width, heads, layers, hidden | {model.width}, {model.heads}, {model.layers}, {model.hidden} |",
        f"| {mixing_of(model)} |",
        f"| values | {values_of(files)} |",
        f"| genes | {files.vocabulary.n_genes:,} in the vocabulary, at most {tokens.max_genes:,} per cell |",
        *([f"| gene vectors | frozen, from {shortened(model.gene_table)} |"] if model.gene_table else []),
        f"| heads | {', '.join(f'{head.task} ({head.kind})' for head in files.heads) or 'none'} |",
        f"| conditions | {', '.join([*files.cell_conditions, *files.gene_conditions]) or 'none'} |",
        "",
        "## Training",
        "| | |",
        "|---|---|",
        f"| cells | {facts.n_train:,} to train on, {facts.n_valid:,} held out to validate |",
        *how_trained(recipe, metrics, facts),
        f"| seed | {recipe.seed} |",
    ]
    if recipe.from_model:
        lines.append(f"| started from | {shortened(recipe.from_model)} |")
    lines += ["", *data_section(files)]
    lines += validation_section(metrics, baselines, recipe.checkpoint, facts.majority)
    if labels := labels_of(files):
        lines += ["## Labels", "", ", ".join(labels), ""]
    return "\n".join([*lines, *limits_section(files, facts.n_train, facts.n_valid), *LICENCE])


def header(name: str, *more: str) -> list[str]:
    """Return the head of a card as the Hub reads it."""
    return [
        "---",
        "library_name: scfm",
        "license: unknown",
        "pipeline_tag: feature-extraction",
        f"tags: [{', '.join(['biology', 'single-cell', 'transcriptomics', 'foundation-model', name, *more])}]",
        "---",
    ]


def how_to_load(predicts: bool = False) -> list[str]:
    """Return the lines that load the model."""
    return [
        "```python",
        "import scfm",
        'model = scfm.load("path/to/this/folder")  # or its name on the Hub: "org/name"',
        'adata = model.embed(adata)  # raw counts in X or raw.X -> adata.obsm["X_scfm"]',
        *(["adata = model.predict(adata)  # labels and probabilities"] if predicts else []),
        "```",
        "",
    ]


def shortened(path: str) -> str:
    """Return the end of an absolute path: the folders above it are nobody's business where the card is published."""
    parts = Path(path).parts
    return path if not Path(path).is_absolute() or len(parts) <= 4 else str(Path("...", *parts[-3:]))


def how_trained(recipe: Recipe, metrics: Sequence[tuple[int, str, float]], facts: RunFacts) -> list[str]:
    """Return what learned, how, for how long and on what, as rows of a table."""
    task = recipe.task
    what = {
        "full": f"all weights that match {', '.join(recipe.trainable)}",
        "scratch": "all weights, from random ones",
        "lora": f"low-rank updates, rank {task.lora.rank}, alpha {task.lora.alpha:g}, and the head" if task else "",
        "probe": "logistic regression on the frozen cell embedding",
        "zero_shot": f"nothing: the {task.neighbours} nearest labelled cells vote" if task else "",
    }
    setting = [f"| setting | {task.setting}: {what[task.setting]} |"] if task else []
    if task and task.setting in ("probe", "zero_shot"):
        return setting
    steps, cells = max((row[0] for row in metrics), default=0), min(recipe.data.cells_per_batch, facts.n_train)
    hours = hours_of(list(metrics))
    return [
        *setting,
        f"| objectives | {', '.join(f'{o.weight:g} x {o.name}' for o in recipe.objectives)} |",
        f"| optimizer | {recipe.optimizer.name}, peak rate {recipe.optimizer.lr:g}, clip {recipe.optimizer.clip:g} |",
        f"| steps | {steps:,}, of {cells:,} cells each: {steps * cells / max(facts.n_train, 1):,.1f} times all cells |",
        f"| precision | {recipe.trainer.precision} |",
        *([f"| time | {spoken(3600 * hours)} |"] if hours is not None else []),
        *([f"| hardware | {facts.hardware} |"] if facts.hardware else []),
    ]


def values_of(files: ModelFiles) -> str:
    """Return in words what a gene's value is and how the model reads it."""
    n_bins, model = files.tokens.n_bins, files.model
    read_as = {
        "binned": f"{n_bins} quantile bins per cell",
        "log2": f"log2(1 + expression per 10,000) rounded down, at most {n_bins - 1}",
        "raw": "as they are",
    }
    encoder = "embedding of bins" if model.name == "scbert" else f"{model.value_encoder} encoder"
    return f"{files.value_kind}, {read_as[files.tokens.values]}, {encoder}"


def mixing_of(model: ModelConfig) -> str:
    """Return how the genes of a cell read each other, as two columns of a table."""
    form = model.performer
    if model.name != "scbert":
        return f"attention | {model.attention}"
    features = f", {form.mode}, kernel {form.kernel}" if model.mixer == "favor" else ""
    return f"mixer | {model.mixer}{features}, heads of width {form.head_width}"


def converted_card(files: ModelFiles, report: Report) -> str:
    """Return the card of a model that was converted from another program's checkpoint, as Markdown.

    Args:
        files: the model's own description.
        report: what the conversion did.
    """
    model, converted = files.model, files.training_data["converted"]
    original = converted["from"]
    lines = [
        *header(model.name, "converted"),
        f"# {model.name}, {report.n_parameters:,} parameters, converted from {original}",
        "",
        f"Converted by scfm {__version__} from the {original} checkpoint {converted['file']}: its weights, none of "
        f"them trained or changed since. Cite {original} ({PAPERS[original]}) and whoever trained it.",
        "",
        *how_to_load(bool(labels_of(files))),
        "## Model",
        "| | |",
        "|---|---|",
        f"| tensors | {report.n_tensors}, layout {report.layout} |",
        f"| width, heads, layers, hidden | {model.width}, {model.heads}, {model.layers}, {model.hidden} |",
        f"| {mixing_of(model)} |",
        f"| values | {values_of(files)} |",
        f"| tokens | {tokens_of(files)} |",
        f"| genes | {files.vocabulary.n_genes:,} in the vocabulary |",
        *([f"| gene vectors | frozen, from {model.gene_table} |"] if model.gene_table else []),
        f"| heads | {', '.join(f'{head.task} ({head.kind})' for head in files.heads) or 'none'} |",
        f"| conditions | {', '.join([*files.cell_conditions, *files.gene_conditions]) or 'none'} |",
        f"| left behind | {', '.join(report.left_behind) or 'nothing'} |",
        "",
        "## Data",
        "The checkpoint does not say which cells it was trained on, so whether test cells were among them cannot be"
        " checked: read any score with that in mind.",
        "",
    ]
    if report.notes:
        lines += ["## Notes", *(f"- {note}" for note in report.notes), ""]
    return "\n".join([*lines, *LICENCE])


def tokens_of(files: ModelFiles) -> str:
    """Return in words which tokens a converted model reads."""
    tokens, preset = files.tokens, files.training_data["converted"].get("preset")
    cls = f"`<cls>` has the value {tokens.cls_value:g}"
    if preset is None:
        return f"all genes of the vocabulary, and {cls}"
    return f"preset {preset}: {cls}, at most {tokens.max_genes:,} genes per cell, ties {tokens.tie_policy}"


def labels_of(files: ModelFiles) -> list[str]:
    """Return the labels that the model predicts, of all its heads."""
    return [label for head in files.heads for label in head.labels or []]


def validation_section(
    metrics: Sequence[tuple[int, str, float]],
    baselines: dict[str, float],
    config: CheckpointConfig,
    majority: float | None,
) -> list[str]:
    """Return the best validation step beside the baselines, and in words whether the model beats them."""
    sign = -1 if config.mode == "max" else 1
    judged = [(sign * value, step) for step, name, value in metrics if name == config.best]
    if not judged:
        return ["## Validation", "No cells were held out.", ""]
    step = min(judged)[1]
    lines = [f"## Validation (held-out cells, step {step:,}, the one exported)", "| metric | value |", "|---|---|"]
    of_step = {name: value for s, name, value in metrics if s == step and name.startswith(("valid/", "probe/"))}
    at_best = {name.removeprefix("valid/"): value for name, value in of_step.items() if "baseline" not in name}
    lines += [f"| {name} | {value:.4g} |" for name, value in at_best.items()]
    probes = {name: value for _, name, value in metrics if name.startswith("probe/baseline_")}
    lines += [f"| {name}: the same regression on log counts | {value:.4g} |" for name, value in probes.items()]
    if majority is not None:
        lines.append(f"| baseline: guess the most frequent label, accuracy | {majority:.4g} |")
    lines += [f"| baseline: predict the {name}, MSE | {value:.4g} |" for name, value in baselines.items()]
    guesses = majority_bins_of(metrics)
    lines += [f"| baseline: guess the {name}, accuracy | {value:.4g} |" for name, value in guesses.items()]
    lines.append("")
    if majority is not None and "cls_accuracy" in at_best:
        accuracy = at_best["cls_accuracy"]
        verdict = "above" if accuracy > majority else "NOT above"
        lines += [
            f"The accuracy, {accuracy:.4g}, is {verdict} that of the most frequent label, {majority:.4g}; "
            "`scfm evaluate annotation` adds the baselines that are hard to beat.",
            "",
        ]
    if guesses and "masked_bin_accuracy" in at_best:
        accuracy, best = at_best["masked_bin_accuracy"], max(guesses, key=lambda name: guesses[name])
        verdict = "above" if accuracy > guesses[best] else "NOT above"
        lines += [
            f"The accuracy of masked bins, {accuracy:.4g}, is {verdict} that of guessing the {best}, "
            f"{guesses[best]:.4g}.",
            "",
        ]
    if baselines:
        error = at_best.get("gep_mse", at_best.get("gep"))
        best = min(baselines, key=lambda name: baselines[name])
        if error is not None:
            verdict = "below" if error < baselines[best] else "NOT below"
            lines += [
                f"The error of GEP, {error:.4g}, is {verdict} that of predicting the {best}, {baselines[best]:.4g}.",
                "",
            ]
    return lines
