"""Perturbation scores equal GEARS', scGPT's, Systema's, and cell-eval's and pertpy's where those look at means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from numpy.typing import NDArray

from scfm.evaluation.metrics import perturbation as pt

pytestmark = pytest.mark.golden

# no_change has no change to correlate: every library returns rounding noise there, we NaN
MODELS = ("nonctl_mean", "matching_mean", "additive", "linear", "noisy_truth")


class Toy:
    def __init__(self, shared: Path) -> None:
        folder = shared / "golden/evaluation"
        cells = ad.read_h5ad(folder / "perturb_small.h5ad")
        self.expected: dict[str, Any] = json.loads((folder / "perturb_expected.json").read_text())
        self.predicted = dict(np.load(folder / "perturb_predictions.npz"))
        self.x = cells.X.toarray().astype(np.float64)
        self.condition = cells.obs["condition"].to_numpy(str)
        self.true = {name: self.x[self.condition == name].mean(0) for name in np.unique(self.condition)}
        self.ctrl = self.true["ctrl"]
        self.genes = cells.var["gene_name"].tolist()

    def rows(self, which: str, condition: str) -> NDArray[np.int64]:
        return np.array([self.genes.index(name) for name in self.expected[which][condition]])


@pytest.fixture(scope="module")
def toy(shared: Path) -> Toy:
    return Toy(shared)


@pytest.mark.parametrize("model", MODELS)
def test_scores_of_each_condition(model: str, toy: Toy) -> None:
    wanted = toy.expected["models"][model]
    ctrl, perturbed = toy.ctrl, {name: mean for name, mean in toy.true.items() if name != "ctrl"}
    top50 = np.argsort(-ctrl)[:50]
    for condition in toy.expected["test"]:
        p, y = toy.predicted[f"{model}|{condition}"], toy.true[condition]
        de, kept = toy.rows("top20_de", condition), toy.rows("top20_non_dropout_de", condition)
        delta_de = pt.pearson_delta(p[de], y[de], ctrl[de])
        mine = {
            "systema_pearson_delta_pertmean_ref": pt.pearson_delta(p, y, toy.predicted["pert_centroid_mean"]),
            "pearson_delta_ctrl_ref": pt.pearson_delta(p, y, ctrl),
            "systema_centroid_accuracy": pt.centroid_accuracy(p, perturbed, condition),
            "l2_all": np.linalg.norm(p - y),
            "l2_top50_expressed_in_ctrl": np.linalg.norm((p - y)[top50]),
            "mse_top20_de": np.mean((p - y)[de] ** 2),
            "spearman_delta": pt.spearman(p - ctrl, y - ctrl),
        }
        # undefined, where the prediction is the reference itself, is null in the goldens and NaN with us
        stored = {name: wanted[name][condition] for name in mine}
        stored = {name: np.nan if value is None else value for name, value in stored.items()}
        assert mine == pytest.approx(stored, abs=1e-5, nan_ok=True)
        gears = {
            "mse": np.mean((p - y) ** 2),
            "pearson": pt.pearson(p, y),
            "mse_de": np.mean((p - y)[de] ** 2),
            "pearson_de": pt.pearson(p[de], y[de]),
        }
        assert gears == pytest.approx(wanted["gears_per_pert"][condition], abs=1e-5)
        deeper = {
            "pearson_delta": pt.pearson_delta(p, y, ctrl),
            "pearson_delta_de": delta_de,
            "pearson_delta_top20_de": delta_de,
            "pearson_delta_top200_hvg": pt.pearson_delta(p, y, ctrl),  # all of the 100 genes
            "frac_correct_direction_20": pt.direction_accuracy(p[de], y[de], ctrl[de]),
            "frac_correct_direction_all": pt.direction_accuracy(p, y, ctrl),
            "frac_sigma_below_1": pt.within_one_sd(p[de], toy.x[toy.condition == condition][:, de]),
        }
        assert deeper == pytest.approx(wanted["gears_deeper"][condition], abs=1e-5)
        non_dropout = {
            "pearson_delta_top20_de_non_dropout": pt.pearson_delta(p[kept], y[kept], ctrl[kept]),
            "mse_top20_de_non_dropout": np.mean((p - y)[kept] ** 2),
            "frac_correct_direction_top20_non_dropout": pt.direction_accuracy(p[kept], y[kept], ctrl[kept]),
            "frac_opposite_direction_top20_non_dropout": pt.opposite_direction(p[kept], y[kept], ctrl[kept]),
        }
        assert non_dropout == pytest.approx(wanted["gears_non_dropout"][condition], abs=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_means_over_conditions(model: str, toy: Toy) -> None:
    wanted, test = toy.expected["models"][model], toy.expected["test"]
    top = {name: toy.rows("top20_de", name) for name in test}
    pairs = {name: (toy.predicted[f"{model}|{name}"], toy.true[name]) for name in test}
    gears = {
        "mse": np.mean([np.mean((p - y) ** 2) for p, y in pairs.values()]),
        "mse_de": np.mean([np.mean((p - y)[top[name]] ** 2) for name, (p, y) in pairs.items()]),
        "pearson": np.mean([pt.pearson(p, y) for p, y in pairs.values()]),
        "pearson_de": np.mean([pt.pearson(p[top[name]], y[top[name]]) for name, (p, y) in pairs.items()]),
    }
    assert gears == pytest.approx(wanted["gears_compute_metrics"], abs=1e-5)
    of_change = {
        "pearson": gears["pearson"],
        "pearson_de": gears["pearson_de"],
        "pearson_delta": np.mean([pt.pearson_delta(p, y, toy.ctrl) for p, y in pairs.values()]),
        "pearson_de_delta": np.mean(
            [pt.pearson_delta(p[top[name]], y[top[name]], toy.ctrl[top[name]]) for name, (p, y) in pairs.items()]
        ),
    }
    assert of_change == pytest.approx(wanted["scgpt_compute_perturbation_metrics"], abs=1e-5)


def test_no_change_has_no_correlation_of_change(toy: Toy) -> None:
    condition = toy.expected["test"][0]
    assert np.isnan(pt.pearson_delta(toy.ctrl, toy.true[condition], toy.ctrl))
    assert pt.pearson(toy.ctrl, toy.true[condition]) > 0.85, "and raw correlation calls it good"


def test_what_all_perturbations_share_vanishes_under_their_own_mean(toy: Toy) -> None:
    wanted = toy.expected["models"]["nonctl_mean"]
    assert wanted["pearson_delta_ctrl_ref"]["g1+g4"] > 0.4 > 0.2 > wanted["systema_pearson_delta_pertmean_ref"]["g1+g4"]


def test_scores_of_cell_eval_that_look_at_means(shared: Path) -> None:
    folder = shared / "golden/evaluation"
    real, pred = (ad.read_h5ad(folder / f"celleval_{side}.h5ad") for side in ("real", "pred"))

    def means(cells: ad.AnnData) -> dict[str, NDArray]:
        of = cells.obs["perturbation"].to_numpy(str)
        return {name: cells.X[of == name].astype(np.float64).mean(0) for name in np.unique(of)}

    true, predicted = means(real), means(pred)
    control, predicted_control = true.pop("control"), predicted.pop("control")
    changes = {name: y - control for name, y in true.items()}, {n: y - predicted_control for n, y in predicted.items()}
    near = {metric: pt.discrimination(changes[1], changes[0], metric) for metric in ("l1", "l2", "cosine")}
    for wanted in json.loads((folder / "perturb_celleval_expected.json").read_text())["results"]:
        name = wanted["perturbation"]
        error, change_error = predicted[name] - true[name], changes[1][name] - changes[0][name]
        mine = {
            "pearson_delta": pt.pearson(changes[1][name], changes[0][name]),
            "mse": np.mean(error**2),
            "mae": np.abs(error).mean(),
            "mse_delta": np.mean(change_error**2),
            "mae_delta": np.abs(change_error).mean(),
            **{f"discrimination_score_{metric}": near[metric][name] for metric in near},
        }
        assert mine == pytest.approx({key: wanted[key] for key in mine}, abs=1e-5), name


def test_distances_of_pertpy(toy: Toy, shared: Path) -> None:
    from scipy.spatial.distance import cosine
    from sklearn.metrics import r2_score

    stored = json.loads((shared / "golden/evaluation/pertpy_distances_expected.json").read_text())
    wanted = stored["distances_from_ctrl"]
    for condition in ("g1+ctrl", "g1+g4"):
        y, cells = toy.true[condition], toy.x[toy.condition == condition]
        mine = {
            "edistance": pt.energy_distance(toy.x[toy.condition == "ctrl"], cells),
            "euclidean": np.linalg.norm(y - toy.ctrl),
            "mse": np.mean((y - toy.ctrl) ** 2),
            "pearson_distance": 1 - pt.pearson(y, toy.ctrl),
            "mmd": np.sum((y - toy.ctrl) ** 2),  # its kernel is linear
            "cosine_distance": cosine(y, toy.ctrl),
            "spearman_distance": 1 - pt.spearman(y, toy.ctrl),
            "r2_distance": 1 - r2_score(y, toy.ctrl),
            "mean_absolute_error": np.abs(y - toy.ctrl).mean(),
        }
        assert mine == pytest.approx({name: wanted[name][condition] for name in mine}, rel=1e-5, abs=1e-5)
