"""Print and write what a comparison found: a table, metrics.json, report.html; never without the baselines."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scfm.baselines import OBLIGATORY, KNNOnPCA
from scfm.errors import ScfmError
from scfm.evaluation import plots
from scfm.evaluation.harness import Comparison
from scfm.evaluation.metrics import METRICS
from scfm.evaluation.page import Figure, render
from scfm.evaluation.provenance import provenance
from scfm.evaluation.splits import save_splits
from scfm.evaluation.verdict import HEADLINE, caveats, differences

if TYPE_CHECKING:
    from rich.console import Console

# what fits beside the names on 80 columns; metrics.json and report.html hold every score
TERMINAL = (*HEADLINE, "auroc")


def require_baselines(comparison: Comparison) -> None:
    """Raise ScfmError unless every obligatory baseline of the task ran on every split."""
    for baseline in OBLIGATORY[comparison.task]:
        seen = {run.split for run in comparison.runs_of(baseline.name) if run.kind == "baseline"}
        if seen != set(range(len(comparison.splits))):
            raise ScfmError(f"no report: the baseline {baseline.name!r} did not run on every split; use compare()")


def print_report(comparison: Comparison, console: Console | None = None) -> None:
    """Print the table of scores, the verdict in words, and what to keep in mind. Raises ScfmError without baselines."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    require_baselines(comparison)
    console = console or Console()
    n = len(comparison.splits)
    title = f"{comparison.task}: {escape(comparison.label)}, {n} seed{'s' if n > 1 else ''}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("method")
    for metric in TERMINAL:
        table.add_column(METRICS[metric].title, justify="right", no_wrap=True)
    table.add_column("seconds", justify="right")
    for name, kind in comparison.kinds.items():
        scores = [str(comparison.summary(name, metric)) for metric in TERMINAL]
        style = "bold" if kind == "model" else None
        table.add_row(escape(name), *scores, f"{comparison.mean_seconds(name):,.1f}", style=style)
    console.print(table)
    for difference in differences(comparison):
        console.print(str(difference), markup=False, highlight=False)
    for caveat in caveats(comparison):
        console.print(f"Note: {caveat}", style="yellow", markup=False, highlight=False)


def metrics_json(comparison: Comparison, title: str, origin: dict[str, Any]) -> str:
    """Return all scores and where they come from, as JSON; a score that is not defined is null."""
    found = {
        "title": title,
        "task": comparison.task,
        "label": comparison.label,
        "labels": comparison.labels,
        "data_sha256": comparison.data_sha256,
        "splits": [
            {
                "seed": split.seed,
                "protocol": split.protocol,
                "train": len(split.train),
                "test": len(split.test),
                "sha256": digest,
            }
            for split, digest in zip(comparison.splits, comparison.split_hashes, strict=True)
        ],
        "protocols": {name: metric.protocol for name, metric in METRICS.items()},
        "rows": [row | {"value": None if math.isnan(row["value"]) else row["value"]} for row in comparison.rows()],
        "differences": [
            {
                "model": one.model,
                "baseline": one.baseline,
                "metric": one.metric,
                "difference": one.interval.difference,
                "low": one.interval.low,
                "high": one.interval.high,
                "outcome": one.outcome,
                "verdict": str(one),
            }
            for one in differences(comparison)
        ],
        "leakage": [
            {"method": run.method, "seed": run.seed, "cells": run.leakage.cells, "seen": run.leakage.seen}
            if run.leakage
            else {"method": run.method, "seed": run.seed, "cells": None, "seen": None}
            for run in comparison.runs
            if run.kind == "model"
        ],
        "caveats": caveats(comparison),
        **origin,
    }
    return json.dumps(found, indent=1, allow_nan=False) + "\n"


def figures(comparison: Comparison, training: Mapping[str, plots.TrainingLog]) -> list[Figure]:
    """Draw the figures of a report: scores, UMAPs, F1 per type, confusion, calibration, loss curves."""
    model, baseline = comparison.best("model", "macro_f1"), comparison.best("baseline", "macro_f1")
    pair = [name for name in (model, baseline) if name is not None]
    n_seeds = len(comparison.splits)
    over = f"all {n_seeds} splits" if n_seeds > 1 else "the split"
    drawn = [
        Figure(
            plots.score_dots(comparison, HEADLINE),
            "Scores by seed",
            "A dot per seed, a bar at the mean; models in bold.",
        )
    ]
    embedded = [name for name in comparison.names("model") if name in comparison.embeddings][:2]
    if embedded:
        split = comparison.splits[0]
        rows = [*split.train, *split.test]
        panels = {f"{name}, cell embedding": comparison.embeddings[name] for name in embedded}
        panels["PCA of log expression"] = comparison.embeddings[KNNOnPCA.name]
        drawn.append(
            Figure(
                plots.umap_pair(panels, comparison.truth[rows], len(split.train)),
                "Cell embeddings",
                f"UMAP of the first split: training cells pale, {len(split.test):,} held-out cells on top. Below each "
                "panel, measured in the embedding and not in the picture: the mean share of a held-out cell's 10 "
                "nearest training cells that have its type. PCA never saw a label; a fine-tuned embedding did.",
            )
        )
    drawn += [
        Figure(
            plots.per_class_f1(comparison),
            "F1 by type",
            "Commonest type first, number of cells in brackets; mean over seeds, lines span the seeds.",
        ),
        Figure(
            plots.confusion(comparison, pair),
            "Confusion",
            f"Held-out cells of {over}; shade is the share of the true type, numbers are cells.",
        ),
        Figure(
            plots.calibration(comparison, pair),
            "Calibration",
            f"Held-out cells of {over}, binned by the probability of the predicted label; dots grow with the cells in "
            "the bin; on the dashed line a method is as often right as it says.",
        ),
    ]
    if training:
        drawn.append(
            Figure(
                plots.training_curves(training),
                "Training",
                "Losses by optimizer step; training solid, validation dashed, trivial predictions dotted.",
            )
        )
    return drawn


def write_report(
    comparison: Comparison, out: Path, *, title: str, training: Mapping[str, plots.TrainingLog] | None = None
) -> Path:
    """Write report.html, metrics.json and splits.json into a folder; return the path of the page.

    Args:
        out: created where absent; files of an earlier report are replaced.
        title: headline of the page.
        training: title -> what a training run logged, for the loss curves.

    Raises ScfmError where an obligatory baseline is missing.
    """
    require_baselines(comparison)
    origin = provenance()
    page = render(
        comparison, title, differences(comparison), caveats(comparison), figures(comparison, training or {}), origin
    )
    scores = metrics_json(comparison, title, origin)
    out.mkdir(parents=True, exist_ok=True)
    save_splits(out / "splits.json", comparison.splits, comparison.cell_names.tolist())
    for name, text in (("metrics.json", scores), ("report.html", page)):
        unfinished = out / f"{name}.tmp"
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, out / name)
    return out / "report.html"
