"""What a path or uri is, and that every kind gives the same cells: h5ad, Cell Ranger's files, loom."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy.io import mmwrite
from scipy.sparse import coo_matrix, csr_matrix

import scfm
from scfm.data.opening import find_sources, open_source
from scfm.data.prepare import prepare
from scfm.data.shards import open_shards
from scfm.data.sources import Source
from scfm.errors import ScfmError

N_CELLS, N_GENES = 20, 6
IDS = [f"ENSG{i:011d}" for i in range(N_GENES)]
SYMBOLS = ["TP53", "CD3E", "NA", "MATR3", "MATR3", "HES4"]  # two genes of one symbol; one that looks like nothing
BARCODES = [f"AAAC{i:02d}-1" for i in range(N_CELLS)]
COUNTS = np.random.default_rng(0).poisson(1.5, (N_CELLS, N_GENES)).astype(np.int32)
PROTEINS = np.full((N_CELLS, 1), 99, np.int32)


def write_tenx_h5(path: Path) -> Path:
    """Write what Cell Ranger 3 and later write, with an antibody after the genes."""
    matrix = csr_matrix(np.hstack([COUNTS, PROTEINS]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        held = file.create_group("matrix")
        held["barcodes"] = np.array(BARCODES, "S")
        held["data"], held["indices"], held["indptr"] = matrix.data, matrix.indices.astype(np.int64), matrix.indptr
        held["shape"] = np.array(matrix.shape[::-1], np.int32)
        features = held.create_group("features")
        features["id"], features["name"] = np.array([*IDS, "CD3"], "S"), np.array([*SYMBOLS, "CD3"], "S")
        features["feature_type"] = np.array(["Gene Expression"] * N_GENES + ["Antibody Capture"], "S")
        features["genome"] = np.array(["GRCh38"] * (N_GENES + 1), "S")
    return path


def write_mtx(folder: Path, names: str = "features", zipped: bool = True) -> Path:
    """Write the folder of Cell Ranger 3 (features, zipped), 2 (genes, plain) or STARsolo (features, plain)."""
    folder.mkdir(parents=True)
    has_types = names == "features"
    mmwrite(folder / "matrix.mtx", coo_matrix((np.hstack([COUNTS, PROTEINS]) if has_types else COUNTS).T))
    lines = [f"{id}\t{symbol}" + "\tGene Expression" * has_types for id, symbol in zip(IDS, SYMBOLS, strict=True)]
    (folder / f"{names}.tsv").write_text("\n".join(lines + ["CD3\tCD3\tAntibody Capture"] * has_types) + "\n")
    (folder / "barcodes.tsv").write_text("\n".join(BARCODES) + "\n")
    for path in list(folder.iterdir()) if zipped else []:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    return folder


def write_h5ad(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    var = pd.DataFrame({"feature_name": SYMBOLS}, index=IDS)
    ad.AnnData(csr_matrix(COUNTS.astype(np.float32)), obs=pd.DataFrame(index=BARCODES), var=var).write_h5ad(path)
    return path


def expect_the_cells(source: Source) -> None:
    np.testing.assert_array_equal(source.read(0, N_CELLS).toarray(), COUNTS)
    assert source.genes == (IDS, SYMBOLS)
    assert [source.cell_name(row) for row in (0, 19)] == [BARCODES[0], BARCODES[19]]
    assert next(iter(source.blocks(5, 9)))[1].shape == (4, N_GENES)


def test_every_kind_gives_the_same_cells(tmp_path: Path) -> None:
    places = [
        write_h5ad(tmp_path / "a.h5ad"),
        write_h5ad(tmp_path / "an h5ad by another name.h5"),
        write_tenx_h5(tmp_path / "filtered.h5"),
        write_mtx(tmp_path / "cellranger3"),
        write_mtx(tmp_path / "cellranger2", names="genes", zipped=False),
        write_mtx(tmp_path / "starsolo", zipped=False),
    ]
    for place in places:
        with open_source(place) as source:
            expect_the_cells(source)
            assert source.label == str(place)


def test_loom_is_read_by_ids_and_symbols(tmp_path: Path) -> None:
    loompy = pytest.importorskip("loompy", reason="needs loompy: pip install 'scfm[loom]'")
    rows = {"Gene": np.array(SYMBOLS), "Accession": np.array(IDS)}
    columns = {"CellID": np.array(BARCODES), "tissue": np.array(["lung"] * N_CELLS)}
    loompy.create(str(tmp_path / "a.loom"), COUNTS.T, rows, columns)
    with open_source(tmp_path / "a.loom") as source:
        expect_the_cells(source)
        assert source.obs_names == ["tissue"]


def test_loom_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(tmp_path / "a.loom", "w") as file:
        file["matrix"] = COUNTS.T
        file.create_group("row_attrs")
    monkeypatch.setitem(sys.modules, "loompy", None)
    with pytest.raises(ScfmError, match=r"a\.loom: .*pip install 'scfm\[loom\]'"):
        open_source(tmp_path / "a.loom")


def test_a_folder_is_searched_for_all_kinds(tmp_path: Path) -> None:
    write_h5ad(tmp_path / "b/cells.h5ad")
    for name in ("filtered_feature_bc_matrix", "raw_feature_bc_matrix"):
        write_tenx_h5(tmp_path / f"outs/{name}.h5")
        write_mtx(tmp_path / f"outs/{name}")
    write_mtx(tmp_path / "c/GRCh38")
    with h5py.File(tmp_path / "outs/molecule_info.h5", "w") as file:
        file["barcodes"] = np.arange(3)
    (tmp_path / "outs/notes.txt").touch()
    wanted = ["b/cells.h5ad", "c/GRCh38", "outs/filtered_feature_bc_matrix.h5"]
    assert find_sources([tmp_path]) == [str(tmp_path / name) for name in wanted]
    # what a search leaves out is read when it is named
    named = tmp_path / "outs/raw_feature_bc_matrix"
    assert find_sources([named, tmp_path / "b"]) == [str(named), str(tmp_path / "b/cells.h5ad")]
    with pytest.raises(ScfmError, match=r"named more than once .*cells\.h5ad"):
        find_sources([tmp_path, tmp_path / "b/cells.h5ad"])


def test_a_fingerprint_changes_with_any_file_of_the_source(tmp_path: Path) -> None:
    folder = write_mtx(tmp_path / "mtx")
    for place, inside in ((folder, folder / "features.tsv.gz"), (write_tenx_h5(tmp_path / "a.h5"), tmp_path / "a.h5")):
        with open_source(place) as source:
            before = source.fingerprint()
            assert before == source.fingerprint()
            inside.write_bytes(inside.read_bytes() + b"\0")
            assert source.fingerprint()["size"] == before["size"] + 1


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / "barcodes.tsv.gz").unlink(), r"has no barcodes\.tsv\.gz \(nor barcodes\.tsv\)"),
        (lambda folder: (folder / "features.tsv.gz").unlink(), r"has no features\.tsv\.gz \(nor .*genes\.tsv\)"),
        (
            lambda folder: (folder / "barcodes.tsv.gz").write_bytes(gzip.compress(b"AAAC\n")),
            r"7 features x 20 barcodes, but features\.tsv\.gz has 7 lines and barcodes\.tsv\.gz 1",
        ),
        (lambda folder: (folder / "matrix.mtx.gz").write_bytes(b"no gzip"), "cannot be read; it is truncated"),
    ],
)
def test_a_damaged_matrix_folder_is_refused_in_words(tmp_path: Path, damage: object, complaint: str) -> None:
    folder = write_mtx(tmp_path / "mtx")
    damage(folder)
    with pytest.raises(ScfmError, match=complaint):
        open_source(folder)


def test_what_is_no_source_is_refused_in_words(tmp_path: Path) -> None:
    whole = write_tenx_h5(tmp_path / "whole.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.h5").write_text("not today")
    folder = write_mtx(tmp_path / "mtx")
    for spec, complaint in {
        tmp_path / "cut.h5": r"cut\.h5: cannot be read; .*truncated",
        tmp_path / "text.h5": r"text\.h5: not an h5ad file \(it is not HDF5\)",
        tmp_path / "none.h5": "there is no such file",
        tmp_path: "a folder; here a single source is needed",
        folder / "matrix.mtx.gz": "name the folder, .*mtx, which holds barcodes",
        "s3://bucket/cells.h5ad": "of uris, only those of a Census are: census:s3://bucket",
    }.items():
        with pytest.raises(ScfmError, match=complaint):
            open_source(spec)
    with pytest.raises(ScfmError, match="no source is named"):
        find_sources([])


def test_a_build_takes_all_kinds_at_once_and_check_takes_each(tmp_path: Path) -> None:
    sources = [write_h5ad(tmp_path / "a.h5ad"), write_tenx_h5(tmp_path / "b.h5"), write_mtx(tmp_path / "c")]
    report = prepare(sources, tmp_path / "out", duplicates="keep", keep_order=True, workers=1)
    assert report is not None
    assert [source.file for source in report.sources] == ["a.h5ad", "b.h5", "c"]
    store = open_shards(tmp_path / "out")
    totals = np.concatenate([np.add.reduceat(b.values.astype(np.int64), b.offsets[:-1]) for b in store.in_turn()])
    np.testing.assert_array_equal(totals, np.tile(COUNTS.sum(1), 3))
    assert all(scfm.check(source, vocabulary=tmp_path / "out/vocab.json").ok for source in sources)


@pytest.mark.realdata
def test_real_files_of_cell_ranger_are_the_same_as_file_and_folder(shared: Path) -> None:
    import scanpy

    path = shared / "data/formats/tenx_v3_filtered_feature_bc_matrix.h5"
    expected = scanpy.read_10x_h5(path)
    with open_source(path) as h5, open_source(shared / "data/formats/tenx_v3_mtx") as mtx:
        assert (h5.n_cells, len(h5.var)) == (1107, expected.n_vars)
        for source in (h5, mtx):
            assert (source.read(0, source.n_cells) != expected.X).nnz == 0
            assert source.genes[0] == expected.var["gene_ids"].tolist()
