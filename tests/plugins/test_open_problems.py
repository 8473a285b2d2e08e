"""The component for Open Problems runs as viash runs it, on data in their format, and writes what they ask for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import yaml
from cells import made_up_cells
from untrained import WIDTH, untrained_model

FOLDER = Path(__file__).parents[2] / "scripts" / "plugins" / "open_problems"


def as_open_problems(adata: anndata.AnnData, genes: list[str]) -> anndata.AnnData:
    """Return cells as a method of batch integration is given them: no X, no cell types, counts in a layer."""
    n = adata.n_obs
    counts = adata.X.astype(np.int32)
    ids = [f"ENSG{i:011d}" for i in range(adata.n_vars)]
    var = pd.DataFrame({"hvg": True, "hvg_score": 1.0, "feature_name": genes}, index=ids)
    dataset = anndata.AnnData(obs=adata.obs[["batch"]].copy(), var=var)
    dataset.layers["counts"] = counts
    dataset.layers["normalized"] = counts.astype(np.float32).log1p()
    dataset.obsm["X_pca"] = np.zeros((n, 5))
    dataset.uns |= {"dataset_id": "made/up", "normalization_id": "log_cp10k", "dataset_organism": "homo_sapiens"}
    return dataset


def run_component(par: dict[str, Any], meta: dict[str, str]) -> None:
    """Run script.py with `par` and `meta` in place of what stands between the markers, as viash does."""
    script = (FOLDER / "script.py").read_text()
    given = f"## VIASH START\npar = {par!r}\nmeta = {meta!r}\n## VIASH END"
    script, n = re.subn(r"## VIASH START\n.*?## VIASH END", lambda _: given, script, flags=re.DOTALL)
    assert n == 1
    exec(compile(script, "script.py", "exec"), {"__name__": "__main__"})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("open_problems") / "model"
    untrained_model().save_pretrained(place)
    return place


def test_the_component_writes_an_embedding_as_they_ask_for(model: Path, tmp_path: Path) -> None:
    cells = made_up_cells(40, seed=1)
    as_open_problems(cells, list(cells.var_names)).write_h5ad(tmp_path / "dataset.h5ad")
    par = {"input": str(tmp_path / "dataset.h5ad"), "model": str(model), "output": str(tmp_path / "output.h5ad")}
    run_component(par, {"name": "scfm"})
    output = anndata.read_h5ad(tmp_path / "output.h5ad")
    assert list(output.obsm) == ["X_emb"]
    np.testing.assert_allclose(output.obsm["X_emb"], untrained_model().embed(cells).obsm["X_scfm"], atol=1e-6)
    assert output.obsm["X_emb"].shape == (40, WIDTH)
    assert list(output.obs_names) == list(cells.obs_names)
    assert dict(output.uns) == {"dataset_id": "made/up", "normalization_id": "log_cp10k", "method_id": "scfm"}


def test_data_whose_genes_the_model_does_not_know_are_not_applicable(model: Path, tmp_path: Path) -> None:
    cells = made_up_cells(40, seed=1)
    as_open_problems(cells, [f"mouse{i}" for i in range(cells.n_vars)]).write_h5ad(tmp_path / "dataset.h5ad")
    par = {"input": str(tmp_path / "dataset.h5ad"), "model": str(model), "output": str(tmp_path / "output.h5ad")}
    with pytest.raises(SystemExit) as stopped:
        run_component(par, {"name": "scfm"})
    assert stopped.value.code == 99
    assert not (tmp_path / "output.h5ad").exists()


def test_the_config_says_what_the_script_reads() -> None:
    config = yaml.safe_load((FOLDER / "config.vsh.yaml").read_text())
    assert {"name", "label", "summary", "description", "references", "info", "resources", "engines"} <= set(config)
    assert config["info"] == {"method_types": ["embedding"], "preferred_normalization": "counts"}
    script = (FOLDER / "script.py").read_text()
    read = set(re.findall(r'par\["(\w+)"\]', script))
    theirs = {"input", "output"}  # from base_method.yaml
    assert read == theirs | {one["name"].removeprefix("--") for one in config["arguments"]}
    assert [one["path"] for one in config["resources"]] == ["script.py"]
