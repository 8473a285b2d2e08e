"""Vocabulary: which names mean the same gene, and what a vocabulary file may hold."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from scfm.data.vocabulary import SPECIALS, Gene, MatchedBy, Vocabulary, is_ensembl, strip_version
from scfm.data.vocabulary_files import read_vocabulary, scgpt_tokens
from scfm.errors import ScfmError

TP53 = Gene.of("ENSG00000141510", "TP53")
CD3E = Gene.of("ENSG00000198851", "CD3E")
TBCE_A = Gene.of("ENSG00000284770", "TBCE")
TBCE_B = Gene.of("ENSG00000285053", "TBCE")


def test_genes_come_first_sorted_by_id_and_special_tokens_last() -> None:
    vocabulary = Vocabulary.from_genes([CD3E, Gene.of(None, "MYSTERY"), TP53, CD3E])
    assert [gene.id for gene in vocabulary.entries] == [TP53.id, CD3E.id, "MYSTERY", *SPECIALS]
    assert (len(vocabulary), vocabulary.n_genes, vocabulary.pad, vocabulary.cls) == (5, 3, 3, 4)
    assert vocabulary.names == ["TP53", "CD3E", "MYSTERY", "<pad>", "<cls>"]


def test_further_special_tokens_stand_after_the_two_that_every_vocabulary_has(tmp_path: Path) -> None:
    genes = [TP53, CD3E]
    specials = [Gene(name) for name in (*SPECIALS, "<eoc>", "<mask>")]
    vocabulary = Vocabulary(genes + specials)
    assert (len(vocabulary), vocabulary.n_genes, vocabulary.pad, vocabulary.cls) == (6, 2, 2, 3)
    assert vocabulary.match([None, TP53.ensembl], ["<eoc>", None]).tolist() == [-1, 0]
    assert len(vocabulary.gene_keys) == 2
    vocabulary.save(tmp_path / "vocab.json")
    assert Vocabulary.load(tmp_path / "vocab.json") == vocabulary
    assert vocabulary.hash != Vocabulary(genes + specials[:2]).hash


def test_the_hash_of_a_vocabulary_is_that_of_the_first_release() -> None:
    vocabulary = Vocabulary.from_genes([TP53, CD3E, Gene.of(None, "MYSTERY")])
    assert vocabulary.hash == "fdeeb7221ab2be79aadc74db5ac3d4ec6d45027740dce7d6813b3b4221ba8911"


@pytest.mark.parametrize(
    "names",
    [
        ["<eoc>", "<pad>"],
        ["<cls>", "<pad>"],
        ["<pad>", "<eoc>", "<cls>"],
        ["<pad>", "<cls>", "LATE"],
        ["<pad>", "<cls>", "<>"],
        ["<pad>"],
    ],
)
def test_special_tokens_in_another_order_are_refused(names: list[str]) -> None:
    with pytest.raises(ScfmError, match="must end with <pad>, <cls> and such further tokens"):
        Vocabulary([TP53, *(Gene(name) for name in names)])


def test_versions_are_stripped_from_ensembl_ids_only() -> None:
    assert strip_version("ENSG00000141510.17") == "ENSG00000141510"
    assert strip_version("ENSG00000182378.15_PAR_Y") == "ENSG00000182378_PAR_Y"
    assert strip_version("AC005606.1") == "AC005606.1"
    assert is_ensembl("ENSMUSG00000059552.14")
    assert is_ensembl("ENSSASG00005000002")
    assert not is_ensembl("ENSA")  # a human gene symbol


def test_one_gene_named_in_two_ways_is_one_entry() -> None:
    vocabulary = Vocabulary.from_genes([Gene.of(None, "TP53"), TP53, Gene.of(CD3E.ensembl, None), CD3E])
    assert vocabulary.entries[:-2] == [TP53, CD3E]
    assert vocabulary.match([None, TP53.ensembl], ["TP53", None]).tolist() == [0, 0]


def test_a_symbol_of_several_ensembl_ids_stays_apart() -> None:
    vocabulary = Vocabulary.from_genes([TBCE_A, TBCE_B, Gene.of(None, "TBCE")])
    assert vocabulary.entries[:-2] == [TBCE_A, TBCE_B, Gene.of(None, "TBCE")]
    assert vocabulary.ambiguous_symbols == {"TBCE"}
    assert vocabulary.match([TBCE_B.ensembl, None], ["TBCE", "TBCE"]).tolist() == [1, 2]


def test_an_ambiguous_symbol_without_entry_of_its_own_matches_nothing() -> None:
    assert Vocabulary.from_genes([TBCE_A, TBCE_B]).match([None], ["TBCE"]).tolist() == [-1]


def test_the_union_does_not_depend_on_the_order_of_sources() -> None:
    genes = [TP53, Gene.of(TP53.ensembl, "P53"), Gene.of(TP53.ensembl, "P53"), CD3E, Gene.of(None, "CD3E"), TBCE_A]
    vocabulary = Vocabulary.from_genes(genes)
    assert vocabulary == Vocabulary.from_genes(reversed(genes))
    assert vocabulary.entries[0] == Gene.of(TP53.ensembl, "P53")  # the symbol that most sources give


def test_match_asks_for_the_ensembl_id_first_then_for_the_symbol() -> None:
    vocabulary = Vocabulary.from_genes([TP53, CD3E, Gene.of(None, "MYSTERY")])
    ensembl = ["ENSG00000141510.17", None, "ENSG00000000001", "ENSG00000198851", None, ""]
    symbols = ["CD3E", "CD3E", "MYSTERY", None, "unheard-of", ""]
    assert vocabulary.match(ensembl, symbols).tolist() == [0, 1, 2, 1, -1, -1]


def test_a_replaced_ensembl_id_is_found_by_symbol_but_a_second_gene_of_the_name_is_not_added() -> None:
    vocabulary = Vocabulary.from_genes([TBCE_A])
    assert vocabulary.match([TBCE_B.ensembl], ["TBCE"]).tolist() == [0]
    assert vocabulary.match([TBCE_A.ensembl, TBCE_B.ensembl], ["TBCE", "TBCE"]).tolist() == [0, -1]


def test_matching_says_how_each_gene_was_found() -> None:
    vocabulary = Vocabulary.from_genes(
        [TP53, TBCE_A, Gene.of("ENSG00000285000", "DUP"), Gene.of("ENSG00000285001", "DUP")]
    )
    ensembl = [TP53.ensembl, TBCE_A.ensembl, TBCE_B.ensembl, None, None, None]
    symbols = ["TP53", "TBCE", "TBCE", "TP53", "DUP", "unheard-of"]
    match = vocabulary.matching(ensembl, symbols)
    by = MatchedBy
    assert [by(how) for how in match.by] == [by.ID, by.ID, by.TAKEN, by.SYMBOL, by.AMBIGUOUS, by.UNKNOWN]
    assert ((match.entries >= 0) == (match.by < by.UNKNOWN)).all()
    np.testing.assert_array_equal(match.entries, vocabulary.match(ensembl, symbols))


def test_an_id_that_stands_there_with_and_without_version_means_the_one_without() -> None:
    bare, versioned = Gene("ENSG00000283886", "ENSG00000283886"), Gene("ENSG00000283886.3", "ENSG00000283886")
    for genes in ([bare, versioned], [versioned, bare]):
        vocabulary = Vocabulary(genes + [Gene(special) for special in SPECIALS])
        assert vocabulary.match(["ENSG00000283886.3"], [None]).tolist() == [genes.index(bare)]


def test_gene_keys_are_the_same_in_every_vocabulary_that_holds_the_gene() -> None:
    small, large = Vocabulary.from_genes([TP53]), Vocabulary.from_genes([TP53, CD3E, TBCE_A])
    assert small.gene_keys[0] == large.gene_keys[0]
    assert large.gene_keys.dtype == np.uint64
    assert len(set(large.gene_keys.tolist())) == 3


def test_saved_and_loaded_is_the_same_vocabulary(tmp_path: Path) -> None:
    vocabulary = Vocabulary.from_genes([TP53, Gene.of(None, "Ångström")])
    vocabulary.save(tmp_path / "vocab.json")
    loaded = read_vocabulary(tmp_path / "vocab.json")
    assert loaded == vocabulary
    assert loaded.hash == vocabulary.hash != Vocabulary.from_genes([TP53]).hash
    assert [entry["id"] for entry in json.loads((tmp_path / "vocab.json").read_text())][-2:] == list(SPECIALS)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not JSON"),
        ('{"TP53": 0}', "expected a list"),
        ('[{"id": "A", "ensembl": null, "symbol": 3}]', "expected a list"),
        ('[{"id": "A", "ensembl": null, "symbol": "A"}]', "must end with <pad>, <cls>.* ends with .'A'"),
        (
            json.dumps([{"id": i, "ensembl": None, "symbol": None} for i in ("A", "A", *SPECIALS)]),
            "more than once, e.g. ..A",
        ),
    ],
)
def test_a_broken_vocabulary_file_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "vocab.json").write_text(text)
    with pytest.raises(ScfmError, match=rf"vocab\.json: .*{complaint}"):
        Vocabulary.load(tmp_path / "vocab.json")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_vocabulary_of_scgpt_is_read_in_our_order(tmp_path: Path, suffix: str) -> None:
    tokens = {"<cls>": 1, "TP53": 4, "<pad>": 3, "ENSG00000198851.4": 0, "<mask>": 5, "<eoc>": 2}
    path = tmp_path / f"vocab.json{suffix}"
    content = json.dumps(tokens).encode()
    path.write_bytes(gzip.compress(content) if suffix else content)
    vocabulary, ids = scgpt_tokens(path)
    assert [entry.id for entry in vocabulary.entries] == [
        "ENSG00000198851.4",
        "TP53",
        "<pad>",
        "<cls>",
        "<eoc>",
        "<mask>",
    ]
    assert ids.tolist() == [0, 4, 3, 1, 2, 5]
    assert vocabulary.match([CD3E.ensembl, None], [None, "TP53"]).tolist() == [0, 1]
    assert read_vocabulary(path) == vocabulary


def test_special_tokens_that_a_vocabulary_of_scgpt_lacks_have_the_next_ids(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"<cls>": 0, "TP53": 1}')
    vocabulary, ids = scgpt_tokens(tmp_path / "vocab.json")
    assert [entry.id for entry in vocabulary.entries] == ["TP53", "<pad>", "<cls>", "<eoc>"]
    assert ids.tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"a": 0, "b": 2}', "without gaps, but 1 is missing; ids are rows"),
        ('{"a": 1, "b": 2}', "without gaps, but 0 is missing"),
        ('{"a": 0, "b": 0}', "1 ids stand for several tokens, e.g. 0 for a, b"),
        ('{"a": 0, "a": 1}', "1 names stand there more than once, e.g. a"),
        ('{"a": 0, "b": true}', "expected {token: id} with whole numbers"),
        ('{"a": 0.0}', "expected {token: id} with whole numbers"),
        ('{"<pad>": 0}', "holds no gene, only special tokens"),
        ("{}", "holds no gene"),
        ("{", "not JSON"),
        ('[{"id": "A"}]', "expected"),
    ],
)
def test_a_broken_vocabulary_of_scgpt_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "vocab.json").write_text(text)
    for read in (scgpt_tokens, read_vocabulary):
        with pytest.raises(ScfmError, match=rf"vocab\.json: .*{complaint}"):
            read(tmp_path / "vocab.json")


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"a": 0}')
    for content in (whole[:-9], b"no gzip at all", whole[:12] + b"\xff" + whole[13:]):
        (tmp_path / "vocab.json.gz").write_bytes(content)
        with pytest.raises(ScfmError, match=r"vocab\.json\.gz: neither a vocab.json"):
            read_vocabulary(tmp_path / "vocab.json.gz")


def test_a_text_file_names_one_gene_per_line_and_keeps_its_order(tmp_path: Path) -> None:
    (tmp_path / "genes.txt").write_text("ZYX\nENSG00000141510.17\n\nA1BG \n")
    vocabulary = read_vocabulary(tmp_path / "genes.txt")
    assert vocabulary.entries[:-2] == [Gene.of(None, "ZYX"), Gene.of(TP53.ensembl, None), Gene.of(None, "A1BG")]


@pytest.mark.parametrize(("text", "complaint"), [("\n\n", "holds no gene"), ("A\nB\nA\n", "more than once")])
def test_a_useless_text_file_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "genes.txt").write_text(text)
    with pytest.raises(ScfmError, match=rf"genes\.txt: .*{complaint}"):
        read_vocabulary(tmp_path / "genes.txt")


def test_a_missing_vocabulary_file_is_named(tmp_path: Path) -> None:
    for name in ("vocab.json", "genes.txt"):
        with pytest.raises(ScfmError, match=f"{name}: there is no such vocabulary file"):
            read_vocabulary(tmp_path / name)


@pytest.mark.realdata
def test_real_symbols_match_real_ensembl_ids(shared: Path) -> None:
    import pandas as pd

    tenx = pd.read_parquet(shared / "data/gene_vocab/gencode_human.parquet")
    vocabulary = Vocabulary.from_genes(Gene.of(e, s) for e, s in zip(tenx.iloc[:, 0], tenx.iloc[:, 1], strict=True))
    unique = [
        gene for gene in vocabulary.entries[:-2] if gene.symbol and gene.symbol not in vocabulary.ambiguous_symbols
    ]
    assert len(unique) > 30_000
    by_symbol = vocabulary.match([None] * len(unique), [gene.symbol for gene in unique])
    by_id = vocabulary.match([gene.ensembl for gene in unique], [None] * len(unique))
    np.testing.assert_array_equal(by_symbol, by_id)


@pytest.mark.realdata
def test_the_published_vocabulary_of_scgpt(shared: Path) -> None:
    vocabulary, ids = scgpt_tokens(shared / "data/gene_vocab/scgpt_census_vocab.json.gz")
    assert (len(vocabulary), vocabulary.n_genes, vocabulary.pad, vocabulary.cls) == (60_697, 60_694, 60_694, 60_695)
    np.testing.assert_array_equal(ids, np.arange(60_697))
    assert vocabulary.entries[0].id == "A1BG"
    assert sum(gene.ensembl is not None for gene in vocabulary.entries) == 699
    # Both spellings of one id are entries, so that the weights of both survive a conversion.
    both = [gene.id for gene in vocabulary.entries if gene.ensembl == "ENSG00000283886"]
    assert sorted(both) == ["ENSG00000283886", "ENSG00000283886.3"]
