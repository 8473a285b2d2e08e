"""Gene tables: which files are read, which names mean the same gene, and that no two genes of a source become one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from scfm.data.gene_table import GeneTable, Kinship, Row, read_rows
from scfm.data.genes import genes_of
from scfm.data.prepare import prepare
from scfm.data.shards import read_manifest
from scfm.data.sources import store_from_anndata
from scfm.data.vocabulary import SPECIALS, Gene, MatchedBy, Vocabulary
from scfm.data.vocabulary_files import read_vocabulary
from scfm.errors import ScfmError

BY = MatchedBy
E = [f"ENSG{i:011d}" for i in range(20)]
HGNC = [
    Row(E[1], "H3-3B", ("H3F3B",)),
    Row(E[2], "RACK1", ("GNB2L1", "SHARED")),
    Row(E[3], "TBCE", ("SHARED",)),
    Row(None, "NOID", ("OLDNOID",)),
]
GENCODE = [
    Row(E[1], "H3-3B"),
    Row(E[3], "TBCE"),
    Row(E[4], "TBCE"),
    Row(E[5], "TWIN"),
    Row(E[6], "TWIN"),
    Row(E[7], None),
]
HGNC_TEXT = f"""hgnc_id\tsymbol\tname\tstatus\talias_symbol\tprev_symbol\tensembl_gene_id
HGNC:1\tH3-3B\thistone, 3B\tApproved\t\tH3F3B\t{E[1]}
HGNC:2\tRACK1\treceptor\tApproved\tSHARED\t"GNB2L1|OLDER"\t{E[2]}
HGNC:3\tGONE\t\tEntry Withdrawn\t\tH3F3B\t
HGNC:4\tNA\t\tApproved\t\t\t
"""


def vocabulary_of(*names: str) -> Vocabulary:
    genes = [Gene.of(name, None) if name.startswith("ENSG") else Gene.of(None, name) for name in names]
    return Vocabulary([*genes, *(Gene(special) for special in SPECIALS)])


def matched(
    vocabulary: Vocabulary, table: GeneTable, genes: list[tuple[str | None, str | None]]
) -> list[tuple[str | None, MatchedBy]]:
    """Return the id of the entry of each gene, None where dropped, and how it was found."""
    match = vocabulary.matching([e for e, _ in genes], [s for _, s in genes], table)
    ids = [vocabulary.entries[entry].id if entry >= 0 else None for entry in match.entries]
    return list(zip(ids, map(MatchedBy, match.by), strict=True))


@pytest.mark.parametrize("kind", ["tsv", "txt", "txt.gz", "csv", "parquet"])
def test_the_complete_set_of_hgnc_is_read_in_any_form(tmp_path: Path, kind: str) -> None:
    plain = tmp_path / "plain.tsv"
    plain.write_text(HGNC_TEXT)
    path = tmp_path / f"hgnc.{kind}"
    table = pd.read_csv(plain, sep="\t", dtype=str, keep_default_na=False)
    if kind == "parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, sep="," if kind == "csv" else "\t", index=False)
    assert read_rows(path) == [
        Row(E[1], "H3-3B", ("H3F3B",)),
        Row(E[2], "RACK1", ("GNB2L1", "OLDER", "SHARED")),
        Row(None, "NA", ()),
    ]


def test_genes_of_gencode_are_read(tmp_path: Path) -> None:
    lines = [
        "gene_id\tgene_name\tgene_type",
        f"{E[1]}.7\tH3-3B\tprotein_coding",
        f"{E[2]}.1_PAR_Y\t{E[2]}\tlncRNA",
        "\t\t",
    ]
    (tmp_path / "genes.tsv").write_text("\n".join(lines))
    assert read_rows(tmp_path / "genes.tsv") == [Row(E[1], "H3-3B"), Row(E[2], None)]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("genes.tsv", b"ensembl,symbol\n", "needs a column of Ensembl ids .* this one has ensembl,symbol"),
        ("genes.csv", b"ensembl_id,name\nENSG00000000001,A\n", "one of symbols .* this one has ensembl_id, name"),
        ("genes.csv", b"ensembl_id,symbol\nA,B\n", "column ensembl_id holds no Ensembl id"),
        ("genes.csv", b"ensembl_id,symbol\nENSG00000000001,\n", "column symbol holds no symbol"),
        ("genes.csv", b"", "cannot be read as a gene table"),
        ("genes.csv", b"\xff\xfe\x00", "cannot be read as a gene table"),
        ("genes.tsv.gz", b"no gzip", "cannot be read as a gene table"),
        ("genes.parquet", b"no parquet", "cannot be read as a gene table"),
    ],
)
def test_a_useless_table_is_named(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ScfmError, match=f"{name}: .*{complaint}"):
        GeneTable.read([tmp_path / name])


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScfmError, match=r"hgnc\.tsv: there is no such gene table"):
        GeneTable.read([tmp_path / "hgnc.tsv"])


def test_a_gene_is_meant_by_its_id_then_by_its_symbol_then_by_another_name() -> None:
    table = GeneTable([HGNC])
    assert table.resolve(f"{E[1]}.12", "RACK1") == (0, Kinship.ID)
    assert table.resolve("ENSG99999999999", "RACK1") == (1, Kinship.SYMBOL)
    assert table.resolve(None, "H3F3B") == (0, Kinship.OTHER)
    assert table.resolve(f"{E[1]}_PAR_Y", None) == (0, Kinship.OTHER)
    assert table.resolve(None, "unheard-of") is None
    assert table.resolve(None, "SHARED") is None
    assert table.is_ambiguous("SHARED")
    assert not table.is_ambiguous("H3F3B")
    assert not table.is_ambiguous(None)


def test_the_symbol_of_one_gene_is_no_alias_of_another() -> None:
    table = GeneTable([[Row(E[1], "A"), Row(E[2], "B", ("A",))]])
    assert table.resolve(None, "A") == (0, Kinship.SYMBOL)


def test_the_first_table_gives_the_symbol_and_owns_it() -> None:
    table = GeneTable([HGNC, GENCODE])
    assert table.resolve(None, "TBCE") == (2, Kinship.SYMBOL)
    assert table.resolve(E[4], None) == (2, Kinship.OTHER)  # a second id of TBCE
    assert table.resolve(None, "TWIN") is None  # two ids of one table with equal right
    renamed = GeneTable([HGNC, [Row(E[1], "H3C99")]])
    assert renamed.genes[0].symbol == "H3-3B"
    assert renamed.resolve(None, "H3C99") == (0, Kinship.OTHER)
    reverse = GeneTable([GENCODE, HGNC])
    assert reverse.resolve(None, "TBCE") is None


def test_a_gene_without_id_is_given_the_only_one_that_a_later_table_has_for_its_symbol() -> None:
    assert GeneTable([HGNC, [Row(E[9], "NOID")]]).resolve(E[9], None) == (3, Kinship.ID)
    several = GeneTable([HGNC, [Row(E[9], "NOID"), Row(E[10], "NOID")]])
    assert several.genes[3].ensembl is None
    assert several.resolve(E[9], None) == several.resolve(E[10], None) == (3, Kinship.OTHER)


def test_a_nameless_id_does_not_take_the_symbol_of_another_gene() -> None:
    table = GeneTable([HGNC, GENCODE, [Row(E[7], "RACK1"), Row(E[7], "CLONE.1")]])
    assert table.resolve(None, "RACK1") == (1, Kinship.SYMBOL)
    assert table.resolve(None, "CLONE.1").gene == table.resolve(E[7], None).gene


def test_the_order_of_lines_does_not_matter_where_ids_are_not_repeated() -> None:
    def names(table: GeneTable) -> set[tuple[object, ...]]:
        return {(g.ensembl, g.symbol, frozenset(g.other_ids), frozenset(g.other_names)) for g in table.genes}

    expected = names(GeneTable([HGNC, GENCODE]))
    rng = np.random.default_rng(0)
    for _ in range(20):
        shuffled = [[rows[i] for i in rng.permutation(len(rows))] for rows in (HGNC, GENCODE)]
        assert names(GeneTable(shuffled)) == expected


def test_a_table_joins_id_and_symbol_in_both_directions() -> None:
    table = GeneTable([HGNC])
    assert matched(vocabulary_of("RACK1", "H3-3B"), table, [(E[1], None), (E[2], None)]) == [
        ("H3-3B", BY.TABLE),
        ("RACK1", BY.TABLE),
    ]
    by_id = vocabulary_of(E[1], E[2])
    assert matched(by_id, table, [(None, "RACK1"), (None, "H3-3B")]) == [(E[2], BY.TABLE), (E[1], BY.TABLE)]


def test_old_names_are_found_on_either_side() -> None:
    table = GeneTable([HGNC])
    assert matched(vocabulary_of("GNB2L1"), table, [(None, "RACK1")]) == [("GNB2L1", BY.ALIAS)]
    assert matched(vocabulary_of("RACK1"), table, [(None, "GNB2L1")]) == [("RACK1", BY.ALIAS)]
    assert matched(vocabulary_of("GNB2L1"), table, [(E[2], None)]) == [("GNB2L1", BY.ALIAS)]
    assert matched(vocabulary_of(E[2]), table, [(None, "GNB2L1")]) == [(E[2], BY.ALIAS)]


def test_id_and_symbol_come_before_the_table() -> None:
    """A name that the vocabulary has itself is never led elsewhere."""
    table = GeneTable([HGNC])
    assert matched(vocabulary_of("H3F3B", "H3-3B", E[2]), table, [(E[2], "H3F3B"), (None, "H3F3B")]) == [
        (E[2], BY.ID),
        ("H3F3B", BY.SYMBOL),
    ]


def test_an_ambiguous_alias_is_never_used() -> None:
    table = GeneTable([HGNC])
    assert matched(vocabulary_of("RACK1"), table, [(None, "SHARED")]) == [(None, BY.AMBIGUOUS)]
    assert matched(vocabulary_of("SHARED"), table, [(E[2], "RACK1")]) == [(None, BY.UNKNOWN)]


def test_a_gene_with_several_entries_of_equal_right_is_dropped() -> None:
    table = GeneTable([[Row(E[1], "A", ("OLD", "OLDER", "NEWER"))]])
    assert matched(vocabulary_of("OLD", "OLDER"), table, [(E[1], None)]) == [(None, BY.AMBIGUOUS)]
    assert matched(vocabulary_of("OLD", "A"), table, [(None, "NEWER")]) == [("A", BY.ALIAS)]


@pytest.mark.parametrize("rival", [(E[1], None), (None, "H3-3B"), (E[1], "H3-3B")])
def test_an_alias_never_joins_another_gene_of_the_data(rival: tuple[str | None, str | None]) -> None:
    table = GeneTable([HGNC])
    for vocabulary in (vocabulary_of("H3-3B"), vocabulary_of(E[1])):
        for genes in ([rival, (None, "H3F3B")], [(None, "H3F3B"), rival]):
            found = dict(zip(genes, matched(vocabulary, table, genes), strict=True))
            assert found[None, "H3F3B"] == (None, BY.TAKEN)
            assert found[rival][0] is not None


def test_two_names_with_equal_right_to_an_entry_are_both_dropped() -> None:
    table = GeneTable([[Row(E[1], "A", ("OLD", "OLDER"))]])
    genes = [(None, "OLD"), (None, "OLDER")]
    assert matched(vocabulary_of("A"), table, genes) == [(None, BY.AMBIGUOUS)] * 2
    surer = matched(vocabulary_of("A"), table, [*genes, (E[1], None)])
    assert surer == [(None, BY.TAKEN), (None, BY.TAKEN), ("A", BY.TABLE)]


def test_the_second_copy_on_chromosome_y_is_not_added_to_the_first() -> None:
    table = GeneTable([HGNC])
    copy = f"{E[2]}.4_PAR_Y"
    assert matched(vocabulary_of("RACK1"), table, [(copy, None), (E[2], None)]) == [
        (None, BY.TAKEN),
        ("RACK1", BY.TABLE),
    ]


def test_matches_through_a_table_are_exclusive_and_know_no_order() -> None:
    """Made-up genes, names and vocabularies, with every kind of collision."""
    rng = np.random.default_rng(1)
    symbols = [f"S{i}" for i in range(30)]
    used: Counter[MatchedBy] = Counter()
    for _ in range(300):
        rows = [
            Row(
                str(rng.choice(E[:12])) if rng.random() < 0.8 else None,
                str(rng.choice(symbols)),
                tuple(rng.choice(symbols, rng.integers(0, 4)).tolist()),
            )
            for _ in range(12)
        ]
        table = GeneTable([rows[:6], rows[6:]])
        names = rng.choice([*symbols, *E], 8, replace=False).tolist()
        vocabulary = vocabulary_of(*names)
        ensembl = [str(rng.choice(E)) if rng.random() < 0.5 else None for _ in range(10)]
        given = [str(rng.choice(symbols)) if rng.random() < 0.7 else None for _ in range(10)]
        plain, match = vocabulary.matching(ensembl, given), vocabulary.matching(ensembl, given, table)
        found = plain.entries >= 0
        np.testing.assert_array_equal(match.entries[found], plain.entries[found])
        np.testing.assert_array_equal(match.by[found], plain.by[found])
        through = np.flatnonzero((match.entries >= 0) & ~found)
        for column in through.tolist():
            sharing = np.flatnonzero(match.entries == match.entries[column])
            assert len({ensembl[i] or given[i] for i in sharing}) == 1
            assert not found[sharing].any()
        order = rng.permutation(10)
        again = vocabulary.matching([ensembl[i] for i in order], [given[i] for i in order], table)
        np.testing.assert_array_equal(again.entries, match.entries[order])
        np.testing.assert_array_equal(again.by, match.by[order])
        used.update(map(MatchedBy, match.by))
    assert min(used[by] for by in MatchedBy) > 20


def annotated(names: list[str], counts: list[list[int]]) -> anndata.AnnData:
    return anndata.AnnData(csr_matrix(np.array(counts, np.float32)), var=pd.DataFrame(index=names))


def test_cells_are_read_through_a_table() -> None:
    adata = annotated(["GNB2L1", E[1], "unheard-of"], [[1, 2, 4], [0, 3, 5]])
    vocabulary = vocabulary_of("H3-3B", "RACK1")
    (block,) = store_from_anndata(adata, vocabulary, genes=GeneTable([HGNC])).blocks
    assert (block.offsets.tolist(), block.genes.tolist(), block.values.tolist()) == ([0, 2, 3], [0, 1, 0], [2, 1, 3])


def test_sources_that_name_genes_by_id_by_symbol_and_by_old_name_share_entries(tmp_path: Path) -> None:
    annotated([E[1], E[2]], [[1, 2]]).write_h5ad(tmp_path / "by_id.h5ad")
    annotated(["RACK1", "H3F3B"], [[2, 1]]).write_h5ad(tmp_path / "by_symbol.h5ad")
    annotated(["RACK1", "GNB2L1"], [[3, 4]]).write_h5ad(tmp_path / "both_names.h5ad")
    (tmp_path / "hgnc.tsv").write_text(HGNC_TEXT)
    sources = [tmp_path / f"{name}.h5ad" for name in ("by_id", "by_symbol")]
    report = prepare(sources, tmp_path / "out", genes=[tmp_path / "hgnc.tsv"])
    assert (report.genes, [source.genes_matched for source in report.sources]) == (2, [2, 2])
    assert read_manifest(tmp_path / "out")["gene_tables"] == [str(tmp_path / "hgnc.tsv")]
    without = prepare(sources, tmp_path / "without")
    assert without.genes == 4
    # Two columns of one file stay two genes, whatever a table says.
    alone = prepare([tmp_path / "both_names.h5ad"], tmp_path / "alone", genes=[tmp_path / "hgnc.tsv"])
    assert (alone.genes, alone.sources[0].genes_matched) == (2, 2)


@pytest.fixture(scope="module")
def census(shared: Path) -> Vocabulary:
    return read_vocabulary(shared / "data/gene_vocab/scgpt_census_vocab.json.gz")


@pytest.fixture(scope="module")
def hgnc_and_gencode(shared: Path) -> GeneTable:
    folder = shared / "data/gene_vocab"
    return GeneTable.read([folder / "hgnc_complete.parquet", folder / "gencode_human.parquet"])


@pytest.mark.realdata
def test_the_real_tables_together(hgnc_and_gencode: GeneTable) -> None:
    table = hgnc_and_gencode
    assert len(table) > 80_000
    h3 = table.resolve(None, "H3F3B")
    assert h3 == (table.resolve("ENSG00000132475", None).gene, Kinship.OTHER)
    assert table.genes[h3.gene].symbol in ("H3-3B", "H3F3B")
    tbce = table.resolve("ENSG00000284770", None)
    assert tbce == table.resolve("ENSG00000284770.2", None)
    assert table.genes[tbce.gene].symbol == "TBCE"


# measured: share of genes, share of counts; names that are asked for, with a table or without
MEASURED = {
    ("annotation/pbmc3k_10x", "symbols", False): (0.8330, 0.9635),
    ("annotation/pbmc3k_10x", "symbols", True): (0.8754, 0.9956),
    ("annotation/pbmc3k_10x", "ids", False): (0.0001, 0.0000),
    ("annotation/pbmc3k_10x", "ids", True): (0.7013, 0.9918),
    ("annotation/pbmc3k_10x", "both", False): (0.8331, 0.9635),
    ("annotation/pbmc3k_10x", "both", True): (0.9494, 0.9976),
    ("pretrain/malt_10x", "symbols", False): (0.6955, 0.9837),
    ("pretrain/malt_10x", "symbols", True): (0.7088, 0.9950),
    ("pretrain/malt_10x", "ids", True): (0.7231, 0.9951),
    ("annotation/baron_human_d12", "symbols", False): (0.9650, 0.9290),
    ("annotation/baron_human_d12", "symbols", True): (0.9979, 0.9509),
    ("annotation/baron_mouse_m1", "both", True): (0.0049, 0.0032),
}


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "asked", "with_table"), MEASURED)
def test_share_of_real_cells_that_scgpts_vocabulary_knows(
    shared: Path, census: Vocabulary, hgnc_and_gencode: GeneTable, name: str, asked: str, with_table: bool
) -> None:
    adata = anndata.read_h5ad(shared / f"data/{name}.h5ad")
    ensembl, symbols = genes_of(adata.var)
    nothing = [None] * adata.n_vars
    entries = census.match(
        nothing if asked == "symbols" else ensembl,
        nothing if asked == "ids" else symbols,
        hgnc_and_gencode if with_table else None,
    )
    totals = np.asarray(adata.X.sum(axis=0), np.float64).ravel()
    shares = (entries >= 0).mean(), totals[entries >= 0].sum() / totals.sum()
    assert shares == pytest.approx(MEASURED[name, asked, with_table], abs=1e-4)


@pytest.mark.realdata
def test_share_of_gencode_that_scgpts_vocabulary_knows(
    shared: Path, census: Vocabulary, hgnc_and_gencode: GeneTable
) -> None:
    gencode = pd.read_parquet(shared / "data/gene_vocab/gencode_human.parquet")
    ids, named = gencode["ensembl_id"].tolist(), ~gencode["symbol"].str.startswith("ENSG").to_numpy()
    coding = (gencode["biotype"] == "protein_coding").to_numpy()
    symbols = [symbol if has else None for symbol, has in zip(gencode["symbol"], named, strict=True)]
    nothing = [None] * len(ids)
    by_symbol = census.match(nothing, symbols) >= 0
    by_id = census.match(ids, nothing) >= 0
    by_table = census.match(ids, nothing, hgnc_and_gencode) >= 0
    # Almost half of GENCODE's genes have no symbol yet: those can be in no vocabulary of symbols.
    assert named.mean() == pytest.approx(0.542, abs=1e-3)
    assert by_id.mean() < 0.01
    assert 0.49 < by_symbol.mean() < 0.50 <= by_table.mean()
    assert by_symbol[named].mean() == pytest.approx(0.912, abs=1e-3)
    assert by_table[named].mean() == pytest.approx(0.915, abs=1e-3)
    assert by_table[coding].mean() == pytest.approx(0.964, abs=1e-3)


@pytest.mark.realdata
def test_old_symbols_of_real_genes_lead_where_their_ids_lead(
    shared: Path, census: Vocabulary, hgnc_and_gencode: GeneTable
) -> None:
    """Cell Ranger's old references give each symbol with its id: two independent ways to the same entry."""
    tenx = pd.read_parquet(shared / "data/gene_vocab/tenx_gene_lists.parquet")
    old = tenx[tenx["ref"] == "hg19"]
    nothing = [None] * len(old)
    by_symbol = census.matching(nothing, old["symbol"].tolist(), hgnc_and_gencode)
    by_id = census.match(old["ensembl_id"].tolist(), nothing, hgnc_and_gencode)
    through_alias = (by_symbol.by == MatchedBy.ALIAS) & (by_id >= 0)
    assert through_alias.sum() > 1300
    assert (by_symbol.entries == by_id)[through_alias].mean() > 0.985
