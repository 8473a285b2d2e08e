"""The Census: a SOMA with its layout, on the disk, read by value filter in blocks, and built from."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from scfm.data.census import CensusSource, census_place
from scfm.data.opening import find_sources, open_source
from scfm.data.prepare import prepare
from scfm.data.shards import open_shards, read_manifest
from scfm.errors import ScfmError

LUNG = "tissue == 'lung' and is_primary_data == True"


@pytest.fixture(scope="session")
def census(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("tiledbsoma", reason="needs tiledbsoma and cellxgene-census: pip install 'scfm[census]'")
    pytest.importorskip("cellxgene_census", reason="needs tiledbsoma and cellxgene-census: pip install 'scfm[census]'")
    from census_soma import write_census

    return f"census:{write_census(tmp_path_factory.mktemp('census') / 'soma')}"


def lung_rows() -> np.ndarray:
    from census_soma import census_obs

    obs = census_obs()
    return np.flatnonzero((obs["tissue"] == "lung") & obs["is_primary_data"])


def test_the_cells_of_a_filter_are_those_of_the_census_in_the_order_of_their_joinids(census: str) -> None:
    from census_soma import census_counts, census_obs

    with open_source(census, organism="homo_sapiens", obs_value_filter=LUNG) as source:
        assert isinstance(source, CensusSource)
        expected = census_counts()[lung_rows()]
        assert (source.n_cells, source.n_values) == (len(lung_rows()), expected.nnz)
        assert (source.read(0, source.n_cells) != expected).nnz == 0
        assert (source.read(7, 31) != expected[7:31]).nnz == 0
        assert source.read(3, 3).shape == (0, 40)
        assert source.primary().all()
        assert source.cell_name(5) == f"soma_joinid {lung_rows()[5]}"
        donors = source.obs("donor_id")
        assert donors is not None
        named = [donors.categories[code] for code in donors.codes]
        assert named == census_obs()["donor_id"][lung_rows()].tolist()
        assert source.genes[0][:2] == ["ENSG00000000000", "ENSG00000000001"]
        assert source.genes[1][:2] == ["G0", "G1"]


def test_any_size_of_block_gives_the_same_cells(census: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from census_soma import census_counts

    monkeypatch.setattr(CensusSource, "values_per_block", 150)
    with open_source(census, obs_value_filter=LUNG) as source:
        blocks = list(source.blocks(10, 60))
        assert len(blocks) > 3
        assert [first for first, _ in blocks] == np.cumsum([10, *(block.shape[0] for _, block in blocks)])[:-1].tolist()
        together = np.concatenate([block.toarray() for _, block in blocks])
        np.testing.assert_array_equal(together, census_counts()[lung_rows()[10:60]].toarray())


def test_without_a_filter_all_cells_are_there_and_secondary_ones_are_known(census: str) -> None:
    from census_soma import N_CELLS

    with open_source(census) as source:
        assert source.n_cells == N_CELLS
        assert source.unwanted()["not primary"].sum() == N_CELLS / 5


def test_the_release_and_the_data_sets_are_the_provenance(census: str) -> None:
    from census_soma import ABOUT, N_CELLS

    with open_source(census, obs_value_filter="dataset_id == 'ds-1' and tissue == 'lung'") as source:
        said = source.provenance()
        assert said["datasets"] == {
            "ds-1": {
                "cells": source.n_cells,
                "title": "title 1",
                "citation": "Publication 1",
                "version": "version-1",
            }
        }
        assert {name: said[name] for name in ABOUT} == ABOUT
        assert said["cells_without_filter"] == N_CELLS
        full_length = int((np.arange(80, 160) % 4 == 0)[np.arange(80, 160) % 3 != 0].sum())
        assert said["full_length_assays"] == {"EFO:0008931 (Smart-seq2)": full_length}


def test_chosen_cells_are_looked_up_once_and_again_for_another_filter(
    census: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprint(value_filter: str) -> dict[str, object]:
        with open_source(census, obs_value_filter=value_filter, cache=tmp_path) as source:
            assert source.n_cells == source.read(0, source.n_cells).shape[0]
            return source.fingerprint()

    first = fingerprint(LUNG)
    assert fingerprint("tissue == 'liver'")["cells"] != first["cells"]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json", ".npy", ".npy"]
    with monkeypatch.context() as patch:
        patch.setattr(CensusSource, "_read_rows", lambda *_: pytest.fail("obs was asked again"))
        assert fingerprint(LUNG) == first


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"obs_value_filter": "tissue = 'lung'"}, "cells where tissue = 'lung' cannot be read"),
        ({"obs_value_filter": "tisue == 'lung'"}, "cells where tisue == 'lung' cannot be read"),
        ({"obs_value_filter": "tissue == 'Lung'"}, "no cell of Homo sapiens passes the filter .*check its spelling"),
        ({"organism": "Mus musculus"}, "no organism mus_musculus in census_data; there are homo_sapiens"),
    ],
)
def test_what_the_census_does_not_have_is_said(census: str, options: dict[str, str], complaint: str) -> None:
    with pytest.raises(ScfmError, match=complaint):
        open_source(census, **options)


def test_a_folder_that_is_no_census_is_refused(census: str, tmp_path: Path) -> None:
    with pytest.raises(ScfmError, match="the Census cannot be read"):
        open_source(f"census:{tmp_path}")
    place = census.removeprefix("census:")
    with pytest.raises(ScfmError, match=r"a TileDB group; .* write census:"):
        open_source(place)


def test_a_census_becomes_shards_that_name_the_data_set_of_each_cell(census: str, tmp_path: Path) -> None:
    from census_soma import census_counts, census_obs

    report = prepare([census], tmp_path / "out", obs_value_filter=LUNG, obs=["tissue"], keep_order=True, workers=1)
    assert report is not None
    rows = lung_rows()
    assert report.sources[0].kept == report.cells == len(rows)
    store = open_shards(tmp_path / "out")
    column = store.obs["dataset_id"]
    assert [column.categories[code] for code in np.asarray(column.codes)] == census_obs()["dataset_id"][rows].tolist()
    (block,) = store.in_turn()
    found = csr_matrix((block.values, block.genes, block.offsets), (block.n_cells, store.vocabulary.n_genes)).toarray()
    by_column = store.vocabulary.match([f"ENSG{i:011d}" for i in range(40)], [None] * 40)
    np.testing.assert_array_equal(found[:, by_column], census_counts()[rows].toarray())
    source = read_manifest(tmp_path / "out")["sources"][0]
    assert source["provenance"]["obs_value_filter"] == source["fingerprint"]["obs_value_filter"] == LUNG
    assert sum(dataset["cells"] for dataset in source["provenance"]["datasets"].values()) == len(rows)


def test_a_file_that_is_in_the_census_too_is_told(census: str, tmp_path: Path) -> None:
    from anndata import AnnData
    from census_soma import census_counts

    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(40)])
    file = AnnData(census_counts()[90:100], var=var, uns={"dataset_id": "ds-1"})
    file.write_h5ad(tmp_path / "ds-1.h5ad")
    prepare([census, tmp_path / "ds-1.h5ad"], tmp_path / "out", workers=1)
    manifest = read_manifest(tmp_path / "out")
    assert manifest["same_dataset"] == [["soma", "ds-1.h5ad"]]


# -- without the packages


def test_what_a_census_is_called(tmp_path: Path) -> None:
    assert [census_place(f"census:{name}") for name in ("stable", "2025-11-08", "s3://bucket/soma")] == [
        "stable",
        "2025-11-08",
        "s3://bucket/soma",
    ]
    (tmp_path / "x").mkdir()
    assert find_sources([f"census:{tmp_path}/x/.."]) == [f"census:{tmp_path}"]
    with pytest.raises(ScfmError, match=r"neither a version .* nor a folder"):
        census_place("census:2025")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cellxgene_census", None)
    with pytest.raises(ScfmError, match=r"pip install 'scfm\[census\]'"):
        open_source("census:stable")


def test_a_value_filter_without_a_census_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.h5ad").touch()
    with pytest.raises(ScfmError, match="--obs-value-filter chooses cells of a Census, and no source is one"):
        prepare([tmp_path / "a.h5ad"], tmp_path / "out", obs_value_filter=LUNG)
