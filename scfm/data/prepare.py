"""From h5ad files to a shard directory: `scfm prepare`.

Two passes. The first opens every source, reads genes and obs columns, and settles vocabulary, categories and the kind
of values. The second reads the cells in blocks and deals them into shards. Nothing stands at the destination before all
is written, and memory does not grow with the sources.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scfm.data.expression import take_cells
from scfm.data.gene_table import GeneTable
from scfm.data.shards import RESERVED_COLUMNS, Codec, ShardWriter, default_codec, read_manifest
from scfm.data.shuffle import Buckets
from scfm.data.sources import H5adSource
from scfm.data.store import ValueKind
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.data.vocabulary_files import read_vocabulary
from scfm.errors import ScfmError

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

VALUES_PER_SHARD = 2**28  # a shard is permuted in memory
SOURCE_COLUMN = "source"
DROP_REASONS = NOT_PRIMARY, ALL_ZERO = "not primary", "no expressed gene"


@dataclass(frozen=True)
class SourceReport:
    """What became of one source's cells and genes.

    Attributes:
        file: name of the file.
        cells: cells in the file.
        kept: cells written.
        dropped: cells left out, by reason.
        genes: columns of the matrix.
        genes_matched: columns whose gene is in the vocabulary.
        provenance: what the file says of its origin.
    """

    file: str
    cells: int
    kept: int
    dropped: dict[str, int]
    genes: int
    genes_matched: int
    provenance: dict[str, str]


@dataclass(frozen=True)
class PreparedReport:
    """What `prepare` wrote, and what it left out."""

    out: Path
    cells: int
    tokens: int
    shards: int
    genes: int
    value_kind: ValueKind
    ambiguous_symbols: int
    sources: list[SourceReport]

    def table(self) -> Table:
        """Return a rich table with a row per source."""
        from rich.table import Table

        table = Table(
            title=f"{self.cells:,} cells, {self.tokens:,} values ({self.value_kind}), {self.genes:,} genes, "
            f"{self.shards:,} {'shard' if self.shards == 1 else 'shards'} in {self.out}",
            caption=f"{self.ambiguous_symbols:,} symbols name several Ensembl ids" if self.ambiguous_symbols else None,
        )
        reasons = [reason for reason in DROP_REASONS if any(source.dropped[reason] for source in self.sources)]
        table.add_column("source", overflow="fold")
        for heading in ("cells", "kept", *(f"dropped: {reason}" for reason in reasons), "genes", "matched"):
            table.add_column(heading, justify="right")
        for source in self.sources:
            dropped = [source.dropped[reason] for reason in reasons]
            numbers = (source.cells, source.kept, *dropped, source.genes, source.genes_matched)
            table.add_row(source.file, *(f"{number:,}" for number in numbers))
        return table


@dataclass(frozen=True)
class _Surveyed:
    """What the first pass learns of a source."""

    path: Path
    label: str
    cells: int
    primary: int
    values: int
    value_kind: ValueKind
    obs_names: list[str]
    categories: dict[str, list[str]]


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    vocabulary: str | Path | None = None,
    genes: Sequence[str | Path] = (),
    obs: Sequence[str] = (),
    accept_normalised: bool = False,
    keep_order: bool = False,
    cells_per_shard: int = 100_000,
    codec: Codec | None = None,
    seed: int = 0,
) -> PreparedReport:
    """Turn h5ad files into a shard directory with a progress bar, print a table per source, and return its numbers.

    Args:
        sources: h5ad files, or folders that are searched for them.
        out: directory to write; it must not exist, or be empty.
        vocabulary: vocab.json, or a text file with a gene per line; without it the union of all sources' genes.
        genes: tables of genes (HGNC, GENCODE ...), the most trusted first: id, symbol and old names are the same gene.
        obs: categorical obs columns to carry along; a source that lacks one gets missing values.
        accept_normalised: take values that are not counts as float32: quantile bins keep their order within a cell, and
            `data.values: log2` takes them as log2(1 + expression per 10,000).
        keep_order: keep the cells in the order of the sources (inference) instead of shuffling them (training).
        cells_per_shard: about how many cells a shard holds; fewer where cells are very wide.
        codec: `packed` (half the bytes) or `list` (plain columns of Hugging Face datasets); without it packed for
            counts, and list for normalised values, which have no packed form.
        seed: of the shuffling.

    Raises ScfmError, and writes nothing, where a source, an obs column, the vocabulary or the destination is unusable.
    """
    out = Path(out)
    _refuse_taken(out)
    if cells_per_shard < 1:
        raise ScfmError(f"cells per shard: {cells_per_shard} must be at least 1")
    given = None if vocabulary is None else read_vocabulary(Path(vocabulary))
    table = GeneTable.read(genes) if genes else None
    with _progress() as progress:
        surveyed, named = _survey(_h5ad_files(sources), given, table, obs, accept_normalised, progress)
        known = given or Vocabulary.from_genes(named.elements())
        value_kind: ValueKind = "normalised" if any(s.value_kind == "normalised" for s in surveyed) else "counts"
        categories = _union_of_categories(surveyed, obs)
        primary = sum(source.primary for source in surveyed)
        mean_values = sum(source.values for source in surveyed) / max(1, sum(source.cells for source in surveyed))
        in_a_shard = min(cells_per_shard, max(1, int(VALUES_PER_SHARD / max(1, mean_values))))
        with _new_directory(out) as building:
            dealt = building / "buckets"
            dealt.mkdir()
            buckets = Buckets(dealt, in_a_shard, max(1, -(-primary // in_a_shard)), None if keep_order else seed)
            task = progress.add_task("reading cells", total=sum(source.cells for source in surveyed))
            reports = [
                _pour(source, buckets, known, table, value_kind, categories, lambda n: progress.advance(task, n))
                for source in surveyed
            ]
            n_shards = buckets.close()
            if not n_shards:
                raise ScfmError(f"no cell is left to write: {_why_empty(reports)}")
            writer = ShardWriter(building, known, value_kind, categories, codec or default_codec(value_kind))
            for block, codes in progress.track(buckets.shards(), total=n_shards, description="writing shards"):
                writer.write(block, codes)
            dealt.rmdir()
            tables = table.files if table else []
            writer.finish(
                [asdict(report) for report in reports], shuffled=not keep_order, seed=seed, gene_tables=tables
            )
    manifest = read_manifest(out)
    report = PreparedReport(
        out=out,
        cells=manifest["cells"],
        tokens=manifest["tokens"],
        shards=len(manifest["shards"]),
        genes=known.n_genes,
        value_kind=value_kind,
        ambiguous_symbols=len(known.ambiguous_symbols),
        sources=reports,
    )
    _print(report)
    return report


def _h5ad_files(sources: Sequence[str | Path]) -> list[Path]:
    files: list[Path] = []
    for source in map(Path, sources):
        found = sorted(source.rglob("*.h5ad")) if source.is_dir() else [source]
        if not found:
            raise ScfmError(f"{source}: the folder holds no .h5ad file")
        files += found
    if not files:
        raise ScfmError("no source is named; name h5ad files, or folders that hold them")
    twice = [str(path) for path, n in Counter(path.resolve() for path in files).items() if n > 1]
    if twice:
        raise ScfmError(f"named more than once among the sources: {', '.join(twice)}")
    return files


def _survey(
    files: list[Path],
    given: Vocabulary | None,
    table: GeneTable | None,
    obs: Sequence[str],
    accept_normalised: bool,
    progress: Progress,
) -> tuple[list[_Surveyed], Counter[Gene]]:
    """Open every source once: enough to refuse what is wrong before anything is written."""
    reserved = [name for name in obs if name in (*RESERVED_COLUMNS, SOURCE_COLUMN)]
    if reserved:
        raise ScfmError(f"obs column {', '.join(reserved)}: the name is taken by a column that shards have anyway")
    names = Counter(path.name for path in files)
    surveyed, genes = [], Counter[Gene]()
    for path in progress.track(files, description="surveying"):
        with H5adSource(path, accept_normalised) as source:
            named = source.gene_list()
            if not named:
                raise ScfmError(f"{path}: neither var nor its index names a gene; give Ensembl ids or gene symbols")
            if given is None:
                genes.update(named if table is None else table.canonical(named))
            else:
                source.gene_of_column(given, table)  # refuses a source of which the vocabulary knows no gene
            columns = {name: column for name in obs if (column := source.obs(name)) is not None}
            surveyed.append(
                _Surveyed(
                    path=path,
                    label=path.name if names[path.name] == 1 else str(path),
                    cells=source.n_cells,
                    primary=int(source.primary().sum()),
                    values=source.n_values,
                    value_kind=source.value_kind,
                    obs_names=source.obs_names,
                    categories={name: column.categories for name, column in columns.items()},
                )
            )
    return surveyed, genes


def _union_of_categories(surveyed: list[_Surveyed], obs: Sequence[str]) -> dict[str, list[str]]:
    absent = [name for name in obs if not any(name in source.categories for source in surveyed)]
    if absent:
        there = sorted({name for source in surveyed for name in source.obs_names})
        raise ScfmError(f"no source has an obs column {', '.join(absent)}; there are {', '.join(there)}")
    categories = {SOURCE_COLUMN: [source.label for source in surveyed]}
    for name in obs:
        categories[name] = sorted({label for source in surveyed for label in source.categories.get(name, ())})
    return categories


def _pour(
    surveyed: _Surveyed,
    buckets: Buckets,
    vocabulary: Vocabulary,
    table: GeneTable | None,
    value_kind: ValueKind,
    categories: dict[str, list[str]],
    advance: Callable[[int], None],
) -> SourceReport:
    """Read a source's cells into the buckets; leave out secondary copies and cells that express nothing."""
    kept = not_primary = empty = 0
    with H5adSource(surveyed.path, accept_normalised=value_kind == "normalised") as source:
        primary = source.primary()
        columns = {name: _codes(source, name, categories) for name in categories if name != SOURCE_COLUMN}
        columns[SOURCE_COLUMN] = np.full(source.n_cells, categories[SOURCE_COLUMN].index(surveyed.label))
        gene_of_column = source.gene_of_column(vocabulary, table)
        for first, block in source.cells(gene_of_column, value_kind):
            here = slice(first, first + block.n_cells)
            expressed = np.diff(block.offsets) > 0
            rows = np.flatnonzero(primary[here] & expressed)
            not_primary += int((~primary[here]).sum())
            empty += int((primary[here] & ~expressed).sum())
            kept += len(rows)
            if len(rows):
                whole = len(rows) == block.n_cells
                part = block if whole else take_cells(block, rows)
                buckets.add(part, {name: column[here][rows] for name, column in columns.items()})
            advance(block.n_cells)
        return SourceReport(
            file=surveyed.label,
            cells=source.n_cells,
            kept=kept,
            dropped={NOT_PRIMARY: not_primary, ALL_ZERO: empty},
            genes=len(source.var),
            genes_matched=int((gene_of_column >= 0).sum()),
            provenance=source.provenance(),
        )


def _codes(source: H5adSource, name: str, categories: dict[str, list[str]]) -> NDArray[np.int32]:
    """(n_cells,) codes of an obs column in the union of categories, -1 where the cell or the source has none."""
    column = source.obs(name)
    if column is None:
        return np.full(source.n_cells, -1, np.int32)
    code_of = {label: code for code, label in enumerate(categories[name])}
    # Code -1 picks the last entry: missing stays missing.
    return np.array([*(code_of[label] for label in column.categories), -1], np.int32)[column.codes]


def _why_empty(reports: list[SourceReport]) -> str:
    dropped = sum((Counter(report.dropped) for report in reports), Counter[str]())
    reasons = ", ".join(f"{dropped[reason]:,} {reason}" for reason in DROP_REASONS)
    return f"of {sum(report.cells for report in reports):,} cells in the sources: {reasons}"


def _refuse_taken(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ScfmError(f"{out}: holds something already; name another --out, or remove it first")


@contextmanager
def _new_directory(out: Path) -> Iterator[Path]:
    """Give a directory to write to, which takes its final name only when all went well."""
    building = out.with_name(f".{out.name}.building-{os.getpid()}")
    try:
        building.mkdir(parents=True)
        yield building
        os.replace(building, out)
    except BaseException as error:
        shutil.rmtree(building, ignore_errors=True)
        if isinstance(error, OSError):
            raise ScfmError(f"{out}: cannot be written ({error})") from error
        raise


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _print(report: PreparedReport) -> None:
    from rich.console import Console

    Console().print(report.table())
