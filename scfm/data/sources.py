"""Where cells come from: what every kind of source has in common, and AnnData objects in memory.

Raw counts stand where the CELLxGENE schema puts them: in `raw.X`, else in `X`. Every value is checked, not a sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, issparse

from scfm.data.expression import Fault, find_faults, joined, to_vocabulary
from scfm.data.genes import genes_of, with_names_of
from scfm.data.store import CellBlock, CellStore, ObsColumn, ValueKind
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.errors import ScfmError

if TYPE_CHECKING:
    from anndata import AnnData

    from scfm.data.gene_table import GeneTable

VALUES_PER_BLOCK = 2**22
VALUES_PER_COLUMN_PASS = 2**24
NOT_PRIMARY = "not primary"
LOG_NORMALISED_BELOW = 25  # log1p of counts per 10,000 ends at 9.2, log2 of counts per million at 20


class Source(ABC):
    """Cells of one origin, with their genes and obs columns.

    Attributes:
        label: what messages call the source.
        place: where its values stand: `raw.X` or `X`.
        n_cells: number of cells.
        n_values: number of stored values.
        var: one row per column of the matrix, with every column that may name genes.
        obs_names: the obs columns there are.
        layers: names of other matrices, for advice.
        accept_normalised: whether values that are not counts may be used.
        wanted_organism: the organism whose cells and genes are wanted, None for any.
    """

    label: str
    place: str
    n_cells: int
    n_values: int
    var: pd.DataFrame
    obs_names: list[str]
    layers: list[str]
    accept_normalised: bool
    wanted_organism: str | None = None
    values_per_block = VALUES_PER_BLOCK

    @abstractmethod
    def read(self, first: int, last: int) -> csr_matrix:
        """Return the stored values of rows first to last - 1."""

    @abstractmethod
    def read_obs(self, name: str) -> pd.Series:
        """Return an obs column as it is stored."""

    @abstractmethod
    def cell_name(self, row: int) -> str:
        """Return the obs name of a row."""

    @cached_property
    def genes(self) -> tuple[list[str | None], list[str | None]]:
        """Ensembl id and symbol of each column, None where unknown."""
        organisms = self.organisms() if self.wanted_organism is None else [self.wanted_organism]
        return genes_of(self.var, organisms[0] if len(organisms) == 1 else None)

    def organisms(self) -> list[str]:
        """Return the organisms its cells are of, by canonical name; none where the source does not say."""
        return []

    def gene_list(self) -> list[Gene]:
        """Return the genes of the columns that have a name."""
        return named_genes(self.genes)

    def gene_of_column(self, vocabulary: Vocabulary, table: GeneTable | None = None) -> NDArray[np.int32]:
        """Return the vocabulary id of each column, -1 for unknown genes. Raises ScfmError where no gene is known."""
        return matched_genes(self.label, self.genes, vocabulary, table)

    @cached_property
    def value_kind(self) -> ValueKind:
        """Counts, or normalised where that is accepted and any value is no count (a pass over the values tells)."""
        if self.accept_normalised and any(find_faults(block.data) for _, block in self.blocks()):
            return "normalised"
        return "counts"

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells that the source is another than before: nothing for one that lives in memory."""
        return {}

    def provenance(self) -> dict[str, Any]:
        """Return what the source says of its origin."""
        return {}

    def close(self) -> None:
        """Let go of files. Nothing is open where cells are in memory."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def cells(
        self, gene_of_column: NDArray[np.int32], value_kind: ValueKind, first: int = 0, last: int | None = None
    ) -> Iterator[tuple[int, CellBlock]]:
        """Yield (first row, cells by vocabulary id) block by block, from row `first` to `last` - 1.

        Every row is there, if only as an empty cell. Raises ScfmError for values that cannot be used.
        """
        for start, block in self.blocks(first, last):
            try:
                yield start, to_vocabulary(block, gene_of_column, value_kind)
            except ScfmError as error:
                raise ScfmError(f"{self.label}: {error}") from error

    def blocks(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, csr_matrix]]:
        """Yield (first row, values of the rows), of about `values_per_block` values, from row `first` to `last` - 1.

        Raises ScfmError for values that are not finite or negative, and, unless normalised values are accepted, for
        any that is not a whole number.
        """
        values_per_cell = max(1, self.n_values // max(1, self.n_cells))
        rows = max(1, self.values_per_block // values_per_cell)
        end = self.n_cells if last is None else last
        spans = [(start, min(start + rows, end)) for start in range(first, end, rows)]
        # HDF5 inflates without holding the GIL, so the next block is read while this one is worked on.
        with ThreadPoolExecutor(max_workers=1) as reader:
            ahead = [reader.submit(self.read, *span) for span in spans[:1]]
            for i, (start, _) in enumerate(spans):
                block = ahead.pop().result()
                ahead += [reader.submit(self.read, *span) for span in spans[i + 1 : i + 2]]
                self._check(block, start)
                yield start, block

    def obs(self, name: str) -> ObsColumn | None:
        """Return an obs column as codes and categories, None where the source has none of that name.

        Raises ScfmError for a column of real numbers.
        """
        if name not in self.obs_names:
            return None
        column = self.read_obs(name)
        if pd.api.types.is_float_dtype(column.dtype) and column.notna().any():
            raise ScfmError(
                f"{self.label}: obs column {name!r} holds real numbers; only categories can be carried along"
            )
        category = column.astype("category").cat.remove_unused_categories().cat
        return ObsColumn(category.codes.to_numpy(), [str(value) for value in category.categories])

    def primary(self) -> NDArray[np.bool_]:
        """(n_cells,) False where `is_primary_data` is: the cell stands in another data set too."""
        if "is_primary_data" not in self.obs_names:
            return np.ones(self.n_cells, bool)
        return (self.read_obs("is_primary_data").astype(str).str.lower() != "false").to_numpy()

    def unwanted(self) -> dict[str, NDArray[np.bool_]]:
        """Return the cells (n_cells,) that a build leaves out unasked, by reason; a cell may have several."""
        return {NOT_PRIMARY: ~self.primary()}

    def _check(self, block: csr_matrix, first: int) -> None:
        for fault, at in find_faults(block.data).items():
            if self.accept_normalised and fault in (Fault.FRACTION, Fault.TOO_LARGE):
                continue
            row = first + int(np.searchsorted(block.indptr, at, side="right")) - 1
            gene = self.var.index[block.indices[at]]
            held = f"{self.place} holds {block.data[at]:.4g} for gene {gene} in cell {self.cell_name(row)}"
            raise ScfmError(f"{self.label}: {held}{self._advice(fault, block.data.min(), block.data.max())}")

    def _advice(self, fault: Fault, smallest: float, largest: float) -> str:
        place = "Put the raw counts into raw.X or X"
        if self.layers:
            place += f" (layers here: {', '.join(self.layers)})"
        if fault is Fault.NOT_FINITE:
            return "; values must be finite. Cells without any count become NaN when divided by their total: drop them"
        if fault is Fault.TOO_LARGE:
            return "; no raw count is that large"
        if fault is Fault.NEGATIVE:
            return (
                f"; negative values mean that the data are scaled (z-scores) or batch-corrected ({smallest:.4g} to "
                f"{largest:.4g} here). They cannot be used, also not with --accept-normalised. {place}"
            )
        looks = "log-normalised" if largest < LOG_NORMALISED_BELOW else "normalised, but not log-transformed"
        return (
            f", but raw counts are whole numbers. The values look {looks} (fractions, the largest {largest:.4g} here). "
            f"{place}, or pass --accept-normalised (in Python accept_normalised=True): binned "
            "values keep only the order of the genes within a cell"
        )


def expect_readable(path: Path) -> None:
    """Raise ScfmError where a file may not be read."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise ScfmError(f"{path}: may not be read ({error.strerror}); ask its owner, or copy it") from error


def fingerprint_of(label: str, path: Path, parts: Sequence[Path] = ()) -> dict[str, Any]:
    """Return path, size and time of last change of a file, or of the parts of a folder together.

    Raises ScfmError where one is no longer there.
    """
    try:
        now = [part.stat() for part in parts or [path]]
    except OSError as error:
        raise ScfmError(f"{label}: cannot be found any more ({error})") from error
    size, changed = sum(file.st_size for file in now), max(file.st_mtime_ns for file in now)
    return {"path": str(path.resolve()), "size": size, "mtime_ns": changed}


def named_genes(genes: tuple[Sequence[str | None], Sequence[str | None]]) -> list[Gene]:
    """Return the genes that have a name, from the Ensembl id and the symbol of each column."""
    return [Gene.of(*names) for names in zip(*genes, strict=True) if any(names)]


def matched_genes(
    label: str,
    genes: tuple[Sequence[str | None], Sequence[str | None]],
    vocabulary: Vocabulary,
    table: GeneTable | None,
) -> NDArray[np.int32]:
    """Return the vocabulary id of each column of a source, -1 for unknown genes.

    Args:
        label: what the message calls the source.
        genes: Ensembl id and symbol of each column.
        vocabulary: the genes to find.
        table: names that mean the same gene.

    Raises ScfmError where no gene is known.
    """
    matched = vocabulary.match(*genes, table)
    if not (matched >= 0).any():
        seen = ", ".join(map(_spelled, named_genes(genes)[:5])) or "no names at all"
        expected = ", ".join(map(_spelled, vocabulary.entries[: min(5, vocabulary.n_genes)]))
        raise ScfmError(
            f"{label}: none of its {len(matched):,} genes is in the vocabulary. Seen: {seen} ... "
            f"Expected: {expected} ... Check the organism, and that var holds Ensembl ids or gene symbols"
        )
    return matched


def _spelled(gene: Gene) -> str:
    return f"{gene.ensembl} ({gene.symbol})" if gene.ensembl and gene.symbol else gene.id


class AnnDataSource(Source):
    """An AnnData in memory (or backed), which is only read."""

    def __init__(self, adata: AnnData, accept_normalised: bool = False, label: str = "the AnnData") -> None:
        self.label, self.accept_normalised = label, accept_normalised
        held = adata if adata.raw is None else adata.raw
        self.place = "X" if adata.raw is None else "raw.X"
        if held.X is None:
            raise ScfmError(f"{label}: has no X; expression values are needed")
        self._adata = adata
        # Rows of a CSC matrix are dear to cut out, so it is turned once.
        self._matrix = held.X.tocsr() if issparse(held.X) else held.X
        self.n_cells = adata.n_obs
        self.n_values = self._matrix.nnz if issparse(self._matrix) else self.n_cells * held.n_vars
        self.var = with_names_of(held.var, adata.var)
        self.obs_names, self.layers = list(adata.obs.columns), list(adata.layers)

    def read(self, first: int, last: int) -> csr_matrix:
        return csr_matrix(self._matrix[first:last])

    def read_obs(self, name: str) -> pd.Series:
        return self._adata.obs[name]

    def cell_name(self, row: int) -> str:
        return str(self._adata.obs_names[row])


def store_from_anndata(
    adata: AnnData,
    vocabulary: Vocabulary,
    accept_normalised: bool = False,
    obs_columns: Sequence[str] = (),
    genes: GeneTable | None = None,
) -> CellStore:
    """Return an AnnData's cells as a store in memory, genes matched with the help of a table; it is not changed.

    Every cell keeps its row, one without any expressed gene of the vocabulary as an empty one. Raises ScfmError as
    reading an h5ad file does, and for an obs column that is not there.
    """
    source = AnnDataSource(adata, accept_normalised)
    absent = [name for name in obs_columns if name not in source.obs_names]
    if absent:
        raise ScfmError(f"{source.label} has no obs column {', '.join(absent)}; it has {', '.join(source.obs_names)}")
    parts = [block for _, block in source.cells(source.gene_of_column(vocabulary, genes), source.value_kind)]
    return CellStore(
        vocabulary=vocabulary,
        value_kind=source.value_kind,
        blocks=[joined(parts)] if parts else [],
        obs={name: column for name in obs_columns if (column := source.obs(name)) is not None},
        cell_names=adata.obs_names.to_numpy(),
    )
