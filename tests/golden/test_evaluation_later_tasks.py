"""Scores of imputation, simulation and gene networks equal the stored ones."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from golden_values import stored

from scfm.evaluation.metrics import imputation, network, simulation
from scfm.evaluation.metrics.perturbation import pearson
from scfm.evaluation.metrics.silhouette import asw_label, group_distances

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def cells(shared: Path) -> ad.AnnData:
    return ad.read_h5ad(shared / "golden/evaluation/integration_small.h5ad")


def same(mine: dict[str, float], wanted: dict[str, float | None]) -> None:
    """Undefined scores are null in the goldens, NaN with us."""
    assert set(mine) == set(wanted)
    for name, value in wanted.items():
        assert mine[name] == pytest.approx(np.nan if value is None else value, abs=1e-5, nan_ok=True), name


@pytest.mark.parametrize("method", ["no_denoising", "gene_mean", "knn_smoothing_k15", "lowrank10_svd"])
def test_imputation(method: str, shared: Path, cells: ad.AnnData) -> None:
    wanted, arrays = stored(shared, "imputation"), np.load(shared / "golden/evaluation/imputation.npz")
    shape = tuple(arrays["mask_shape"])
    mask = np.unpackbits(arrays["mask"])[: np.prod(shape)].reshape(shape).astype(bool)
    assert mask.sum() == wanted["masked_entries"]
    predicted = simulation.normalised(arrays[f"masked_pred_{method}"].astype(np.float64))
    same(imputation.masked_scores(cells.X.toarray(), predicted, mask), wanted["methods"][method]["masked"])

    test, denoised = arrays["test_counts"].astype(np.float64), arrays[f"mcv_pred_{method}"].astype(np.float64)
    scaled = denoised * test.sum() / arrays["train_counts"].sum()
    mine = {
        "openproblems_mse": np.mean((simulation.normalised(test) - simulation.normalised(denoised)) ** 2),
        "openproblems_poisson_as_coded_args_swapped": imputation.poisson_loss(scaled, test),
        "poisson_nll_correct_order": imputation.poisson_loss(test, scaled),
    }
    same(mine, wanted["methods"][method]["mcv"])


@pytest.mark.parametrize("simulator", ["nb_independent", "permuted_within_type", "real_itself"])
def test_simulation(simulator: str, shared: Path, cells: ad.AnnData) -> None:
    from sklearn.decomposition import PCA

    golden = stored(shared, "simulation")
    wanted = golden["simulators"][simulator]
    real = cells.layers["counts"].toarray().astype(np.float64)
    arrays = np.load(shared / "golden/evaluation/simulation.npz")
    drawn = real if simulator == "real_itself" else arrays[simulator].astype(np.float64)
    ours, theirs = simulation.summaries(real), simulation.summaries(drawn)
    for name in ours:
        mine = simulation.distribution_distance(ours[name], theirs[name])
        by_gene = pearson(ours[name], theirs[name]) if name.startswith("gene") else np.nan
        same({**mine, "pearson": by_gene}, wanted[name])
    genes = [cells.var_names.get_loc(name) for name in golden["hvg50_from_real"]]
    before, after = (simulation.gene_correlations(simulation.normalised(x)[:, genes]) for x in (real, drawn))
    assert pearson(before, after) == pytest.approx(wanted["gene_gene_corr_of_corr"], abs=1e-5)
    assert np.abs(before - after).mean() == pytest.approx(wanted["gene_gene_corr_mae"], abs=1e-5)
    pca = PCA(10, svd_solver="full").fit(simulation.normalised(real))
    x, y = (pca.transform(simulation.normalised(one)) for one in (real, drawn))
    mmd = simulation.maximum_mean_discrepancy(x, y)
    assert mmd == pytest.approx(wanted["mmd2_rbf_median_pca10"], abs=1e-5)
    labels = cells.obs["celltype"].to_numpy(str)
    asw = asw_label(group_distances(y, labels, np.zeros(len(labels), dtype=str), "euclidean"))
    assert asw == pytest.approx(wanted["asw_label_pca10"], abs=1e-5)


def test_network_edges(shared: Path) -> None:
    golden = stored(shared, "grn")
    scores, gold = np.array([e[2] for e in golden["edges"]]), np.array([bool(e[3]) for e in golden["edges"]])
    wanted = golden["expected"]
    assert (len(scores), int(gold.sum())) == (wanted["n_edges"], wanted["n_gold"])
    mine = network.edge_scores(scores, gold)
    assert mine == pytest.approx({name: wanted[name] for name in mine}, abs=1e-9)
    assert set(wanted) == set(mine) | {"n_edges", "n_gold"}


def test_enrichment(shared: Path) -> None:
    wanted = stored(shared, "grn")["enrichment"]
    assert wanted["background"] == "all 150 genes"
    background = [f"g{k}" for k in range(150)]
    p = {name: network.enrichment_p(wanted["query"], genes, background) for name, genes in wanted["gene_sets"].items()}
    assert p == pytest.approx(wanted["scipy_hypergeom_sf"], rel=1e-9)
    tested = list(wanted["gseapy_p"])  # it leaves sets without overlap out
    assert [p[name] for name in tested] == pytest.approx(list(wanted["gseapy_p"].values()), rel=1e-9)
    adjusted = network.benjamini_hochberg(np.array([p[name] for name in tested]))
    assert adjusted.tolist() == pytest.approx(list(wanted["gseapy_fdr"].values()), rel=1e-9)
    mine = {name: network.jaccard(wanted["query"], genes) for name, genes in wanted["gene_sets"].items()}
    assert mine == pytest.approx(wanted["jaccard"])
