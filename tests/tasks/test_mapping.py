"""`scfm index` and `scfm map` as a user meets them."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest
from cells import write_cells
from untrained import untrained_model

from scfm.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, two reference files and a query."""
    place = tmp_path_factory.mktemp("mapping")
    untrained_model().save_pretrained(place / "model")
    for name, seed, n in (("one", 1, 90), ("two", 2, 60), ("query", 3, 40)):
        write_cells(place / f"{name}.h5ad", n=n, seed=seed)
    return place


def run(place: Path, *arguments: str) -> int:
    return main([*arguments, "--model", str(place / "model")])


def test_an_index_of_two_files_maps_as_one_that_was_extended(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, query = (str(place / f"{name}.h5ad") for name in ("one", "two", "query"))
    labels = ["--label", "cell_type", "batch"]
    assert run(place, "index", one, two, *labels, "--out", str(tmp_path / "both")) == 0
    printed = capsys.readouterr().out
    assert "150 cells" in printed
    assert "cell_type: 3 names" in printed
    assert run(place, "index", one, *labels, "--out", str(tmp_path / "index")) == 0
    assert run(place, "index", two, "--extend", str(tmp_path / "index")) == 0
    found = []
    for reference in ("both", "index"):
        out = tmp_path / f"by-{reference}.h5ad"
        assert run(place, "map", query, "--reference", str(tmp_path / reference), "--out", str(out)) == 0
        found.append(anndata.read_h5ad(out))
    assert {"mapped_cell_type", "mapped_batch", "mapped_batch_confidence", "mapping_distance"} <= set(found[0].obs)
    np.testing.assert_array_equal(found[0].obsm["mapping_neighbours"], found[1].obsm["mapping_neighbours"])
    assert (found[0].obs == found[1].obs).all(axis=None)
    assert list(found[0].uns["mapping"]["reference"]) == [one, two]
    assert found[0].uns["scfm"]["model"] == str(place / "model")


def test_an_h5ad_file_is_a_reference_too(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, query, out = str(place / "one.h5ad"), str(place / "query.h5ad"), tmp_path / "out.h5ad"
    assert run(place, "map", query, "--reference", one, "--out", str(out)) == 2
    assert "--label: name the obs columns" in capsys.readouterr().err
    assert run(place, "map", query, "--reference", one, "--label", "cell_type", "--out", str(out)) == 0
    assert "cells unassigned, farther" in capsys.readouterr().out
    mapped = anndata.read_h5ad(out)
    found = mapped.obs["mapped_cell_type"].astype(str)
    assigned = found != "Unassigned"
    assert assigned.mean() > 0.7
    assert (found == mapped.obs["cell_type"].astype(str))[assigned].mean() > 0.8
    own = tmp_path / "own.h5ad"
    assert run(place, "map", one, "--reference", one, "--label", "cell_type", "--out", str(own)) == 0
    assert "note: 90 of the cells are in the reference themselves" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --out for a new index, or --extend"),
        (["--out", "new", "--extend", "index"], "give --out for a new index, or --extend"),
        (["--extend", "index", "--label", "cell_type"], "leave out --label and --batch"),
        (["--extend", "nothing"], "is not a reference index"),
        (["--out", "new"], "name at least one obs column"),
        (["--out", "."], "is not empty; choose another --out"),
    ],
)
def test_what_cannot_be_indexed_is_said(
    place: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    assert run(place, "index", "one.h5ad", *options) == 2
    assert message in capsys.readouterr().err
    assert not (place / "new").exists()
