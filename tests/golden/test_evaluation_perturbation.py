"""Perturbation scores, splits and lists of changed genes equal GEARS', scGPT's, Systema's and pertpy's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from golden_values import stored
from numpy.typing import NDArray

from scfm.evaluation.metrics import differential_expression as de
from scfm.evaluation.metrics import perturbation as pt
from scfm.evaluation.perturbation_split import simulation_split

pytestmark = pytest.mark.golden

MODELS = ("no_change", "nonctl_mean", "matching_mean", "additive", "linear", "noisy_truth")


class Toy:
    def __init__(self, shared: Path) -> None:
        folder = shared / "golden/evaluation"
        cells = ad.read_h5ad(folder / "perturb_small.h5ad")
        self.expected: dict[str, Any] = stored(shared, "perturb")
        self.predicted = dict(np.load(folder / "perturb_predictions.npz"))
        self.x = cells.X.toarray().astype(np.float64)
        self.condition = cells.obs["condition"].to_numpy(str)
        self.true = {name: self.x[self.condition == name].mean(0) for name in np.unique(self.condition)}
        self.ctrl = self.true["ctrl"]
        self.split = dict(zip(self.condition, cells.obs["split"].to_numpy(str), strict=True))
        self.genes = cells.var["gene_name"].to_numpy(str)

    def cells_of(self, condition: str) -> NDArray:
        return self.x[self.condition == condition]

    def top20(self, condition: str) -> NDArray[np.int64]:
        return de.welch_order(self.cells_of(condition), self.cells_of("ctrl"))[:20]

    def top20_not_dropped_out(self, condition: str) -> NDArray[np.int64]:
        cells, control = self.cells_of(condition), self.cells_of("ctrl")
        order = de.welch_order(cells, control)
        return order[de.not_dropped_out(cells, control)[order]][:20]


@pytest.fixture(scope="module")
def toy(shared: Path) -> Toy:
    return Toy(shared)


def same(mine: dict[str, float], wanted: dict[str, Any], model: str) -> None:
    """Compare all scores but those of the change of `no_change`, where libraries score rounding noise."""
    assert set(mine) == set(wanted)
    defined = dict(mine)
    if model == "no_change":
        for name in mine:
            if "delta" in name:
                assert np.isnan(defined.pop(name)), name
            elif "direction" in name:
                assert defined.pop(name) < 0.05, "without a change a direction is right only where the truth has none"
    assert defined == pytest.approx({name: wanted[name] for name in defined}, abs=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_scores_of_each_condition(model: str, toy: Toy) -> None:
    wanted = toy.expected["models"][model]
    ctrl, perturbed = toy.ctrl, {name: mean for name, mean in toy.true.items() if name != "ctrl"}
    top50 = np.argsort(-ctrl)[:50]
    for condition in toy.expected["test"]:
        p, y = toy.predicted[f"{model}|{condition}"], toy.true[condition]
        top, kept = toy.top20(condition), toy.top20_not_dropped_out(condition)
        delta_de = pt.pearson_delta(p[top], y[top], ctrl[top])
        mine = {
            "systema_pearson_delta_pertmean_ref": pt.pearson_delta(p, y, toy.predicted["pert_centroid_mean"]),
            "pearson_delta_ctrl_ref": pt.pearson_delta(p, y, ctrl),
            "systema_centroid_accuracy": pt.centroid_accuracy(p, perturbed, condition),
            "l2_all": np.linalg.norm(p - y),
            "l2_top50_expressed_in_ctrl": np.linalg.norm((p - y)[top50]),
            "mse_top20_de": np.mean((p - y)[top] ** 2),
            "spearman_delta": pt.spearman(p - ctrl, y - ctrl),
        }
        # undefined, where the prediction is the reference itself, is null in the goldens and NaN with us
        theirs = {name: wanted[name][condition] for name in mine}
        theirs = {name: np.nan if value is None else value for name, value in theirs.items()}
        assert mine == pytest.approx(theirs, abs=1e-5, nan_ok=True)
        gears = {
            "mse": np.mean((p - y) ** 2),
            "pearson": pt.pearson(p, y),
            "mse_de": np.mean((p - y)[top] ** 2),
            "pearson_de": pt.pearson(p[top], y[top]),
        }
        same(gears, wanted["gears_per_pert"][condition], model)
        deeper = {
            "pearson_delta": pt.pearson_delta(p, y, ctrl),
            "pearson_delta_de": delta_de,
            "pearson_delta_top20_de": delta_de,
            "pearson_delta_top200_hvg": pt.pearson_delta(p, y, ctrl),  # all of the 100 genes
            "frac_correct_direction_20": pt.direction_accuracy(p[top], y[top], ctrl[top]),
            "frac_correct_direction_all": pt.direction_accuracy(p, y, ctrl),
            "frac_sigma_below_1": pt.within_one_sd(p[top], toy.cells_of(condition)[:, top]),
        }
        same(deeper, wanted["gears_deeper"][condition], model)
        non_dropout = {
            "pearson_delta_top20_de_non_dropout": pt.pearson_delta(p[kept], y[kept], ctrl[kept]),
            "mse_top20_de_non_dropout": np.mean((p - y)[kept] ** 2),
            "frac_correct_direction_top20_non_dropout": pt.direction_accuracy(p[kept], y[kept], ctrl[kept]),
            "frac_opposite_direction_top20_non_dropout": pt.opposite_direction(p[kept], y[kept], ctrl[kept]),
        }
        same(non_dropout, wanted["gears_non_dropout"][condition], model)


@pytest.mark.parametrize("model", MODELS)
def test_means_over_conditions(model: str, toy: Toy) -> None:
    wanted, test = toy.expected["models"][model], toy.expected["test"]
    top = {name: toy.top20(name) for name in test}
    pairs = {name: (toy.predicted[f"{model}|{name}"], toy.true[name]) for name in test}
    gears = {
        "mse": np.mean([np.mean((p - y) ** 2) for p, y in pairs.values()]),
        "mse_de": np.mean([np.mean((p - y)[top[name]] ** 2) for name, (p, y) in pairs.items()]),
        "pearson": np.mean([pt.pearson(p, y) for p, y in pairs.values()]),
        "pearson_de": np.mean([pt.pearson(p[top[name]], y[top[name]]) for name, (p, y) in pairs.items()]),
    }
    same(gears, wanted["gears_compute_metrics"], model)
    of_change = {
        "pearson": gears["pearson"],
        "pearson_de": gears["pearson_de"],
        "pearson_delta": np.mean([pt.pearson_delta(p, y, toy.ctrl) for p, y in pairs.values()]),
        "pearson_de_delta": np.mean(
            [pt.pearson_delta(p[top[name]], y[top[name]], toy.ctrl[top[name]]) for name, (p, y) in pairs.items()]
        ),
    }
    same(of_change, wanted["scgpt_compute_perturbation_metrics"], model)


def test_no_change_has_no_correlation_of_change(toy: Toy) -> None:
    condition = toy.expected["test"][0]
    assert np.isnan(pt.pearson_delta(toy.ctrl, toy.true[condition], toy.ctrl))
    assert pt.pearson(toy.ctrl, toy.true[condition]) > 0.85, "and raw correlation calls it good"


def test_what_all_perturbations_share_vanishes_under_their_own_mean(toy: Toy) -> None:
    wanted = toy.expected["models"]["nonctl_mean"]
    assert wanted["pearson_delta_ctrl_ref"]["g1+g4"] > 0.4 > 0.2 > wanted["systema_pearson_delta_pertmean_ref"]["g1+g4"]


def test_distances_of_pertpy(toy: Toy, shared: Path) -> None:
    from scipy.spatial.distance import cosine
    from sklearn.metrics import r2_score

    wanted = stored(shared, "pertpy_distances")["distances_from_ctrl"]
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


def test_most_changed_genes(toy: Toy) -> None:
    """GEARS' lists, which the scores of the top 20 above are taken over."""
    for side in ("train", "test", "holdout"):
        assert {name for name, of in toy.split.items() if of == side} - {"ctrl"} == set(toy.expected[side])
    assert set(toy.expected["top20_de"]) == set(toy.expected["top20_non_dropout_de"]) == set(toy.expected["test"])
    for condition in toy.expected["test"]:
        assert toy.genes[toy.top20(condition)].tolist() == toy.expected["top20_de"][condition]
        kept = toy.genes[toy.top20_not_dropped_out(condition)].tolist()
        assert kept == toy.expected["top20_non_dropout_de"][condition]


@pytest.mark.parametrize("seed", [1, 2])
def test_split_of_gears(seed: int, toy: Toy) -> None:
    wanted = toy.expected["gears_split"]
    mine = simulation_split(wanted["conditions"], seed)
    assert mine.side_of == dict(wanted[f"seed{seed}"]["split"].items())
    groups = wanted[f"seed{seed}"]["test_subgroup"]
    assert mine.test_groups == {name: sorted(conditions) for name, conditions in groups.items()}
