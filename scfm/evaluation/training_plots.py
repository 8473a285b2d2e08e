"""Figures of what runs log and cost: losses by step, seconds and memory by the length of a cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scfm.baselines.majority_bin import majority_bins_of
from scfm.evaluation.plots import FAINT, HUES, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PREFIX = {"training": "train", "validation": "valid"}
MASKED_BINS = "masked_bin_accuracy"
LINE_OF_SIDE: dict[str, dict[str, Any]] = {
    "training": {"ls": "-"},
    "validation": {"ls": (0, (4, 2)), "marker": "o", "ms": 3},
}


@dataclass(frozen=True)
class TrainingLog:
    """What a training run logged.

    Attributes:
        metrics: (step, name, value) rows of its `metrics.csv`, names as `train/loss`, `valid/gep`.
        baselines: what trivial predictions of the hidden values would cost, by name, on the scale of `valid/gep`.
    """

    metrics: Sequence[tuple[int, str, float]]
    baselines: Mapping[str, float] = field(default_factory=dict)


def training_curves(runs: Mapping[str, TrainingLog]) -> bytes:
    """Draw the losses of runs, a panel each: training solid, validation dashed, trivial predictions dotted.

    A run that predicts masked bins has a second panel with their accuracy.
    """
    accuracies = {title: log for title, log in runs.items() if logged_names(log, MASKED_BINS)}
    with new_figure(7.2, 3.3, len(runs) + len(accuracies)) as (_, axes, drawn):
        for axis, (title, log) in zip(axes, runs.items(), strict=False):
            _draw_losses(axis, log)
            axis.set_title(title)
        squared = any(name.startswith("train/gep") for log in runs.values() for _, name, _ in log.metrics)
        axes[0].set_ylabel("squared error, in bins" if squared else "loss")
        for axis, (title, log) in zip(axes[len(runs) :], accuracies.items(), strict=True):
            _draw_accuracy(axis, log)
            axis.set_title(title)
    return drawn.getvalue()


def logged_names(log: TrainingLog, name: str) -> list[str]:
    """Return the names under which a run logged a metric, of training and of validation."""
    there = {logged for _, logged, _ in log.metrics}
    return [f"{side}/{name}" for side in PREFIX.values() if f"{side}/{name}" in there]


def _draw_losses(axis: Axes, log: TrainingLog) -> None:
    from scfm.objectives import OBJECTIVES

    # under cross entropy the squared error of the expected bin is what compares with predicting a mean
    parts = [f"{name}_mse" if logged_names(log, f"{name}_mse") else name for name in OBJECTIVES]
    # the parts say more than their weighted sum
    shown = [name for name in parts if logged_names(log, name)] or ["loss"]
    for hue, name in zip((*HUES[::2], *HUES[1::2]), shown, strict=False):
        _draw_metric(axis, log, name, hue, name.removesuffix("_mse"))
    for name, value in log.baselines.items():
        _draw_level(axis, value, f"gep of the {name}", left=True)  # curves end there, and begin above
    _finish_curves(axis, len(shown))


def _draw_accuracy(axis: Axes, log: TrainingLog) -> None:
    _draw_metric(axis, log, MASKED_BINS, HUES[0], "masked bins")
    for name, value in majority_bins_of(log.metrics).items():
        _draw_level(axis, value, name)
    axis.set_ylabel("share of masked bins told right")
    _finish_curves(axis, 1)


def _draw_metric(axis: Axes, log: TrainingLog, name: str, hue: str, label: str) -> None:
    for side, style in LINE_OF_SIDE.items():
        points = np.array([(step, value) for step, logged, value in log.metrics if logged == f"{PREFIX[side]}/{name}"])
        if len(points):
            axis.plot(*points.T, color=hue, lw=1.5, label=f"{label}, {side}", **style)


def _draw_level(axis: Axes, value: float, text: str, left: bool = False) -> None:
    axis.axhline(value, color=FAINT, lw=1, ls=":")
    place = axis.get_yaxis_transform()  # x in shares of the panel, y in data
    at: dict[str, Any] = {"x": 0.01, "ha": "left"} if left else {"x": 1, "ha": "right"}
    axis.text(y=value, s=text, transform=place, va="bottom", fontsize=7.5, color=FAINT, **at)


def _finish_curves(axis: Axes, columns: int) -> None:
    axis.set_xlabel("optimizer step")
    axis.grid(axis="y")
    axis.legend(fontsize=7.5, ncols=min(columns, 3), loc="upper left", bbox_to_anchor=(-0.02, -0.2))


def loss_curves(
    metrics: Sequence[tuple[int, str, float]], path: Path, baselines: Mapping[str, float] | None = None
) -> None:
    """Write the loss curves of one run as a PNG file."""
    path.write_bytes(training_curves({path.stem: TrainingLog(metrics, baselines or {})}))


def cost_by_length(lengths: Sequence[int], curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> bytes:
    """Draw seconds and peak MiB by the number of genes, both axes logarithmic: name -> (seconds, MiB)."""
    colours = ("#c2410c", "#0f4c75", "#5b8db8", "#f59e0b", "#be185d")
    with new_figure(7.2, 3.1, columns=2) as (_, axes, drawn):
        for axis, part, what in zip(axes, (0, 1), ("seconds, forward + backward", "peak memory, MiB"), strict=True):
            for (name, costs), colour in zip(curves.items(), colours, strict=False):
                axis.plot(lengths, costs[part], "o-", color=colour, label=name, markersize=4)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
            axis.minorticks_off()
            axis.set_xlabel("genes of the cell")
            axis.set_ylabel(what)
        axes[0].legend()
    return drawn.getvalue()
