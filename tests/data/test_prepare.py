"""`prepare`: h5ad files become a shard directory, or a named error and nothing at all."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from cells import made_up_cells
from scipy.sparse import csr_matrix

from scfm.data import sources as sources_module
from scfm.data.building import plan as plan_module
from scfm.data.building import workers as workers_module
from scfm.data.building.survey import ALL_ZERO
from scfm.data.hashing import load_hashes
from scfm.data.prepare import prepare
from scfm.data.shards import Codec, open_shards, read_manifest, verify_shards
from scfm.data.sources import NOT_PRIMARY
from scfm.data.store import CellStore
from scfm.data.vocabulary import Vocabulary
from scfm.errors import ScfmError

ENSEMBL = {"TP53": "ENSG00000141510", "CD3E": "ENSG00000198851", "MS4A1": "ENSG00000156738"}
SYMBOLS = [*ENSEMBL, "NKG7", "LYZ"]


def counts(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).poisson(1.5, (n, len(SYMBOLS))).astype(np.float32) + np.eye(n, len(SYMBOLS))


def source(path: Path, values: np.ndarray, var: pd.DataFrame | None = None, **obs: object) -> Path:
    index = [f"{path.stem}:{i}" for i in range(len(values))]
    var = pd.DataFrame(index=SYMBOLS) if var is None else var
    ad.AnnData(csr_matrix(values), obs=pd.DataFrame(obs, index=index), var=var).write_h5ad(path)
    return path


def by_symbol(store: CellStore) -> np.ndarray:
    parts = [csr_matrix((b.values, b.genes, b.offsets), (b.n_cells, store.vocabulary.n_genes)) for b in store.in_turn()]
    return np.concatenate([part.toarray() for part in parts])[:, [store.vocabulary.names.index(s) for s in SYMBOLS]]


def rows_of(matrix: np.ndarray) -> list[tuple[float, ...]]:
    return sorted(map(tuple, matrix.tolist()))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two sources of the same genes: one by Ensembl id with a version, one by symbol only."""
    folder = tmp_path / "files"
    (folder / "deeper").mkdir(parents=True)
    var = pd.DataFrame({"feature_name": list(ENSEMBL)}, index=[f"{name}.7" for name in ENSEMBL.values()])
    source(folder / "a.h5ad", counts(30, 0)[:, :3] + 1, var, cell_type=pd.Categorical(["T", "B", "T"] * 10))
    source(folder / "deeper/b.h5ad", counts(20, 1) + 1, donor=["d1", "d2"] * 10, cell_type=["NK", "B"] * 10)
    return folder


def test_sources_become_one_shuffled_store(files: Path, tmp_path: Path) -> None:
    report = prepare([files], tmp_path / "out", obs=["cell_type", "donor"], cells_per_shard=20)
    store = open_shards(tmp_path / "out")
    assert store.vocabulary.n_genes == 5  # the three genes that both know are merged
    assert {gene.ensembl for gene in store.vocabulary.entries if gene.ensembl} == set(ENSEMBL.values())
    assert store.value_kind == report.value_kind == "counts"
    first = np.pad(counts(30, 0)[:, :3] + 1, ((0, 0), (0, 2)))
    assert rows_of(by_symbol(store)) == rows_of(np.concatenate([first, counts(20, 1) + 1]))
    assert [block.n_cells for block in store.blocks] == [17, 17, 16]
    for block in store.in_turn():  # neither source fills a shard alone
        assert 0 < (np.diff(block.offsets) == 5).sum() < block.n_cells
    assert verify_shards(tmp_path / "out") == 3
    assert len(load_hashes(tmp_path / "out/cells.hash")) == 50


def test_the_manifest_names_donors_and_data_sets_of_the_cells_that_are_wanted(tmp_path: Path) -> None:
    cells = made_up_cells(40)
    cells.obs["donor_id"] = pd.Categorical([f"d{k % 4}" for k in range(40)])
    cells.obs["dataset_id"] = "set1"
    cells.write_h5ad(tmp_path / "named.h5ad")
    made_up_cells(20, seed=1).write_h5ad(tmp_path / "nameless.h5ad")
    prepare([tmp_path / "named.h5ad"], tmp_path / "out", where=["donor_id!=d3"])
    (source,) = read_manifest(tmp_path / "out")["sources"]
    assert source["origins"] == {"donor_id": ["d0", "d1", "d2"], "dataset_id": ["set1"]}
    prepare([tmp_path / "nameless.h5ad"], tmp_path / "other")
    assert read_manifest(tmp_path / "other")["sources"][0]["origins"] == {}


def test_obs_columns_are_the_union_over_sources_and_stay_with_their_cells(files: Path, tmp_path: Path) -> None:
    prepare([files], tmp_path / "out", obs=["cell_type", "donor"], cells_per_shard=20)
    obs = open_shards(tmp_path / "out").obs
    assert {name: column.categories for name, column in obs.items()} == {
        "source": ["a.h5ad", "b.h5ad"],
        "cell_type": ["B", "NK", "T"],
        "donor": ["d1", "d2"],
    }
    from_a = obs["source"].codes == 0
    assert from_a.sum() == 30
    assert (obs["donor"].codes[from_a] == -1).all()
    assert (obs["donor"].codes[~from_a] == (obs["cell_type"].codes[~from_a] == 0)).all()
    assert np.bincount(obs["cell_type"].codes[from_a]).tolist() == [10, 0, 20]


def test_the_order_is_kept_on_demand(files: Path, tmp_path: Path) -> None:
    prepare([files / "deeper/b.h5ad"], tmp_path / "out", keep_order=True, cells_per_shard=8)
    store = open_shards(tmp_path / "out")
    assert [block.n_cells for block in store.blocks] == [8, 8, 4]
    np.testing.assert_array_equal(by_symbol(store), counts(20, 1) + 1)


@pytest.mark.parametrize("codec", ["list", "packed"])
def test_the_codec_changes_how_cells_are_stored_and_nothing_else(files: Path, tmp_path: Path, codec: Codec) -> None:
    prepare([files], tmp_path / "default")
    prepare([files], tmp_path / "out", codec=codec)
    manifests = [read_manifest(tmp_path / out) for out in ("default", "out")]
    assert [manifest["codec"] for manifest in manifests] == ["packed", codec]
    assert (manifests[0]["hash"] == manifests[1]["hash"]) == (codec == "packed")
    stores = [open_shards(tmp_path / out) for out in ("default", "out")]
    np.testing.assert_array_equal(*(by_symbol(store) for store in stores))
    hashes = [(tmp_path / out / "cells.hash").read_bytes() for out in ("default", "out")]
    assert hashes[0] == hashes[1]


def test_the_same_seed_gives_the_same_files(files: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        prepare([files], tmp_path / name, seed=seed)
    one, two, other = ((tmp_path / name / "shards/00000.arrow").read_bytes() for name in ("one", "two", "other"))
    assert one == two != other
    assert (tmp_path / "one/manifest.json").read_bytes() == (tmp_path / "two/manifest.json").read_bytes()


def test_secondary_and_all_zero_cells_are_dropped_and_counted(tmp_path: Path) -> None:
    values = counts(10, 0) + 1
    values[[2, 3]] = 0
    primary = [True] * 10
    primary[3] = primary[4] = False
    report = prepare([source(tmp_path / "a.h5ad", values, is_primary_data=primary)], tmp_path / "out")
    assert report.sources[0].dropped == {NOT_PRIMARY: 2, ALL_ZERO: 1}
    assert (report.sources[0].cells, report.sources[0].kept) == (10, 7)
    assert rows_of(by_symbol(open_shards(tmp_path / "out"))) == rows_of(np.delete(values, [2, 3, 4], 0))
    assert read_manifest(tmp_path / "out")["sources"][0]["dropped"] == {NOT_PRIMARY: 2, ALL_ZERO: 1}


def test_a_given_vocabulary_decides_genes_and_their_order(files: Path, tmp_path: Path) -> None:
    (tmp_path / "genes.txt").write_text("LYZ\nENSG00000141510\nUNHEARD\n")
    (tmp_path / "symbols.txt").write_text("TP53\n")
    report = prepare([files / "a.h5ad"], tmp_path / "out", vocabulary=tmp_path / "genes.txt")
    store = open_shards(tmp_path / "out")
    assert store.vocabulary.names[:3] == ["LYZ", "ENSG00000141510", "UNHEARD"]
    assert {int(gene) for block in store.in_turn() for gene in block.genes} == {1}
    assert (report.sources[0].genes, report.sources[0].genes_matched) == (3, 1)
    assert prepare([files], tmp_path / "both", vocabulary=tmp_path / "symbols.txt").cells == 50


def test_the_table_shows_every_source_with_its_losses(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare([files], tmp_path / "out")
    printed = capsys.readouterr().out
    assert "50 cells" in printed
    assert "a.h5ad" in printed
    assert "b.h5ad" in printed
    assert "dropped" not in printed  # nothing was, so no column for it


def test_normalised_sources_are_float32_and_make_the_whole_store_normalised(tmp_path: Path) -> None:
    first = source(tmp_path / "counts.h5ad", counts(10, 0) + 1)
    second = source(tmp_path / "logs.h5ad", np.log1p(counts(10, 1) + 1))
    report = prepare([first, second], tmp_path / "out", accept_normalised=True)
    store = open_shards(tmp_path / "out")
    assert store.value_kind == report.value_kind == "normalised"
    assert {block.values.dtype for block in store.in_turn()} == {np.dtype(np.float32)}
    expected = np.concatenate([counts(10, 0) + 1, np.log1p(counts(10, 1) + 1)]).astype(np.float32)
    assert rows_of(by_symbol(store)) == rows_of(expected)


def test_very_wide_cells_make_smaller_shards(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "VALUES_PER_SHARD", 50)
    prepare([files / "deeper/b.h5ad"], tmp_path / "out")
    assert [block.n_cells for block in open_shards(tmp_path / "out").blocks] == [10, 10]


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module.Source, "values_per_block", 20_000)
    monkeypatch.setattr(workers_module, "VALUES_PER_UNIT", 40_000)
    rng = np.random.default_rng(0)
    var = pd.DataFrame(index=[f"G{i}" for i in range(200)])
    prepare([source(tmp_path / "first.h5ad", np.ones((50, 200)), var)], tmp_path / "first")  # loads what others share
    peaks = []
    for n in (2_000, 8_000):
        path = source(tmp_path / f"{n}.h5ad", rng.poisson(1.0, (n, 200)).astype(np.float32), var)
        tracemalloc.start()
        prepare([path], tmp_path / f"out{n}", cells_per_shard=400)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # obs codes and hashes: about 25 bytes per further cell, whose values are 800; a ratio of the peaks wavers by 5 %
    assert peaks[1] - peaks[0] < 6_000 * 60
    assert peaks[1] < path.stat().st_size / 5


# -- bad input: a named error, and nothing is left behind


def refused(tmp_path: Path, sources: list[Path], complaint: str, **options: Any) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ScfmError, match=complaint):
        prepare(sources, tmp_path / "out", **options)
    assert sorted(tmp_path.rglob("*")) == before


def spoiled(value: float) -> np.ndarray:
    values = counts(10, 0)
    values[-1, -1] = value
    return values


@pytest.mark.parametrize("accept_normalised", [False, True])
@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (counts(10, 0) - 1.5, r"bad\.h5ad: X holds -.* scaled \(z-scores\)"),
        (spoiled(-2), r"bad\.h5ad: X holds -2 for gene LYZ in cell bad:9; negative"),
        (spoiled(np.nan), r"bad\.h5ad: X holds nan for gene LYZ in cell bad:9; values must be finite"),
    ],
)
def test_scaled_negative_and_nan_values_are_always_refused(
    tmp_path: Path, values: np.ndarray, complaint: str, accept_normalised: bool
) -> None:
    good = source(tmp_path / "good.h5ad", counts(10, 1))
    bad = source(tmp_path / "bad.h5ad", values)
    refused(tmp_path, [good, bad], complaint, accept_normalised=accept_normalised)


@pytest.mark.parametrize("values", [np.log1p(counts(10, 0)), spoiled(0.5)])
def test_log_normalised_values_are_refused_unless_accepted(tmp_path: Path, values: np.ndarray) -> None:
    path = source(tmp_path / "bad.h5ad", values)
    refused(tmp_path, [path], r"bad\.h5ad: X holds .*log-normalised.*pass --accept-normalised")
    assert prepare([path], tmp_path / "out", accept_normalised=True).value_kind == "normalised"


def test_no_gene_in_the_vocabulary_is_refused(tmp_path: Path) -> None:
    path = source(tmp_path / "a.h5ad", counts(10, 0))
    (tmp_path / "genes.txt").write_text("Trp53\n")
    refused(tmp_path, [path], "Seen: TP53, .* Expected: Trp53", vocabulary=tmp_path / "genes.txt")


def test_a_source_that_names_no_gene_is_refused(tmp_path: Path) -> None:
    path = source(tmp_path / "a.h5ad", counts(10, 0), pd.DataFrame(index=[f"ERCC-0000{i}" for i in range(5)]))
    refused(tmp_path, [path], r"a\.h5ad: neither var nor its index names a gene")


def test_a_file_that_is_no_h5ad_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.h5ad").write_text("cells")
    refused(tmp_path, [source(tmp_path / "good.h5ad", counts(10, 0)), tmp_path / "bad.h5ad"], "bad.h5ad: not an h5ad")


def test_a_truncated_h5ad_is_refused(tmp_path: Path) -> None:
    path = source(tmp_path / "bad.h5ad", counts(10, 0))
    path.write_bytes(path.read_bytes()[:-2000])
    refused(tmp_path, [path], "truncated")


def test_a_destination_that_holds_something_is_refused(tmp_path: Path) -> None:
    path = source(tmp_path / "a.h5ad", counts(10, 0))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("years of work")
    refused(tmp_path, [path], "out: holds something already")
    (tmp_path / "out/thesis.tex").unlink()
    prepare([path], tmp_path / "out")
    refused(tmp_path, [path], "out: holds something already")


def test_a_destination_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    path = source(tmp_path / "a.h5ad", counts(10, 0))
    with pytest.raises(ScfmError, match="cannot be written"):
        prepare([path], path / "out")


def test_an_empty_selection_is_refused(tmp_path: Path) -> None:
    zero = source(tmp_path / "zero.h5ad", np.zeros((10, 5)))
    copies = source(tmp_path / "copies.h5ad", counts(10, 0), is_primary_data=[False] * 10)
    refused(
        tmp_path,
        [zero, copies],
        "no cell is left to write: of 20 cells in the sources: 10 not primary, 10 no expressed gene",
    )
    (tmp_path / "folder").mkdir()
    refused(tmp_path, [tmp_path / "folder"], "folder: the folder holds no .h5ad, no .loom")
    refused(tmp_path, [], "no source is named")


def test_a_source_named_twice_is_refused(tmp_path: Path) -> None:
    path = source(tmp_path / "a.h5ad", counts(10, 0))
    refused(tmp_path, [path, tmp_path / "x/../a.h5ad"], r"named more than once among the sources: .*a\.h5ad")


def test_an_obs_column_that_no_source_has_is_refused(files: Path, tmp_path: Path) -> None:
    refused(tmp_path, [files], "no source has an obs column tissue; there are cell_type, donor", obs=["tissue"])
    refused(tmp_path, [files], "obs column source: the name is taken", obs=["source"])


# -- real files


@pytest.mark.realdata
def test_real_sources_keep_every_count(shared: Path, tmp_path: Path) -> None:
    names = ["pretrain/pbmc1k_v2_10x", "annotation/pbmc68k_reduced", "formats/cellxgene_schema_example"]
    paths = [shared / f"data/{name}.h5ad" for name in names]
    report = prepare(paths, tmp_path / "out", cells_per_shard=500, organism="Homo sapiens")
    store = open_shards(tmp_path / "out")
    assert [(source.cells, source.kept) for source in report.sources] == [(996, 996), (700, 700), (320, 317)]
    example = ad.read_h5ad(paths[2])
    is_human = (example.obs["organism_ontology_term_id"] == "NCBITaxon:9606").to_numpy()
    kept = example.raw.X[is_human & example.obs["is_primary_data"].to_numpy().astype(bool)]
    spike_ins = example.raw.var_names.str.startswith("ERCC-")
    expected = [ad.read_h5ad(path).X.sum() for path in paths[:2]] + [kept[:, ~spike_ins].sum()]
    totals = np.concatenate([np.add.reduceat(b.values.astype(np.int64), b.offsets[:-1]) for b in store.in_turn()])
    for code, total in enumerate(expected):
        assert totals[store.obs["source"].codes == code].sum() == total


@pytest.mark.realdata
def test_the_same_cells_by_symbol_and_by_ensembl_id_have_the_same_hashes(shared: Path, tmp_path: Path) -> None:
    adata = ad.read_h5ad(shared / "data/annotation/baron_human_d12.h5ad")
    known = adata[:, adata.var["ensembl_id"].astype(str) != ""].copy()
    known.write_h5ad(tmp_path / "by_symbol.h5ad")
    known.var = pd.DataFrame(index=known.var["ensembl_id"].astype(str))
    known.write_h5ad(tmp_path / "by_id.h5ad")
    for seed, name in enumerate(("by_symbol", "by_id")):
        prepare([tmp_path / f"{name}.h5ad"], tmp_path / name, seed=seed)
    np.testing.assert_array_equal(*(load_hashes(tmp_path / name / "cells.hash") for name in ("by_symbol", "by_id")))


def test_the_bundled_pbmcs_need_the_option(tmp_path: Path) -> None:
    import scanpy

    scanpy.datasets.pbmc68k_reduced().write_h5ad(tmp_path / "pbmc.h5ad")
    refused(tmp_path, [tmp_path / "pbmc.h5ad"], r"pbmc\.h5ad: raw\.X holds .* log-normalised .*--accept-normalised")
    prepare([tmp_path / "pbmc.h5ad"], tmp_path / "out", obs=["bulk_labels"], accept_normalised=True)
    store = open_shards(tmp_path / "out")
    assert (store.n_cells, store.value_kind, store.vocabulary.n_genes) == (700, "normalised", 765)
    assert Vocabulary.load(tmp_path / "out/vocab.json") == store.vocabulary
