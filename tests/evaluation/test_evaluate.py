"""`scfm evaluate` from files to a report: reference mapping, types that were withheld, cells of another organism."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from cells import GENES, made_up_cells
from untrained import untrained_model

from scfm.errors import ScfmError
from scfm.evaluation import evaluate as verb
from scfm.evaluation.harness import Comparison
from scfm.model.novelty import UNASSIGNED

MOUSE = [name.replace("G", "m") for name in GENES]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a model, human and mouse cells, and a table of orthologs that lacks ten of sixty genes."""
    place = tmp_path_factory.mktemp("evaluate")
    untrained_model().save_pretrained(place / "model")
    for name, seed, genes in (("human", 0, GENES), ("query", 1, GENES), ("mouse", 2, MOUSE)):
        cells = made_up_cells(90, seed, genes)
        cells.obs["organism"] = "mouse" if genes is MOUSE else "human"
        cells.write_h5ad(place / f"{name}.h5ad")
    pairs = [(f"ENSG{k:011}", f"ENSMUSG{k:011}", GENES[k], MOUSE[k]) for k in range(50)]
    pd.DataFrame(pairs, columns=["human_ensembl", "mouse_ensembl", "human", "mouse"]).to_csv(
        place / "orthologs.csv", index=False
    )
    return place


def evaluated(place: Path, out: Path, monkeypatch: pytest.MonkeyPatch, task: str = "mapping", **options: Any) -> Any:
    """Return the comparison and metrics.json; the page has tests of its own."""

    def scores_alone(comparison: Comparison, out: Path, *, title: str) -> Path:
        from scfm.evaluation.provenance import provenance
        from scfm.evaluation.report import metrics_json

        out.mkdir(exist_ok=True)
        (out / "metrics.json").write_text(metrics_json(comparison, title, provenance()))
        return out

    monkeypatch.setattr(verb, "write_report", scores_alone)
    data = [str(place / name) for name in options.pop("data", ["query.h5ad"])]
    files = {name: str(place / options.pop(name)) for name in ("reference", "orthologs") if name in options}
    comparison = verb.evaluate(task, model=str(place / "model"), data=data, out=str(out), seeds=1, **files, **options)
    return comparison, json.loads((out / "metrics.json").read_text())


def test_mapping_stands_beside_classifiers_that_may_abstain_too(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison, found = evaluated(place, tmp_path / "out", monkeypatch, reference="human.h5ad")
    assert comparison.passed
    assert comparison.names("baseline") == ["majority class", "kNN on PCA", "logistic regression"]
    assert found["task"] == "mapping"
    of_model = comparison.runs_of("scGPT (scfm)")[0]
    assert set(of_model.values) == set(comparison.protocol.metrics)
    assert of_model.values["known_kept"] == np.mean(of_model.predicted != UNASSIGNED)
    assert of_model.values["accuracy"] == np.mean(of_model.predicted == comparison.truth[comparison.splits[0].test])
    printed = " ".join(capsys.readouterr().out.split())
    assert "Held out: fitted on the reference, judged on the other set; 0 cells of types it lacks left out." in printed


def test_withheld_types_train_nothing_and_should_be_unassigned(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison, found = evaluated(
        place, tmp_path / "out", monkeypatch, "annotation", novel=["NK cell"], setting="zero_shot"
    )
    assert comparison.passed
    (split,) = comparison.splits
    assert set(comparison.truth[split.train]) == {"B cell", "T cell"}
    assert set(comparison.truth[split.test]) == {"B cell", "T cell", UNASSIGNED}
    assert "no training cell is of NK cell, which should be called Unassigned" in found["splits"][0]["protocol"]
    assert found["task"] == "annotation, novel types"
    oracle, most = (comparison.runs_of(name)[0].values for name in ("true labels", "majority class"))
    assert set(oracle.values()) == {1.0}
    assert (most["novel_found"], most["known_kept"], most["novelty_auroc"]) == (0, 1, 0.5)
    (model,) = comparison.runs_of("scGPT (scfm)")
    novel = comparison.truth[split.test] == UNASSIGNED
    assert model.values["novel_found"] == np.mean(model.predicted[novel] == UNASSIGNED)
    # the made-up types share no gene, so a linear classifier is unsure of the third one
    assert comparison.runs_of("logistic regression")[0].values["novelty_auroc"] > 0.7


def test_mouse_teaches_human_through_orthologs(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison, found = evaluated(
        place, tmp_path / "out", monkeypatch, reference="mouse.h5ad", orthologs="orthologs.csv"
    )
    assert comparison.cells.adata.var_names.tolist() == GENES[:50]
    assert comparison.summary("kNN on PCA", "accuracy").mean > 0.9
    protocol = found["splits"][0]["protocol"]
    assert "across species: mouse cells in human genes, 50 of 60 by one-to-one orthologs" in protocol
    assert found["title"] == "Mapping of mouse to query"


def test_a_split_by_species_holds_one_out(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison, _ = evaluated(
        place,
        tmp_path / "out",
        monkeypatch,
        data=["human.h5ad", "mouse.h5ad"],
        orthologs="orthologs.csv",
        split="species",
        held_out=["human"],
    )
    organism = comparison.cells.adata.obs["organism"].to_numpy(dtype=str)
    assert set(organism[comparison.splits[0].test]) == {"human"}
    assert comparison.splits[0].protocol.startswith("by organism: organism human held out whole; across species: mouse")


def test_what_cannot_be_asked_is_said(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, task: str = "mapping", **options: Any) -> None:
        with pytest.raises(ScfmError, match=message):
            evaluated(place, tmp_path / "out", monkeypatch, task, **options)

    refused("--novel: no cell is labelled Treg; there is B cell, NK cell, T cell", novel=["Treg"])
    refused("--novel: integration predicts no types", "integration", novel=["B cell"])
    refused("--curve: with --novel", "annotation", novel=["B cell"], curve=[5])
    refused("--orthologs: all cells are of human, as the model is", orthologs="orthologs.csv")
    refused("the model is of human, all cells are of mouse", data=["mouse.h5ad"], orthologs="orthologs.csv")
    refused("nothing is trained for mapping", reference="human.h5ad", setting="full")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: {known_kept: 0.8}")
    refused("--config: nothing is trained for mapping", reference="human.h5ad", config=str(recipe))
    refused(
        "task.known_kept: 0.8; with --novel all methods keep 95%", "annotation", novel=["B cell"], config=str(recipe)
    )
    cells = anndata.read_h5ad(place / "query.h5ad")
    cells.obs["cell_type"] = cells.obs["cell_type"].cat.rename_categories({"T cell": UNASSIGNED})
    cells.write_h5ad(tmp_path / "called.h5ad")
    refused("--novel: cells are labelled Unassigned already", data=[tmp_path / "called.h5ad"], novel=["B cell"])
