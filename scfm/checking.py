"""`scfm check`: would a file work, and how much of it would a model see?

The module has another name than the verb, as `scfm.check` is the function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scfm.check_report import CheckReport, Coverage, Group, print_report
from scfm.data.expression import find_faults
from scfm.data.gene_table import GeneTable
from scfm.data.opening import open_source
from scfm.data.sources import AnnDataSource, Source
from scfm.data.store import ValueKind
from scfm.data.vocabulary import GeneMatch, MatchedBy, Vocabulary
from scfm.data.vocabulary_files import read_vocabulary
from scfm.errors import ScfmError

if TYPE_CHECKING:
    from anndata import AnnData

    from scfm.pretrained import PretrainedModel


def check(
    data: AnnData | str | Path,
    *,
    model: PretrainedModel | str | Path | None = None,
    vocabulary: str | Path | None = None,
    genes: GeneTable | Sequence[str | Path] = (),
    min_matched: float = 0.5,
) -> CheckReport:
    """Say whether cells would work: raw counts, named genes, and genes that a model or a vocabulary knows.

    Args:
        data: AnnData, or a file of any kind that `scfm prepare` takes; h5ad is read block by block.
        model: a model, or its directory.
        vocabulary: vocabulary file, in place of a model's.
        genes: table of genes, or its files, the most trusted first, by which more names are matched.
        min_matched: least share of all counts that must fall on matched genes.

    Raises:
        ScfmError: the file cannot be read, or a model, vocabulary or table cannot be read.
    """
    if model is not None and vocabulary is not None:
        raise ScfmError("check: give a model or a vocabulary, not both; a model brings its own vocabulary")
    if not 0 <= min_matched <= 1:
        raise ScfmError(f"min_matched: {min_matched} is not a share; give a number from 0 to 1")
    yardstick = _yardstick(model, vocabulary)
    table = genes if isinstance(genes, GeneTable) else GeneTable.read(genes) if genes else None
    with _opened(data) as source:
        return _report(source, yardstick, table, min_matched)


def check_file(
    file: str,
    *,
    model: str | None = None,
    vocabulary: str | None = None,
    genes: Sequence[str] = (),
    min_matched: float = 0.5,
) -> bool:
    """Print what a file holds; return whether it would work.

    Args:
        file: h5ad, 10x .h5 or loom file, or a folder with matrix.mtx.
        model: Model directory, whose genes the file is compared with; without it only counts and names are checked.
        vocabulary: Vocabulary file in place of a model: vocab.json (scGPT's too), or a text file with a gene per line.
        genes: Tables of genes (HGNC, GENCODE ...), the most trusted first, by which more names are matched.
        min_matched: Least share of all counts on matched genes; below it the exit code is 1. Human files reach 0.9 and
            more where names are of one kind; the default of 0.5 stops another organism, or ids where symbols are known.
    """
    report = check(file, model=model, vocabulary=vocabulary, genes=genes, min_matched=min_matched)
    print_report(report)
    return report.ok


@dataclass(frozen=True)
class _Yardstick:
    """What cells are compared with: a vocabulary, its name, and the values that are asked for."""

    vocabulary: Vocabulary
    name: str
    value_kind: ValueKind


def _yardstick(model: PretrainedModel | str | Path | None, vocabulary: str | Path | None) -> _Yardstick | None:
    if vocabulary is not None:
        return _Yardstick(read_vocabulary(Path(vocabulary)), str(vocabulary), "counts")
    if model is None:
        return None
    if isinstance(model, (str, Path)):
        from scfm.checkpoints.native import read_model

        files, name = read_model(model), str(model)
    else:
        files, name = model.files, model.source
    return _Yardstick(files.vocabulary, name, files.value_kind)


def _opened(data: AnnData | str | Path) -> Source:
    if isinstance(data, (str, Path)):
        return open_source(data, accept_normalised=True)
    return AnnDataSource(data, accept_normalised=True)


@dataclass
class _Totals:
    """Sums over all values: of each column, of each cell, and of each cell over matched columns only."""

    columns: NDArray[np.float64]
    cells: NDArray[np.float64]
    matched: NDArray[np.float64]
    value_kind: ValueKind = "counts"

    def shares(self) -> NDArray[np.float64] | None:
        """Return the share of each column in all counts, None where there are none."""
        return self.columns / self.columns.sum() if self.columns.any() else None

    def median_matched(self) -> float | None:
        """Return the median share of matched columns over the cells that have any counts."""
        expressed = self.cells > 0
        return float(np.median(self.matched[expressed] / self.cells[expressed])) if expressed.any() else None


def _sum_up(source: Source, matched: NDArray[np.bool_]) -> _Totals:
    """Sum up in one pass over the blocks. Raises ScfmError for values that are neither counts nor normalised."""
    n, weights = len(matched), matched.astype(np.float64)
    totals = _Totals(np.zeros(n), np.zeros(source.n_cells), np.zeros(source.n_cells))
    for first, block in source.blocks():
        here = slice(first, first + block.shape[0])
        totals.columns += np.bincount(block.indices, block.data, minlength=n)
        totals.cells[here], totals.matched[here] = block @ np.ones(n), block @ weights
        if find_faults(block.data):
            totals.value_kind = "normalised"
    return totals


def _report(source: Source, yardstick: _Yardstick | None, table: GeneTable | None, min_matched: float) -> CheckReport:
    match = yardstick.vocabulary.matching(*source.genes, table) if yardstick else None
    problems, totals = _problems_of_names(source), None
    try:
        totals = _sum_up(source, np.ones(len(source.var), bool) if match is None else match.entries >= 0)
        if totals.value_kind == "normalised" and (yardstick is None or yardstick.value_kind == "counts"):
            _refuse_normalised(source)
    except ScfmError as error:
        problems.append(str(error).removeprefix(f"{source.label}: "))
    if totals is not None and not totals.columns.any():
        problems.append(f"{source.place} holds no value but zero")
    coverage = _coverage(source, yardstick.name, match, totals) if yardstick and match else None
    if coverage and coverage.covered is not None and coverage.covered < min_matched:
        problems.append(
            f"only {coverage.covered:.2%} of all counts fall on genes of {coverage.against}, less than "
            f"{min_matched:.0%} (min_matched). Check the organism; where only the names differ, a table of genes "
            "(--genes) maps ids, symbols and old names to each other"
        )
    ensembl, symbols = source.genes
    return CheckReport(
        label=source.label,
        place=source.place,
        value_kind=totals.value_kind if totals else None,
        cells=source.n_cells,
        cells_without_counts=int((totals.cells == 0).sum()) if totals else None,
        genes=len(source.var),
        with_id=sum(name is not None for name in ensembl),
        with_symbol_only=sum(not name and bool(symbol) for name, symbol in zip(ensembl, symbols, strict=True)),
        coverage=coverage,
        problems=problems,
    )


def _refuse_normalised(source: Source) -> None:
    """Raise ScfmError with advice, as reading the cells for such a model would, at the first value that is no count."""
    source.accept_normalised = False
    for _ in source.blocks():
        pass


def _problems_of_names(source: Source) -> list[str]:
    ensembl, symbols = source.genes
    named = [symbol for symbol in symbols if symbol]
    if not named and not any(ensembl):
        return ["neither var nor its index names a gene; give Ensembl ids or gene symbols"]
    if not any(ensembl) and all(symbol.isdigit() for symbol in named):
        return [f"var has numbers for genes ({', '.join(named[:3])} ...); give Ensembl ids or gene symbols"]
    return []


def _coverage(source: Source, against: str, match: GeneMatch, totals: _Totals | None) -> Coverage:
    shares = totals.shares() if totals else None
    groups = {
        by: Group(int((match.by == by).sum()), None if shares is None else float(shares[match.by == by].sum()))
        for by in MatchedBy
    }
    dropped = np.flatnonzero(match.entries < 0)
    share_of = np.zeros(len(match.entries)) if shares is None else shares
    dropped = dropped[np.argsort(-share_of[dropped], kind="stable")]
    names = source.var.index.astype(str)
    return Coverage(
        against=against,
        groups=groups,
        covered=None if shares is None else float(shares[match.entries >= 0].sum()),
        median_covered=totals.median_matched() if totals else None,
        cells_without_match=int((totals.matched == 0).sum()) if totals else None,
        dropped=[(names[column], float(share_of[column])) for column in dropped.tolist()],
    )
