"""`scfm check`: what it finds in good and bad files, and that it sees what a model would."""

from __future__ import annotations

import re
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from cells import GENES, made_up_cells, write_cells
from runs import tiny_recipe, write_shards
from scipy.sparse import csr_matrix

import scfm
from scfm.check_report import CheckReport
from scfm.cli import main
from scfm.data.gene_table import GeneTable
from scfm.data.vocabulary import MatchedBy
from scfm.errors import ScfmError
from scfm.training.run import pretrain

BY = MatchedBy


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    return pretrain(tiny_recipe(write_shards(place / "shards", n=40), place / "run", trainer={"max_steps": 1}))


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    """A vocabulary by symbol: A, B and C."""
    path = tmp_path / "genes.txt"
    path.write_text("A\nB\nC\n")
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.tsv"
    lines = ["symbol\tprev_symbol\talias_symbol\tensembl_gene_id"]
    lines += ["A\t\t\tENSG00000000001", "B\tOLDB\tSHARED\tENSG00000000002", "C\t\tSHARED\tENSG00000000003"]
    path.write_text("\n".join(lines) + "\n")
    return path


def cells(names: list[str], counts: list[list[float]], ids: list[str] | None = None) -> anndata.AnnData:
    var = pd.DataFrame({"ensembl_id": ids} if ids else None, index=names)
    return anndata.AnnData(csr_matrix(np.array(counts, np.float32)), var=var)


def groups(report: CheckReport) -> dict[MatchedBy, tuple[int, float | None]]:
    """Return number of genes and share of counts by how they were matched, without the empty ones."""
    held = report.coverage.groups.items()
    return {
        by: (group.genes, None if group.share is None else round(group.share, 6)) for by, group in held if group.genes
    }


def test_every_gene_and_every_count_is_accounted_for(vocabulary: Path, table: Path) -> None:
    names = ["A", "x1", "OLDB", "SHARED", "nobody", "ERCC-00002", "B"]
    ids = ["", "ENSG00000000003.4", "", "", "", "", ""]
    counts = [[4, 2, 1, 1, 0, 0, 0], [0, 0, 0, 0, 8, 2, 2], [0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 5, 0, 0]]
    report = scfm.check(cells(names, counts, ids), vocabulary=vocabulary, genes=[table], min_matched=0.3)
    assert (report.cells, report.genes, report.with_id, report.with_symbol_only) == (4, 7, 1, 5)
    assert (report.place, report.value_kind, report.label) == ("X", "counts", "the AnnData")
    assert groups(report) == {
        BY.SYMBOL: (2, 0.24),
        BY.TABLE: (1, 0.08),
        BY.UNKNOWN: (2, 0.6),
        BY.AMBIGUOUS: (1, 0.04),
        BY.TAKEN: (1, 0.04),
    }
    coverage = report.coverage
    assert (coverage.matched, coverage.covered) == (3, pytest.approx(8 / 25))
    assert coverage.median_covered == pytest.approx(np.median([6 / 8, 2 / 12, 0]))
    assert (report.cells_without_counts, coverage.cells_without_match) == (1, 2)
    assert coverage.dropped == [
        ("nobody", pytest.approx(13 / 25)),
        ("ERCC-00002", pytest.approx(2 / 25)),
        ("OLDB", pytest.approx(1 / 25)),
        ("SHARED", pytest.approx(1 / 25)),
    ]
    assert report.ok
    assert report.problems == []


def test_file_and_anndata_give_the_same_report_block_by_block(
    tmp_path: Path, vocabulary: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adata = cells(["A", "OLDB", "x"], np.random.default_rng(0).poisson(1.5, (50, 3)).tolist())
    adata.write_h5ad(tmp_path / "cells.h5ad")
    options = {"vocabulary": vocabulary, "genes": GeneTable.read([table])}
    in_memory = scfm.check(adata, **options)
    monkeypatch.setattr("scfm.data.sources.Source.values_per_block", 20)
    monkeypatch.setattr("anndata.read_h5ad", None)  # the file is read through Source, never whole
    from_file = scfm.check(tmp_path / "cells.h5ad", **options)
    assert from_file.label == str(tmp_path / "cells.h5ad")
    assert (from_file.coverage, from_file.problems) == (in_memory.coverage, in_memory.problems)


def test_counts_stand_in_raw_where_there_is_one(tmp_path: Path, vocabulary: Path) -> None:
    adata = cells(["A", "x"], [[1, 3]])
    adata.raw = adata
    adata.X = csr_matrix(np.array([[0.1, -2.0]], np.float32))
    adata.write_h5ad(tmp_path / "cells.h5ad")
    report = scfm.check(tmp_path / "cells.h5ad", vocabulary=vocabulary, min_matched=0.2)
    assert (report.place, report.value_kind, report.coverage.covered) == ("raw.X", "counts", 0.25)
    assert report.ok


def test_too_small_a_share_is_a_problem(vocabulary: Path) -> None:
    adata = cells(["A", "x"], [[1, 3]])
    assert scfm.check(adata, vocabulary=vocabulary, min_matched=0.25).ok
    report = scfm.check(adata, vocabulary=vocabulary)
    assert not report.ok
    (problem,) = report.problems
    assert problem.startswith(f"only 25.00% of all counts fall on genes of {vocabulary}, less than 50% (min_matched).")


@pytest.mark.parametrize("at", [0, 30])
def test_normalised_values_are_a_problem_with_advice(
    at: int, vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever they stand, and all figures are still given."""
    monkeypatch.setattr("scfm.data.sources.Source.values_per_block", 8)
    counts = np.ones((31, 2))
    counts[at, 0] = 1.5
    report = scfm.check(cells(["A", "x"], counts.tolist()), vocabulary=vocabulary)
    assert (report.value_kind, report.ok) == ("normalised", False)
    assert report.coverage.covered == pytest.approx(31.5 / 62.5)
    (problem,) = report.problems
    assert problem.startswith("X holds 1.5 for gene A in cell")
    assert "Put the raw counts into raw.X or X" in problem


def test_normalised_values_suit_a_model_that_was_trained_on_them(model: Path) -> None:
    adata = made_up_cells(6)
    adata.X = adata.X * 0.5
    loaded = scfm.load(model)
    assert not scfm.check(adata, model=loaded).ok
    loaded.files.value_kind = "normalised"
    report = scfm.check(adata, model=loaded)
    assert report.ok
    assert report.value_kind == "normalised"


@pytest.mark.parametrize(
    ("value", "complaint"), [(np.nan, "values must be finite"), (-1.0, "negative values mean that the data are scaled")]
)
def test_values_that_cannot_be_used_leave_shares_unknown(value: float, complaint: str, vocabulary: Path) -> None:
    report = scfm.check(cells(["A", "x"], [[1, value]]), vocabulary=vocabulary)
    assert complaint in report.problems[0]
    assert len(report.problems) == 1
    coverage = report.coverage
    assert (report.value_kind, report.cells_without_counts) == (None, None)
    assert (coverage.covered, coverage.median_covered, coverage.cells_without_match) == (None, None, None)
    assert groups(report) == {BY.SYMBOL: (1, None), BY.UNKNOWN: (1, None)}


@pytest.mark.parametrize(
    ("adata", "complaint"),
    [
        (cells(["", " "], [[1, 1]]), "neither var nor its index names a gene"),
        (cells(["ERCC-00002"], [[1]]), "neither var nor its index names a gene"),
        (cells(["0", "1"], [[1, 1]]), "var has numbers for genes (0, 1 ...)"),
        (cells(["A"], [[0]]), "X holds no value but zero"),
        (cells(["A"], [[0.5]]), "X holds 0.5 for gene A"),
    ],
)
def test_without_a_model_counts_and_names_are_checked(adata: anndata.AnnData, complaint: str) -> None:
    report = scfm.check(adata)
    assert report.coverage is None
    assert [complaint in problem for problem in report.problems] == [True]


def test_without_a_model_named_counts_would_work() -> None:
    assert scfm.check(made_up_cells(5)).ok


def test_a_model_sees_the_genes_that_check_says(model: Path, tmp_path: Path) -> None:
    """Renamed genes are lost without the table, and found with it by check and by embed alike."""
    path = tmp_path / "table.tsv"
    rows = [f"{name}\tOLD{name}\tENSG{i:011d}" for i, name in enumerate(GENES)]
    path.write_text("\n".join(["symbol\tprev_symbol\tensembl_gene_id", *rows]) + "\n")
    adata = made_up_cells(20, seed=3)
    expected = scfm.load(model).embed(adata.copy()).obsm["X_scfm"]
    adata.var_names = [f"OLD{name}" if i % 2 else name for i, name in enumerate(adata.var_names)]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    without = scfm.check(tmp_path / "cells.h5ad", model=model, min_matched=0.9)
    assert groups(without).keys() == {BY.SYMBOL, BY.UNKNOWN}
    assert not without.ok
    report = scfm.check(tmp_path / "cells.h5ad", model=model, genes=[path], min_matched=0.9)
    assert (report.coverage.against, report.coverage.covered) == (str(model), pytest.approx(1))
    assert {by: n for by, (n, _) in groups(report).items()} == {BY.SYMBOL: 30, BY.ALIAS: 30}
    arguments = ["embed", str(tmp_path / "cells.h5ad"), "--model", str(model), "--out", str(tmp_path / "out.h5ad")]
    assert main([*arguments, "--genes", str(path)]) == 0
    embedded = anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_scfm"]
    np.testing.assert_allclose(embedded, expected, atol=1e-6)


def test_exit_code_and_words(
    model: Path, vocabulary: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_cells(tmp_path / "cells.h5ad", n=6))
    assert main(["check", path, "--model", str(model)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{path}: 6 cells, 60 genes, raw counts in X\ncompared with {model}\n")
    assert "60 of 60 genes matched, with 100.00% of all counts (median of the cells 100.00%)." in printed
    assert printed.endswith("Would work.\n")
    assert main(["check", path, "--vocabulary", str(vocabulary), "--genes", str(table)]) == 1
    printed = capsys.readouterr().out
    assert "6 cells have no count on a matched gene." in printed
    assert "Dropped genes with most counts: G0" in printed
    assert "Would not work: only 0.00% of all counts fall on genes of" in printed
    assert main(["check", path, "--vocabulary", str(vocabulary), "--min_matched", "0"]) == 0
    capsys.readouterr()
    assert main(["check", path]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"with symbol only +60", printed)
    assert "share of counts" not in printed
    assert main(["check", str(tmp_path / "nowhere.h5ad")]) == 2
    assert "nowhere.h5ad: there is no such file" in capsys.readouterr().err


def test_unusable_options_are_named(model: Path, vocabulary: Path) -> None:
    adata = made_up_cells(3)
    with pytest.raises(ScfmError, match="give a model or a vocabulary, not both"):
        scfm.check(adata, model=model, vocabulary=vocabulary)
    with pytest.raises(ScfmError, match=r"min_matched: 1\.5 is not a share"):
        scfm.check(adata, vocabulary=vocabulary, min_matched=1.5)


@pytest.mark.realdata
def test_a_file_of_human_cells_against_scgpts_vocabulary(shared: Path) -> None:
    folder = shared / "data/gene_vocab"
    tables = [folder / "hgnc_complete.parquet", folder / "gencode_human.parquet"]
    options = {"vocabulary": folder / "scgpt_census_vocab.json.gz", "genes": tables}
    report = scfm.check(shared / "data/annotation/pbmc3k_10x.h5ad", **options)
    assert report.ok
    assert (report.cells, report.genes, report.with_id) == (2700, 32738, 32738)
    coverage = report.coverage
    assert {by.name: group.genes for by, group in coverage.groups.items()} == {
        "ID": 2,
        "SYMBOL": 27_271,
        "TABLE": 3_710,
        "ALIAS": 97,
        "UNKNOWN": 1_536,
        "AMBIGUOUS": 4,
        "TAKEN": 118,
    }
    assert coverage.covered == pytest.approx(0.9976, abs=1e-4)
    assert coverage.median_covered == pytest.approx(0.9978, abs=1e-4)
    assert coverage.cells_without_match == 0
    assert coverage.dropped[0][0] == "UQCR11.1"
    assert sum(share for _, share in coverage.dropped) == pytest.approx(1 - coverage.covered)


@pytest.mark.realdata
def test_mouse_cells_do_not_pass_for_human_ones(shared: Path) -> None:
    folder = shared / "data/gene_vocab"
    report = scfm.check(
        shared / "data/annotation/baron_mouse_m1.h5ad",
        vocabulary=folder / "scgpt_census_vocab.json.gz",
        genes=[folder / "hgnc_complete.parquet"],
    )
    assert not report.ok
    assert report.coverage.covered < 0.01


@pytest.mark.realdata
def test_ids_without_symbols_need_a_table(shared: Path) -> None:
    """A CELLxGENE file whose raw.var has ids only, and a vocabulary of symbols."""
    folder = shared / "data/gene_vocab"
    example, census = shared / "data/formats/cellxgene_schema_example.h5ad", folder / "scgpt_census_vocab.json.gz"
    assert not scfm.check(example, vocabulary=census).ok
    report = scfm.check(example, vocabulary=census, genes=[folder / "gencode_human.parquet"])
    assert report.ok
    assert report.coverage.groups[BY.TABLE].genes == 134
    assert report.coverage.covered > 0.999
