"""Figures are drawn from what they say they are drawn from, and the same data give the same picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from comparisons import compared, with_confusion

from scfm.evaluation import plots, training_plots
from scfm.evaluation.harness import Comparison

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compared(wrong=0.2)


def test_a_figure_is_a_function_of_its_data(comparison: Comparison) -> None:
    for draw in (
        lambda one: plots.score_dots(one, ["macro_f1"]),
        plots.per_class_f1,
        lambda one: plots.confusion(one, ["oracle", "kNN on PCA"]),
        lambda one: plots.calibration(one, ["oracle"]),
    ):
        picture = draw(comparison)
        assert picture.startswith(PNG)
        assert picture == draw(comparison)
        assert picture != draw(compared(wrong=0.6))


def test_predictions_outside_the_list_get_a_column_of_their_own(comparison: Comparison) -> None:
    def with_foreign(run):
        confusion = run.scores.confusion.copy()
        confusion[0, -1] = 3
        return with_confusion(run, confusion)

    foreign = replace(comparison, runs=[with_foreign(run) for run in comparison.runs])
    assert plots.confusion(foreign, ["oracle"]) != plots.confusion(comparison, ["oracle"])


def test_neighbour_agreement_asks_the_training_cells_only() -> None:
    labels = np.array(["A"] * 5 + ["B"] * 5 + ["A", "B"])
    apart = np.r_[np.zeros(5), np.full(5, 10.0), 0.0, 10.0][:, None]
    swapped = np.r_[np.zeros(5), np.full(5, 10.0), 10.0, 0.0][:, None]
    assert plots.neighbour_agreement(apart, labels, n_train=10, neighbours=5) == 1
    assert plots.neighbour_agreement(swapped, labels, n_train=10, neighbours=5) == 0
    assert plots.neighbour_agreement(apart, labels, n_train=10, neighbours=10) == 0.5


def test_umaps_stand_side_by_side_and_repeat() -> None:
    rng = np.random.default_rng(0)
    embedding = np.concatenate([rng.normal(size=(30, 4)), rng.normal(size=(30, 4)) + 8])
    labels = np.repeat(["A", "B"], 30)
    points = plots.umap_of(embedding)
    np.testing.assert_array_equal(points, plots.umap_of(embedding))
    between = np.linalg.norm(points[:30].mean(0) - points[30:].mean(0))
    within = np.linalg.norm(points[:30] - points[:30].mean(0), axis=1)
    assert between > 2 * within.mean()
    assert plots.umap_pair({"left": embedding, "right": embedding[:, :2]}, labels, n_train=40).startswith(PNG)


def test_curves_beside_predict_the_mean_are_squared_errors() -> None:
    """Nats of a cross entropy and squared bins of a baseline do not belong on one axis."""
    from matplotlib.figure import Figure

    rows = [(step, f"train/{name}", value) for step in (1, 2) for name, value in (("gep", 3.0), ("gep_mse", 40.0))]
    axis = Figure().subplots()
    training_plots._draw_losses(axis, training_plots.TrainingLog(rows, {"gene mean": 44.0}))
    curve, baseline = axis.get_lines()
    assert list(curve.get_ydata()) == [40.0, 40.0]
    assert list(baseline.get_ydata()) == [44.0, 44.0]


def test_loss_curves_of_a_run_are_written_to_a_file(tmp_path: Path) -> None:
    names = ("train/gep", "train/loss", "valid/gep", "valid/loss")
    metrics = [(step, name, 9.0 / step) for step in (1, 2, 3) for name in names]
    training_plots.loss_curves(metrics, tmp_path / "with.png", baselines={"gene mean": 5.0})
    training_plots.loss_curves(metrics, tmp_path / "without.png")
    assert (tmp_path / "with.png").read_bytes().startswith(PNG)
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()
