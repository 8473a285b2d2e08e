"""Print and write what a comparison found: a table, metrics.json, report.html; never without the baselines."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scfm.errors import ScfmError
from scfm.evaluation import plots, training_plots
from scfm.evaluation.metrics import METRICS
from scfm.evaluation.page import Figure, render
from scfm.evaluation.provenance import provenance
from scfm.evaluation.splits import save_splits
from scfm.evaluation.verdict import anchored, caveats, differences, leaked, uninformative

if TYPE_CHECKING:
    from rich.console import Console

    from scfm.evaluation.harness import Comparison
    from scfm.evaluation.protocol import Kind

STYLES: dict[Kind, str | None] = {
    "model": "bold",
    "baseline": None,
    "negative control": "dim",
    "positive control": "dim",
}


def require_baselines(comparison: Comparison) -> None:
    """Raise ScfmError unless every obligatory baseline of the task was run on every split, and one came to an end.

    A baseline that failed stands in the report with its reason.
    """
    for baseline in comparison.protocol.baselines():
        ran = {run.split for run in comparison.runs if (run.method, run.kind) == (baseline.name, "baseline")}
        if ran != set(range(len(comparison.splits))):
            raise ScfmError(f"no report: the baseline {baseline.name!r} did not run on every split; use compare()")
    if not comparison.ranked("baseline"):
        reasons = "; ".join(f"{name} {comparison.failure(name)}" for name in comparison.names("baseline"))
        raise ScfmError(f"no report: every baseline failed ({reasons})")


def print_report(comparison: Comparison, console: Console | None = None) -> None:
    """Print the table of scores, the verdict in words, and what to keep in mind. Raises ScfmError without baselines."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    require_baselines(comparison)
    console = console or Console()
    protocol, silent = comparison.protocol, uninformative(comparison)
    n = len(comparison.splits)
    title = f"{comparison.task}: {escape(comparison.label)}, {n} seed{'s' if n > 1 else ', so no spread'}"
    if protocol.transductive:
        title += ", transductive"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("method")
    for metric in protocol.terminal:
        said_nothing = " °" if metric in silent else ""
        table.add_column(f"{METRICS[metric].title}{said_nothing}", justify="right", no_wrap=True)
    table.add_column("seconds", justify="right")
    for kind, style in STYLES.items():
        names = comparison.names(kind)
        for name in names:
            marked = f"{escape(name)}{' †' if leaked(comparison, name) else ''}"
            end = name == names[-1]
            if comparison.failure(name):
                table.add_row(marked, *["failed", *["–"] * len(protocol.terminal)], style=style, end_section=end)
                continue
            scores = [str(comparison.summary(name, metric)) for metric in protocol.terminal]
            table.add_row(marked, *scores, f"{comparison.mean_seconds(name):,.1f}", style=style, end_section=end)
    console.print(table)
    if not protocol.transductive:
        console.print(f"Held out: {comparison.splits[0].protocol}.", markup=False, highlight=False)
    if any(metric in silent for metric in protocol.terminal):
        console.print("° says nothing here: a negative control is as good.", markup=False, highlight=False)
    if any(leaked(comparison, name) for name in comparison.kinds):
        console.print("† was trained on what it is judged on.", markup=False, highlight=False)
    for difference in differences(comparison):
        console.print(str(difference), markup=False, highlight=False)
    for caveat in caveats(comparison):
        console.print(f"Note: {caveat}", style="yellow", markup=False, highlight=False)


def metrics_json(comparison: Comparison, title: str, origin: dict[str, Any]) -> str:
    """Return all scores and where they come from, as JSON; a score that is not defined is null."""
    silent, protocol = uninformative(comparison), comparison.protocol
    of_all = {name: origin[name] for name in ("commit", "versions")}
    rows = [
        row
        | {"value": None if row["value"] is None or math.isnan(row["value"]) else row["value"]}
        | {"uninformative": row["metric"] in silent}
        | of_all
        for row in comparison.rows()
    ]
    found = {
        "title": title,
        "task": comparison.task,
        "question": comparison.protocol.question,
        "transductive": comparison.protocol.transductive,
        "label": comparison.label,
        "labels": comparison.labels,
        "batch": comparison.cells.batch,
        "donor": comparison.cells.donor,
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
        "methods": {
            name: {"kind": kind, "description": comparison.descriptions[name], "failure": comparison.failure(name)}
            for name, kind in comparison.kinds.items()
        },
        "protocols": {name: METRICS[name].protocol for name in (*protocol.metrics, *protocol.further)},
        "uninformative": silent,
        "anchored": {
            name: {metric: anchored(comparison, name, metric) for metric in protocol.metrics}
            for name in comparison.ranked("model", "baseline")
        },
        "rows": rows,
        "learning_curve": comparison.curve,
        "differences": [
            {
                "model": one.model,
                "baseline": one.baseline,
                "metric": one.metric,
                "difference": one.interval.difference,
                "low": one.interval.low,
                "high": one.interval.high,
                "cells": one.interval.units,
                "low_over_donors": one.donors.low if one.donors else None,
                "high_over_donors": one.donors.high if one.donors else None,
                "donors": one.donors.units if one.donors else None,
                "outcome": one.outcome,
                "verdict": str(one),
            }
            for one in differences(comparison)
        ],
        "leakage": [
            {"method": run.method, "seed": run.seed}
            | (
                {
                    "cells": run.leakage.cells,
                    "seen": run.leakage.seen,
                    "datasets": list(run.leakage.datasets),
                    "donors": list(run.leakage.donors),
                }
                if run.leakage
                else {"cells": None, "seen": None, "datasets": None, "donors": None}
            )
            for run in comparison.runs
            if run.kind == "model"
        ],
        "failures": [
            {"method": run.method, "seed": run.seed, "reason": run.failure, "traceback": run.trace}
            for run in comparison.runs
            if run.failure
        ],
        "caveats": caveats(comparison),
        **origin,
    }
    return json.dumps(found, indent=1, allow_nan=False) + "\n"


def figures(comparison: Comparison, training: Mapping[str, training_plots.TrainingLog]) -> list[Figure]:
    """Draw the figures of a report: scores by seed, those of the task, loss curves."""
    drawn = [
        Figure(
            plots.score_dots(comparison, comparison.protocol.terminal),
            "Scores by seed",
            "A dot per seed, a bar at the mean; models in bold. Negative controls know nothing, positive ones know the "
            "answer: what lies between them is what a score can tell.",
        ),
        *comparison.protocol.figures(comparison),
    ]
    if training:
        drawn.append(
            Figure(
                training_plots.training_curves(training),
                "Training",
                "Losses by optimizer step; training solid, validation dashed, trivial predictions dotted.",
            )
        )
    return drawn


def write_report(
    comparison: Comparison, out: Path, *, title: str, training: Mapping[str, training_plots.TrainingLog] | None = None
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
