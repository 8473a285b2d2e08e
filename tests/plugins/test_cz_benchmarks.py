"""The real cz-benchmarks takes what `scfm embed` writes, and our script runs its tasks as the golden scores were made.

Runs where $SCFM_CZB is the python of an environment made by `pip install cz-benchmarks==0.15.1`.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import anndata
import numpy as np
import pytest
from untrained import untrained_model

from scfm.cli import main

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.timeout(1800)]

SCRIPT = Path(__file__).parents[2] / "scripts" / "plugins" / "cz_benchmarks.py"


@pytest.fixture(scope="module")
def python() -> str:
    """The interpreter that has cz-benchmarks, and not scfm."""
    place = os.environ.get("SCFM_CZB", "")
    if not Path(place).is_file():
        pytest.skip("no cz-benchmarks: set SCFM_CZB to the python of an environment with cz-benchmarks==0.15.1")
    version = "from importlib.metadata import version; print(version('cz-benchmarks'))"
    done = subprocess.run([place, "-c", version], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "0.15.1", done.stderr
    return place


def scored(python: str, file: Path, out: Path, *options: str) -> tuple[dict, str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, str(SCRIPT), str(file), *options, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())["scores"], done.stdout


@pytest.mark.golden
@pytest.mark.parametrize("key", ["X_pca", "X_emb", "X_bad"])
def test_the_tasks_give_the_golden_scores(python: str, shared: Path, tmp_path: Path, key: str) -> None:
    golden = shared / "golden" / "evaluation"
    adata = anndata.read_h5ad(golden / "integration_small.h5ad")
    adata.X = adata.layers["counts"]  # for the baseline
    adata.write_h5ad(tmp_path / "cells.h5ad")
    options = ["--label", "celltype", "--batch", "batch", "--key", key]
    found, _ = scored(python, tmp_path / "cells.h5ad", tmp_path / "scores.json", *options)
    expected = json.loads((golden / "czbenchmarks_expected.json").read_text())["tasks"][key]
    assert found[key].keys() == expected.keys()
    for task, metrics in expected.items():
        assert [(one["metric"], one["params"]) for one in found[key][task]] == [
            (one["metric"], one["params"]) for one in metrics
        ]
        values = [one["value"] for one in found[key][task]]
        np.testing.assert_allclose(values, [one["value"] for one in metrics], atol=1e-5)


def test_what_embed_writes_is_scored_beside_their_baseline(python: str, shared: Path, tmp_path: Path) -> None:
    cells = anndata.read_h5ad(shared / "data" / "annotation" / "pbmc68k_reduced.h5ad")
    model = untrained_model(genes=list(cells.var_names))
    model.save_pretrained(tmp_path / "model")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    embedded = tmp_path / "embedded.h5ad"
    embed = ["embed", str(tmp_path / "cells.h5ad"), "--model", str(tmp_path / "model"), "--out", str(embedded)]
    assert main(embed) == 0
    found, printed = scored(python, embedded, tmp_path / "scores.json", "--label", "cell_type")
    assert found.keys() == {"X_scfm", "PCA baseline"}
    for scores in found.values():
        assert scores.keys() == {"clustering", "embedding", "label_prediction"}
        assert all(np.isfinite(one["value"]) for metrics in scores.values() for one in metrics)
    assert "label_prediction: mean_fold_f1" in printed
    # an untrained model loses to principal components; were the two mixed up, it would win
    f1 = {name: scores["label_prediction"][1]["value"] for name, scores in found.items()}
    assert f1["PCA baseline"] > f1["X_scfm"]
