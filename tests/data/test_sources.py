"""Sources: raw counts are found where the schema puts them, values are checked to the last, genes are told apart."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csc_matrix, csr_matrix

from scfm.data import sources
from scfm.data.genes import genes_of, with_names_of
from scfm.data.h5ad import H5adSource
from scfm.data.sources import AnnDataSource, store_from_anndata
from scfm.data.store import CellStore
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.errors import ScfmError

N_CELLS, N_GENES = 40, 12
GENES = [f"G{i}" for i in range(N_GENES)]
VOCABULARY = Vocabulary.from_genes(Gene.of(None, name) for name in GENES)


def counts(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).poisson(1.0, (N_CELLS, N_GENES)).astype(np.float32)


def annotated(values: np.ndarray | csr_matrix | csc_matrix) -> ad.AnnData:
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical(["B", None, "T", "T"] * 10)}, index=[f"c{i}" for i in range(N_CELLS)]
    )
    return ad.AnnData(values, obs=obs, var=pd.DataFrame(index=GENES))


def written(adata: ad.AnnData, path: Path) -> Path:
    adata.write_h5ad(path)
    return path


def dense_of(store: CellStore) -> np.ndarray:
    parts = [csr_matrix((b.values, b.genes, b.offsets), (b.n_cells, store.vocabulary.n_genes)) for b in store.blocks]
    by_id = np.concatenate([part.toarray() for part in parts])
    return by_id[:, [store.vocabulary.names.index(name) for name in GENES]]


def read_all(source: sources.Source) -> np.ndarray:
    blocks = list(source.blocks())
    assert [first for first, _ in blocks] == np.cumsum([0, *(b.shape[0] for _, b in blocks)])[:-1].tolist()
    return np.concatenate([block.toarray() for _, block in blocks])


@pytest.mark.parametrize("layout", [csr_matrix, csc_matrix, np.asarray])
@pytest.mark.parametrize("values_per_block", [7, 50, 10_000])
def test_any_layout_in_any_block_size_gives_the_same_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: type, values_per_block: int
) -> None:
    monkeypatch.setattr(sources.Source, "values_per_block", values_per_block)
    monkeypatch.setattr(sources, "VALUES_PER_BLOCK", values_per_block)
    monkeypatch.setattr(sources, "VALUES_PER_COLUMN_PASS", values_per_block)
    adata = annotated(layout(counts()))
    np.testing.assert_array_equal(read_all(AnnDataSource(adata)), counts())
    with H5adSource(written(adata, tmp_path / "a.h5ad")) as source:
        assert source.n_cells == N_CELLS
        np.testing.assert_array_equal(read_all(source), counts())


def test_raw_is_read_where_there_is_one(tmp_path: Path) -> None:
    adata = annotated(csr_matrix(counts()))
    adata.raw = adata.copy()
    adata = adata[:, :5].copy()
    adata.X = np.log1p(adata.X)
    np.testing.assert_array_equal(dense_of(store_from_anndata(adata, VOCABULARY)), counts())
    with H5adSource(written(adata, tmp_path / "a.h5ad")) as source:
        assert source.place == "raw.X"
        np.testing.assert_array_equal(read_all(source), counts())


def test_a_store_keeps_a_row_for_every_cell_and_leaves_the_anndata_alone() -> None:
    values = counts()
    values[3] = 0
    adata = annotated(csr_matrix(values))
    before = adata.copy()
    store = store_from_anndata(adata, VOCABULARY, obs_columns=["cell_type"])
    np.testing.assert_array_equal(dense_of(store), values)
    assert store.n_genes(np.array([3])).tolist() == [0]
    assert store.cell_names is not None
    assert store.cell_names.tolist() == adata.obs_names.tolist()
    assert store.obs["cell_type"].categories == ["B", "T"]
    assert store.obs["cell_type"].codes[:4].tolist() == [0, -1, 1, 1]
    np.testing.assert_array_equal(adata.X.toarray(), before.X.toarray())
    pd.testing.assert_frame_equal(adata.obs, before.obs)


def test_genes_outside_the_vocabulary_are_left_out_and_doubles_are_summed() -> None:
    adata = annotated(csr_matrix(counts()))
    adata.var["gene_symbol"] = ["G0", "G0", *GENES[2:]]
    store = store_from_anndata(adata, Vocabulary.from_genes([Gene.of(None, "G0"), Gene.of(None, "G5")]))
    block = store.blocks[0]
    found = csr_matrix((block.values, block.genes, block.offsets), (N_CELLS, 2)).toarray()
    np.testing.assert_array_equal(found, np.stack([counts()[:, :2].sum(1), counts()[:, 5]], 1))


def test_an_anndata_view_and_an_empty_anndata_are_read() -> None:
    adata = annotated(csr_matrix(counts()))
    np.testing.assert_array_equal(dense_of(store_from_anndata(adata[[7, 3]], VOCABULARY)), counts()[[7, 3]])
    assert store_from_anndata(adata[:0], VOCABULARY).n_cells == 0


def test_an_obs_column_that_is_not_there_is_named() -> None:
    with pytest.raises(ScfmError, match=r"no obs column donor; it has cell_type"):
        store_from_anndata(annotated(counts()), VOCABULARY, obs_columns=["donor"])


@pytest.mark.parametrize("layout", [csr_matrix, np.asarray])
def test_a_backed_anndata_is_read(tmp_path: Path, layout: type) -> None:
    adata = annotated(layout(counts()))
    adata.raw = adata.copy()
    adata.X = layout(np.log1p(counts()))
    backed = ad.read_h5ad(written(adata, tmp_path / "a.h5ad"), backed="r")
    np.testing.assert_array_equal(dense_of(store_from_anndata(backed, VOCABULARY)), counts())


# -- values that are no counts


LAST = np.zeros((N_CELLS, N_GENES), bool)
LAST[-1, -1] = True


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (np.log1p(counts()), r"X holds .* raw counts are whole numbers.*look log-normalised.*--accept-normalised"),
        (np.where(LAST, 0.5, counts()), r"X holds 0\.5 for gene G11 in cell c39.*log-normalised"),
        (counts() * 1234.5, r"normalised, but not log-transformed"),
        (counts() - 1, r"X holds -1 for gene .* scaled .*also not with --accept-normalised"),
        (np.where(LAST, np.nan, counts()), r"X holds nan for gene G11 in cell c39; values must be finite"),
        (np.where(LAST, np.inf, counts()), r"X holds inf for gene G11"),
        (np.where(LAST, 2.0**40, counts()), r"no raw count is that large"),
    ],
)
def test_values_that_are_no_counts_are_refused_in_words(tmp_path: Path, values: np.ndarray, complaint: str) -> None:
    adata = annotated(csr_matrix(values.astype(np.float32)))
    with pytest.raises(ScfmError, match=complaint):
        store_from_anndata(adata, VOCABULARY)
    with (
        H5adSource(written(adata, tmp_path / "a.h5ad")) as source,
        pytest.raises(ScfmError, match=r"a\.h5ad: .*" + complaint),
    ):
        read_all(source)


def test_normalised_values_are_taken_when_accepted() -> None:
    values = np.log1p(counts())
    store = store_from_anndata(annotated(csr_matrix(values)), VOCABULARY, accept_normalised=True)
    assert store.value_kind == "normalised"
    assert store.blocks[0].values.dtype == np.float32
    np.testing.assert_array_equal(dense_of(store), values)


def test_counts_stay_counts_where_normalised_values_would_be_accepted() -> None:
    store = store_from_anndata(annotated(csr_matrix(counts())), VOCABULARY, accept_normalised=True)
    assert (store.value_kind, store.blocks[0].values.dtype) == ("counts", np.uint8)


@pytest.mark.parametrize("spoil", [-0.5, np.nan])
def test_scaled_and_missing_values_are_refused_also_then(spoil: float) -> None:
    adata = annotated(csr_matrix(np.where(LAST, spoil, np.log1p(counts()))))
    with pytest.raises(ScfmError, match="in cell c39"):
        store_from_anndata(adata, VOCABULARY, accept_normalised=True)


def test_layers_that_may_hold_the_counts_are_named() -> None:
    adata = annotated(np.log1p(counts()))
    adata.layers["spliced_counts"] = counts()
    with pytest.raises(ScfmError, match=r"layers here: spliced_counts"):
        store_from_anndata(adata, VOCABULARY)


# -- files that are no h5ad


def test_files_that_are_no_h5ad_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.h5ad").write_text("gene\tcell\n")
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["matrix"] = [1, 2]
    with pytest.raises(ScfmError, match=r"text\.h5ad: not an h5ad file \(it is not HDF5\)"):
        H5adSource(tmp_path / "text.h5ad")
    with pytest.raises(ScfmError, match=r"other\.h5ad: HDF5, but not an h5ad file: it has no obs, var, X"):
        H5adSource(tmp_path / "other.h5ad")
    with pytest.raises(ScfmError, match=r"none\.h5ad: there is no such file"):
        H5adSource(tmp_path / "none.h5ad")


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = written(annotated(csr_matrix(counts())), tmp_path / "a.h5ad")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(ScfmError, match=r"a\.h5ad: .* truncated or damaged"):
        H5adSource(path)


def test_a_file_whose_data_are_damaged_is_named(tmp_path: Path) -> None:
    adata = annotated(csr_matrix(counts()))
    adata.write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    with h5py.File(tmp_path / "a.h5ad") as file:
        chunk = file["X/data"].id.get_chunk_info(0)
    content = bytearray((tmp_path / "a.h5ad").read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    (tmp_path / "a.h5ad").write_bytes(content)
    with (
        H5adSource(tmp_path / "a.h5ad") as source,
        pytest.raises(ScfmError, match=r"a\.h5ad: X, cells 0 to 39 cannot be read; the file is truncated or damaged"),
    ):
        read_all(source)


@pytest.mark.parametrize(
    ("layout", "part", "complaint"),
    [
        (csr_matrix, "indptr", "its indptr does not fit"),
        (csr_matrix, "indices", "an index is not below 12"),
        (csc_matrix, "indices", "an index is not below 40"),
    ],
)
def test_a_matrix_that_contradicts_itself_is_named(tmp_path: Path, layout: type, part: str, complaint: str) -> None:
    path = written(annotated(layout(counts())), tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as file:
        file[f"X/{part}"][3] = 10**6
    with pytest.raises(ScfmError, match=rf"a\.h5ad: X is damaged: {complaint}"), H5adSource(path) as source:
        read_all(source)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("shape", [N_CELLS, N_GENES + 1], "X is 40 x 13, but obs and var tell of 40 cells and 12 genes"),
        ("encoding-type", "awkward-array", "X is stored as 'awkward-array'; CSR, CSC and dense are known"),
    ],
)
def test_a_matrix_of_another_shape_or_kind_is_named(tmp_path: Path, key: str, value: object, complaint: str) -> None:
    path = written(annotated(csr_matrix(counts())), tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as file:
        file["X"].attrs[key] = value
    with pytest.raises(ScfmError, match=complaint):
        H5adSource(path)


def test_files_of_anndata_before_0_7_are_named(tmp_path: Path) -> None:
    path = written(annotated(csr_matrix(counts())), tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as file:
        del file["obs"]
        file["obs"] = np.zeros(N_CELLS, [("index", "S4")])
    with pytest.raises(ScfmError, match=r"a\.h5ad: written by an anndata before 0\.7; read it"):
        H5adSource(path)


@pytest.mark.filterwarnings("ignore::anndata.OldFormatWarning")
def test_categories_of_anndata_0_7_are_read(tmp_path: Path) -> None:
    path = written(annotated(csr_matrix(counts())), tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as file:
        obs = file["obs"]
        codes, categories = obs["cell_type/codes"][:], obs["cell_type/categories"].asstr()[:]
        del obs["cell_type"]
        obs["cell_type"] = codes
        obs.create_group("__categories").create_dataset("cell_type", data=categories.astype(object))
        obs["cell_type"].attrs["categories"] = obs["__categories/cell_type"].ref
        obs.attrs["encoding-version"] = "0.1.0"
    with H5adSource(path) as source:
        column = source.obs("cell_type")
    assert column is not None
    assert (column.categories, column.codes[:4].tolist()) == (["B", "T"], [0, -1, 1, 1])


def test_no_gene_matched_shows_what_was_seen_and_what_was_expected() -> None:
    vocabulary = Vocabulary.from_genes([Gene.of("ENSG00000141510", "TP53")])
    with pytest.raises(ScfmError, match=r"none of its 12 .* Seen: G0, G1, .* Expected: ENSG00000141510 \(TP53\)"):
        store_from_anndata(annotated(counts()), vocabulary)


# -- obs columns


@pytest.mark.parametrize(
    ("values", "categories", "codes"),
    [
        (pd.Categorical(["T", "B", None, "T"], ["unused", "T", "B"]), ["T", "B"], [0, 1, -1, 0]),
        (["b", "a", "b", "c"], ["a", "b", "c"], [1, 0, 1, 2]),
        ([True, False, True, True], ["False", "True"], [1, 0, 1, 1]),
        ([3, 1, 3, 2], ["1", "2", "3"], [2, 0, 2, 1]),
    ],
)
def test_obs_columns_become_codes_and_categories(
    tmp_path: Path, values: object, categories: list[str], codes: list[int]
) -> None:
    adata = ad.AnnData(counts()[:4], obs=pd.DataFrame({"o": values}, index=list("abcd")))
    with H5adSource(written(adata, tmp_path / "a.h5ad")) as source:
        for column in (AnnDataSource(adata).obs("o"), source.obs("o")):
            assert column is not None
            assert (column.categories, column.codes.tolist()) == (categories, codes)
        assert source.obs("not there") is None


def test_real_numbers_are_no_categories() -> None:
    adata = annotated(counts())
    adata.obs["percent_mito"] = 0.5
    with pytest.raises(ScfmError, match="'percent_mito' holds real numbers"):
        store_from_anndata(adata, VOCABULARY, obs_columns=["percent_mito"])


@pytest.mark.parametrize("values", [[True, False], ["True", "False"], pd.Categorical([True, False])])
def test_secondary_cells_are_told_from_primary_ones_however_they_are_stored(tmp_path: Path, values: object) -> None:
    adata = ad.AnnData(counts()[:2], obs=pd.DataFrame({"is_primary_data": values}, index=["a", "b"]))
    with H5adSource(written(adata, tmp_path / "a.h5ad")) as source:
        assert source.primary().tolist() == [True, False]


# -- genes


def test_gene_names_are_looked_for_in_the_index_and_in_the_columns_that_name_genes() -> None:
    var = pd.DataFrame(
        {
            "gene_ids": ["ENSG00000141510.3", "", "junk", "ENSG00000000003"],
            "feature_name": ["TP53", None, "X1", "ENSG3"],
        },
        index=["TP53-1", "CD3E", "ENSG00000198851.12", "ERCC-00002"],
    )
    ensembl, symbols = genes_of(var)
    assert ensembl == ["ENSG00000141510", None, "ENSG00000198851", None]
    assert symbols == ["TP53", "CD3E", "X1", None]


def test_a_feature_name_that_repeats_the_id_is_no_symbol() -> None:
    var = pd.DataFrame({"feature_name": ["ENSG00000141510"]}, index=["ENSG00000141510"])
    assert genes_of(var) == (["ENSG00000141510"], [None])


def test_raw_var_borrows_the_gene_ids_of_var() -> None:
    raw = pd.DataFrame(index=["A", "B", "C"])
    var = pd.DataFrame({"gene_ids": pd.Categorical(["ENSG00000000002", "ENSG00000000001"])}, index=["B", "A"])
    assert genes_of(with_names_of(raw, var))[0] == ["ENSG00000000001", "ENSG00000000002", None]


# -- real files


@pytest.mark.realdata
def test_the_cellxgene_example_is_read_from_raw_by_ensembl_id(shared: Path) -> None:
    path = shared / "data/formats/cellxgene_schema_example.h5ad"
    expected = ad.read_h5ad(path)
    with H5adSource(path) as source:
        assert source.place == "raw.X"
        np.testing.assert_array_equal(read_all(source), expected.raw.X.toarray())
        ensembl, _ = source.genes
        named = [name for name in expected.raw.var_names if not name.startswith("ERCC-")]
        assert [name for name in ensembl if name] == named
        assert source.primary().sum() == 319
        organisms = ["NCBITaxon:9541", "NCBITaxon:9606", "NCBITaxon:10090"]
        assert source.provenance() == {"title": expected.uns["title"], "organisms": organisms}
        with pytest.raises(
            ScfmError, match=r"several organisms \(.*Homo sapiens \(NCBITaxon:9606\): 318, .*--organism"
        ):
            source.unwanted()
    with H5adSource(path, organism="Homo sapiens") as source:
        assert {reason: cells.sum() for reason, cells in source.unwanted().items()} == {
            "not primary": 1,
            "other organism": 2,
        }


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["annotation/pbmc3k_10x", "pretrain/pollen_brain_lines"])
def test_real_files_equal_what_anndata_reads(shared: Path, name: str) -> None:
    path = shared / f"data/{name}.h5ad"
    adata = ad.read_h5ad(path)
    with H5adSource(path) as source:
        vocabulary = Vocabulary.from_genes(source.gene_list())
        column = source.gene_of_column(vocabulary)
        blocks = [block for _, block in source.cells(column, "counts")]
    spike_ins = adata.var_names.str.startswith("ERCC-")
    np.testing.assert_array_equal(column < 0, spike_ins)
    totals = np.concatenate([np.add.reduceat(b.values.astype(np.int64), b.offsets[:-1]) for b in blocks])
    np.testing.assert_array_equal(totals, np.asarray(adata.X[:, ~spike_ins].sum(1)).ravel())


def test_the_bundled_pbmcs_are_log_normalised_in_raw_and_scaled_in_x() -> None:
    import scanpy

    pbmc = scanpy.datasets.pbmc68k_reduced()
    vocabulary = Vocabulary.from_genes(AnnDataSource(pbmc).gene_list())
    with pytest.raises(ScfmError, match=r"raw\.X holds .* look log-normalised"):
        store_from_anndata(pbmc, vocabulary)
    store = store_from_anndata(pbmc, vocabulary, accept_normalised=True, obs_columns=["bulk_labels"])
    assert (store.n_cells, store.value_kind, len(store.obs["bulk_labels"].categories)) == (700, "normalised", 10)
    scaled = ad.AnnData(pbmc.X, pbmc.obs, pbmc.var)
    with pytest.raises(ScfmError, match=r"X holds -.* scaled"):
        store_from_anndata(scaled, vocabulary, accept_normalised=True)
