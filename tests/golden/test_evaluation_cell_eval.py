"""Scores of predicted cells after a perturbation equal cell-eval 0.8.2's: means, distances, and changed genes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from golden_values import Stored, stored
from numpy.typing import NDArray

from scfm.evaluation.metrics import differential_expression as de
from scfm.evaluation.metrics import perturbation as pt

pytestmark = pytest.mark.golden

NEAREST = ("l1", "l2", "cosine")


@pytest.fixture(scope="module")
def sides(shared: Path) -> tuple[dict[str, NDArray], dict[str, NDArray]]:
    def cells_by_condition(side: str) -> dict[str, NDArray]:
        cells = ad.read_h5ad(shared / f"golden/evaluation/celleval_{side}.h5ad")
        of = cells.obs["perturbation"].to_numpy(str)
        return {name: cells.X[of == name].astype(np.float64) for name in np.unique(of)}

    return cells_by_condition("real"), cells_by_condition("pred")


@pytest.fixture(scope="module")
def golden(shared: Path) -> Stored:
    return stored(shared, "perturb_celleval")


@pytest.fixture(scope="module")
def mine(sides: tuple[dict[str, NDArray], dict[str, NDArray]]) -> dict[str, dict[str, float]]:
    """Our scores: condition -> cell-eval's name of a score -> value."""
    real, predicted = sides
    conditions = sorted(set(real) - {"control"})
    changes = tuple({name: side[name].mean(0) - side["control"].mean(0) for name in conditions} for side in sides)
    near = {metric: pt.discrimination(changes[1], changes[0], metric) for metric in NEAREST}
    apart = [[pt.energy_distance(side[name], side["control"]) for name in conditions] for side in sides]
    genes = [{name: de.gene_changes(side[name], side["control"]) for name in conditions} for side in sides]
    n_changed = [[int(side[name].significant.sum()) for name in conditions] for side in genes]
    over_conditions = {
        "pearson_edistance": pt.pearson(*map(np.array, apart)),
        "de_spearman_sig": pt.spearman(*map(np.array, n_changed)),
    }
    scores = {}
    for k, name in enumerate(conditions):
        true_genes, predicted_genes = genes[0][name], genes[1][name]
        error = predicted[name].mean(0) - real[name].mean(0)
        change_error = changes[1][name] - changes[0][name]
        found = de.recovery(true_genes, predicted_genes)
        scores[name] = {
            "pearson_delta": pt.pearson(changes[1][name], changes[0][name]),
            "mse": float(np.mean(error**2)),
            "mae": float(np.abs(error).mean()),
            "mse_delta": float(np.mean(change_error**2)),
            "mae_delta": float(np.abs(change_error).mean()),
            **{f"discrimination_score_{metric}": near[metric][name] for metric in NEAREST},
            "overlap_at_N": de.overlap(true_genes, predicted_genes),
            "precision_at_N": de.precision(true_genes, predicted_genes),
            **{f"overlap_at_{n}": de.overlap(true_genes, predicted_genes, n) for n in (50, 100, 200, 500)},
            **{f"precision_at_{n}": de.precision(true_genes, predicted_genes, n) for n in (50, 100, 200, 500)},
            "de_direction_match": de.direction_match(true_genes, predicted_genes),
            "de_spearman_lfc_sig": de.fold_change_correlation(true_genes, predicted_genes),
            "de_sig_genes_recall": de.recall(true_genes, predicted_genes),
            "de_nsig_counts_real": n_changed[0][k],
            "de_nsig_counts_pred": n_changed[1][k],
            "pr_auc": found["average_precision"],
            "roc_auc": found["auroc"],
            **over_conditions,
        }
    return scores


def test_scores_of_each_condition(mine: dict[str, dict[str, float]], golden: Stored) -> None:
    assert len(golden["results"]) == len(mine) == 4
    for wanted in golden["results"]:
        scores = mine[wanted["perturbation"]]
        assert set(wanted) == set(scores) | {"perturbation", "clustering_agreement"}
        assert scores == pytest.approx({name: wanted[name] for name in scores}, abs=1e-5), wanted["perturbation"]


def test_summary_over_conditions(mine: dict[str, dict[str, float]], golden: Stored) -> None:
    table = pd.DataFrame(mine).T
    # polars, which cell-eval summarises with, takes the nearest of the values as a quantile
    quantiles = {f"{q}%": table.quantile(q / 100, interpolation="nearest") for q in (25, 50, 75)}
    summary: Mapping[str, pd.Series] = {
        "count": table.count(),
        "null_count": table.isna().sum(),
        "mean": table.mean(),
        "std": table.std(),
        "min": table.min(),
        "max": table.max(),
        **quantiles,
    }
    assert {row["statistic"] for row in golden["agg"]} == set(summary)
    for row in golden["agg"]:
        found = summary[row["statistic"]].to_dict()
        assert found == pytest.approx({name: row[name] for name in found}, abs=1e-5), row["statistic"]
