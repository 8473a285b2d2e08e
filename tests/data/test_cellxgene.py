"""h5ad files as CELLxGENE's schema 5, 6 and 7 have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from scfm.data.opening import open_source
from scfm.data.organisms import canonical_organism
from scfm.data.prepare import prepare
from scfm.data.shards import open_shards, read_manifest
from scfm.errors import ScfmError

HUMAN, MOUSE = "NCBITaxon:9606", "NCBITaxon:10090"
N_CELLS = 30
# index, name, biotype, reference; the last gene is filtered from X, and present in raw
FEATURES = [
    ("ENSG00000141510", "TP53", "gene", HUMAN),
    ("ENSG00000198851", "CD3E", "gene", HUMAN),
    ("ERCC-00002", "ERCC-00002 (spike-in control)", "spike-in", "NCBITaxon:32630"),
    ("ENSSASG00005000002", "ORF1ab_ENSSASG00005000002", "gene", "NCBITaxon:2697049"),
    ("ENSG00000188290", "HES4", "gene", HUMAN),
]
COUNTS = np.random.default_rng(0).poisson(2.0, (N_CELLS, len(FEATURES))).astype(np.float32)
COUNTS[:, [0, 4]] += 1
VERSIONS = ["5.2.0", "6.0.0", "7.1.0"]


def write(
    path: Path,
    version: str,
    organism: str | list[str] = HUMAN,
    in_raw: bool = True,
    features: list[tuple[str, str, str, str]] = FEATURES,
    **obs: Any,
) -> Path:
    """Write a small file of a version of the schema; `organism` is one name, or one for each cell (schema 5)."""
    schema = int(version[0])
    # schema 5 kept the versions of Ensembl ids
    ids = [f"{name}.7" if schema == 5 and name.startswith("ENSG") else name for name, *_ in features]
    var = pd.DataFrame(
        {
            "feature_is_filtered": [False] * (len(features) - 1) + [in_raw],
            "feature_name": pd.Categorical([name for _, name, _, _ in features]),
            "feature_biotype": pd.Categorical([biotype for _, _, biotype, _ in features]),
            "feature_reference": pd.Categorical([reference for _, _, _, reference in features]),
        },
        index=ids,
    )
    frame = pd.DataFrame(
        {
            "tissue_ontology_term_id": pd.Categorical(["UBERON:0002048"] * N_CELLS),
            "tissue_type": pd.Categorical(["primary cell culture" if schema == 7 else "tissue"] * N_CELLS),
            "disease_ontology_term_id": pd.Categorical(["MONDO:1 || MONDO:2" if schema > 5 else "MONDO:1"] * N_CELLS),
            "assay_ontology_term_id": pd.Categorical(["EFO:0008931" if i < 4 else "EFO:0009922" for i in range(30)]),
            "is_primary_data": [i >= 3 for i in range(N_CELLS)],
            **obs,
        },
        index=[f"c{i}" for i in range(N_CELLS)],
    )
    adata = ad.AnnData(csr_matrix(COUNTS), obs=frame, var=var)
    if in_raw:
        adata.raw = ad.AnnData(csr_matrix(COUNTS), obs=frame, var=var.drop(columns="feature_is_filtered"))
        shown = np.log1p(COUNTS)
        shown[:, -1] = 0
        adata.X = csr_matrix(shown)
    adata.uns |= {"schema_version": version, "title": "made up", "citation": "Publication: none"}
    if schema == 5:
        adata.obs["organism_ontology_term_id"] = pd.Categorical(
            [organism] * N_CELLS if isinstance(organism, str) else organism
        )
    else:
        assert isinstance(organism, str)
        adata.uns |= {"organism_ontology_term_id": organism}
    if version == "7.1.0":
        adata.uns["is_pre_analysis"] = True
    else:
        adata.obs["cell_type_ontology_term_id"] = pd.Categorical(["CL:0000084"] * N_CELLS)
    adata.write_h5ad(path)
    return path


@pytest.mark.parametrize("in_raw", [True, False])
@pytest.mark.parametrize("version", VERSIONS)
def test_raw_counts_genes_and_origin_are_found_in_every_version(tmp_path: Path, version: str, in_raw: bool) -> None:
    with open_source(write(tmp_path / "a.h5ad", version, in_raw=in_raw)) as source:
        assert source.place == ("raw.X" if in_raw else "X")
        np.testing.assert_array_equal(source.read(0, N_CELLS).toarray(), COUNTS)
        # no spike-in and no virus; the gene that is filtered from X counts
        assert source.genes == (
            ["ENSG00000141510", "ENSG00000198851", None, None, "ENSG00000188290"],
            ["TP53", "CD3E", None, None, "HES4"],
        )
        assert source.provenance() == {
            "schema_version": version,
            "title": "made up",
            "citation": "Publication: none",
            "organisms": [HUMAN],
            "full_length_assays": {"EFO:0008931 (Smart-seq2)": 4},
        }
        assert {reason: int(cells.sum()) for reason, cells in source.unwanted().items()} == {"not primary": 3}


def test_files_of_all_versions_become_one_corpus_with_their_ontology_ids(tmp_path: Path) -> None:
    for version in VERSIONS:
        write(tmp_path / f"{version}.h5ad", version)
    columns = ["cell_type_ontology_term_id", "disease_ontology_term_id", "tissue_type"]
    prepare([tmp_path], tmp_path / "out", obs=columns, duplicates="keep", workers=1)
    store = open_shards(tmp_path / "out")
    genes = store.vocabulary.entries[: store.vocabulary.n_genes]
    assert sorted(gene.ensembl for gene in genes) == ["ENSG00000141510", "ENSG00000188290", "ENSG00000198851"]
    assert store.n_cells == 3 * (N_CELLS - 3)
    assert store.obs["disease_ontology_term_id"].categories == ["MONDO:1", "MONDO:1 || MONDO:2"]
    assert (store.obs["cell_type_ontology_term_id"].codes == -1).sum() == N_CELLS - 3  # not analysed yet
    sources = read_manifest(tmp_path / "out")["sources"]
    assert [source["provenance"]["schema_version"] for source in sources] == VERSIONS


def write_mixed(path: Path) -> Path:
    features = [*FEATURES[:4], ("ENSMUSG00000059552", "Trp53", "gene", MOUSE)]
    return write(path, "5.2.0", organism=[MOUSE if i % 3 == 0 else HUMAN for i in range(N_CELLS)], features=features)


def test_of_several_organisms_one_must_be_chosen_and_the_others_are_counted(tmp_path: Path) -> None:
    path = write_mixed(tmp_path / "mixed.h5ad")
    with pytest.raises(ScfmError, match=r"Mus .*: 10, Homo sapiens \(NCBITaxon:9606\): 20\).*--organism"):
        prepare([path], tmp_path / "out", workers=1)
    report = prepare([path], tmp_path / "out", organism="mus_musculus", workers=1)
    assert report is not None
    assert report.sources[0].dropped["other organism"] == 18  # of 20, two are secondary
    assert report.sources[0].kept == 9
    vocabulary = open_shards(tmp_path / "out").vocabulary
    assert vocabulary.n_genes == 1
    assert vocabulary.entries[0].ensembl == "ENSMUSG00000059552"


def test_a_corpus_is_of_one_organism(tmp_path: Path) -> None:
    mouse = [(f"ENSMUSG{i:011d}", f"M{i}", "gene", MOUSE) for i in range(len(FEATURES))]
    write(tmp_path / "human.h5ad", "6.0.0")
    write(tmp_path / "mouse.h5ad", "7.0.0", organism=MOUSE, features=mouse)
    with pytest.raises(ScfmError, match=r"several organisms \(Homo sapiens .* in .*human\.h5ad; Mus .*--organism"):
        prepare([tmp_path], tmp_path / "out", workers=1)
    report = prepare([tmp_path], tmp_path / "out", organism="Homo sapiens", workers=1)
    assert report is not None
    assert [(source.file, source.kept) for source in report.sources] == [("human.h5ad", 27), ("mouse.h5ad", 0)]
    assert report.sources[1].dropped == {"not primary": 3, "no expressed gene": 0, "other organism": 27}
    assert report.genes == 3


def test_genes_that_stand_for_orthologues_are_kept(tmp_path: Path) -> None:
    """Until schema 5.2 other organisms than human and mouse were described by human genes."""
    with open_source(write(tmp_path / "marmoset.h5ad", "5.2.0", organism="NCBITaxon:9483")) as source:
        assert [name for name in source.genes[0] if name] == ["ENSG00000141510", "ENSG00000198851", "ENSG00000188290"]


def test_spots_outside_the_tissue_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "visium.h5ad", "6.0.0", in_tissue=[0 if i % 10 == 9 else 1 for i in range(N_CELLS)])
    report = prepare([path], tmp_path / "out", workers=1)
    assert report is not None
    assert report.sources[0].dropped["not in tissue"] == 3


def test_names_of_organisms() -> None:
    assert {canonical_organism(name) for name in ("Homo sapiens", "homo_sapiens", " ncbitaxon:9606")} == {HUMAN}
    assert canonical_organism("Felis_catus") == "felis catus"
