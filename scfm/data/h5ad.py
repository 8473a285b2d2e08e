"""Cells in h5ad files, read in blocks of rows; what the CELLxGENE schema (5, 6 and 7) adds to them is understood."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from scfm.data import sources
from scfm.data.cellxgene import full_length_assays
from scfm.data.genes import with_names_of
from scfm.data.inflating import read_span
from scfm.data.organisms import canonical_organism, spoken
from scfm.data.sources import NOT_PRIMARY, Source, expect_readable, fingerprint_of
from scfm.errors import ScfmError

if TYPE_CHECKING:
    import h5py

PROVENANCE = ("schema_version", "title", "citation", "dataset_id")
OTHER_ORGANISM, NOT_IN_TISSUE = "other organism", "not in tissue"


class H5adSource(Source):
    """An h5ad file, of which only the rows asked for are in memory; close it, or use it in a `with` statement.

    Args:
        path: the file.
        accept_normalised: whether values that are not counts may be used.
        organism: the organism whose cells and genes are wanted; None wants all of a file that is of one organism.
    """

    def __init__(self, path: Path, accept_normalised: bool = False, organism: str | None = None) -> None:
        import h5py

        self.label, self.accept_normalised, self.path = str(path), accept_normalised, path
        self.wanted_organism = None if organism is None else canonical_organism(organism)
        if not path.is_file():
            raise ScfmError(f"{path}: there is no such file")
        expect_readable(path)
        if not h5py.is_hdf5(path):
            raise ScfmError(f"{path}: not an h5ad file (it is not HDF5); write one with adata.write_h5ad(...)")
        with self._readable("the file"):
            self._file: h5py.File = h5py.File(path, "r")
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        import h5py
        from anndata.io import read_elem

        held = self._file.get("raw", self._file)
        self.place = "X" if held is self._file else "raw.X"
        missing = [name for name in ("obs", "var") if name not in self._file] + [self.place] * ("X" not in held)
        if missing:
            raise ScfmError(
                f"{self.label}: HDF5, but not an h5ad file: it has no {', '.join(missing)} (a Cell Ranger file is "
                "turned into one by scanpy.read_10x_h5(...).write_h5ad(...))"
            )
        self._matrix = held["X"]
        if isinstance(self._file["obs"], h5py.Dataset):
            raise ScfmError(
                f"{self.label}: written by an anndata before 0.7; read it with anndata.read_h5ad and write it again"
            )
        with self._readable("obs and var"):
            self.var = with_names_of(read_elem(held["var"]), read_elem(self._file["var"]))
            obs = self._file["obs"]
            # anndata 0.7 kept the names of categories apart; then a column cannot be read alone.
            self._obs = read_elem(obs) if "__categories" in obs else None
            self.obs_names = [str(name) for name in obs.attrs["column-order"]]
            self._cell_names = obs[obs.attrs["_index"]]
            self.n_cells = len(self._cell_names)
        self.layers = list(self._file.get("layers", ()))
        self._encoding = self._matrix.attrs.get("encoding-type", "array")
        if self._encoding in ("csr_matrix", "csc_matrix"):
            self._open_sparse()
        elif self._encoding == "array":
            self.n_values = self._matrix.size
            self._expect_shape(self._matrix.shape)
        else:
            raise ScfmError(f"{self.label}: {self.place} is stored as {self._encoding!r}; CSR, CSC and dense are known")

    def _open_sparse(self) -> None:
        self._expect_shape(tuple(self._matrix.attrs["shape"]))
        with self._readable(f"{self.place}/indptr"):
            self._indptr = self._matrix["indptr"][:].astype(np.int64)
        self.n_values = int(self._indptr[-1])
        lengths = {self.n_values, len(self._matrix["data"]), len(self._matrix["indices"])}
        majors = self.n_cells if self._encoding == "csr_matrix" else len(self.var)
        if (
            len(lengths) > 1
            or self._indptr[0] != 0
            or (np.diff(self._indptr) < 0).any()
            or len(self._indptr) != majors + 1
        ):
            raise ScfmError(
                f"{self.label}: {self.place} is damaged: its indptr does not fit its data; fetch the file again"
            )
        if self._encoding == "csc_matrix":
            self.values_per_block = sources.VALUES_PER_COLUMN_PASS

    def _expect_shape(self, shape: Sequence[int]) -> None:
        if tuple(shape) != (self.n_cells, len(self.var)):
            raise ScfmError(
                f"{self.label}: {self.place} is {' x '.join(map(str, shape))}, but obs and var tell of "
                f"{self.n_cells} cells and {len(self.var)} genes; the file is damaged"
            )

    def read(self, first: int, last: int) -> csr_matrix:
        shape = (last - first, len(self.var))
        with self._readable(f"{self.place}, cells {first} to {last - 1}"):
            if self._encoding == "array":
                return csr_matrix(self._matrix[first:last])
            if self._encoding == "csc_matrix":
                return self._read_columns(first, last)
            start, stop = self._indptr[first], self._indptr[last]
            values, columns = (read_span(self._matrix[name], start, stop) for name in ("data", "indices"))
        self._expect_below(columns, len(self.var))
        return csr_matrix((values, columns, self._indptr[first : last + 1] - start), shape)

    def _read_columns(self, first: int, last: int) -> csr_matrix:
        """Collect the values of some rows from a matrix that is stored by column: one pass over the whole matrix."""
        parts = []
        for start in range(0, self.n_values, sources.VALUES_PER_BLOCK):
            stop = min(start + sources.VALUES_PER_BLOCK, self.n_values)
            rows = self._matrix["indices"][start:stop]
            self._expect_below(rows, self.n_cells)
            inside = np.flatnonzero((rows >= first) & (rows < last))
            columns = np.searchsorted(self._indptr, start + inside, side="right") - 1
            parts.append((self._matrix["data"][start:stop][inside], rows[inside] - first, columns))
        if not parts:
            return csr_matrix((last - first, len(self.var)), dtype=np.float32)
        values, rows, columns = (np.concatenate(part) for part in zip(*parts, strict=True))
        return csr_matrix((values, (rows, columns)), (last - first, len(self.var)))

    def _expect_below(self, indices: NDArray, size: int) -> None:
        if len(indices) and not 0 <= indices.min() <= indices.max() < size:
            raise ScfmError(
                f"{self.label}: {self.place} is damaged: an index is not below {size}; fetch the file again"
            )

    def read_obs(self, name: str) -> pd.Series:
        from anndata.io import read_elem

        with self._readable(f"obs column {name!r}"):
            return pd.Series(read_elem(self._file["obs"][name])) if self._obs is None else self._obs[name]

    def fingerprint(self) -> dict[str, Any]:
        return fingerprint_of(self.label, self.path)

    @cached_property
    def _organism_of_cell(self) -> tuple[NDArray[np.integer] | None, list[str]]:
        """Codes of the cells and what they mean; None and one organism where uns has it (schema 6), not obs (5)."""
        named = self._uns("organism_ontology_term_id") or self._uns("organism")
        if named:
            return None, [canonical_organism(named)]
        for name in ("organism_ontology_term_id", "organism"):
            column = self.obs(name)
            if column is not None:
                return np.asarray(column.codes), [canonical_organism(label) for label in column.categories]
        return None, []

    def organisms(self) -> list[str]:
        return self._organism_of_cell[1]

    def unwanted(self) -> dict[str, NDArray[np.bool_]]:
        """Return the cells to leave out: copies of others, those of another organism, and spots outside the tissue.

        Raises ScfmError where the cells are of several organisms, and none is asked for.
        """
        codes, organisms = self._organism_of_cell
        reasons = {NOT_PRIMARY: ~self.primary()}
        if self.wanted_organism is not None and organisms:
            # Code -1 picks the last entry: a cell of no known organism is none of the organism.
            is_other = np.array([organism != self.wanted_organism for organism in organisms] + [True])
            of_cell = np.zeros(self.n_cells, np.int64) if codes is None else codes
            reasons[OTHER_ORGANISM] = is_other[of_cell]
        elif codes is not None and len(organisms) > 1:
            cells = ", ".join(f"{spoken(o)}: {(codes == code).sum():,}" for code, o in enumerate(organisms))
            raise ScfmError(f"{self.label}: holds cells of several organisms ({cells}); choose one with --organism")
        if "in_tissue" in self.obs_names:
            reasons[NOT_IN_TISSUE] = (self.read_obs("in_tissue").astype(float) == 0).to_numpy()
        return reasons

    def provenance(self) -> dict[str, Any]:
        """Return what `uns` says of the origin by the CELLxGENE schema, the organisms, and the full-length assays."""
        said: dict[str, Any] = {key: value for key in PROVENANCE if (value := self._uns(key)) is not None}
        if self.organisms():
            said["organisms"] = self.organisms()
        assays = full_length_assays(self.obs("assay_ontology_term_id"))
        return said | ({"full_length_assays": assays} if assays else {})

    def _uns(self, key: str) -> str | None:
        from anndata.io import read_elem

        uns = self._file.get("uns", {})
        with self._readable(f"uns[{key!r}]"):
            return str(read_elem(uns[key])) if key in uns else None

    def cell_name(self, row: int) -> str:
        name = self._cell_names[row]
        return name.decode() if isinstance(name, bytes) else str(name)

    @contextmanager
    def _readable(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, KeyError) as error:
            raise ScfmError(
                f"{self.label}: {what} cannot be read; the file is truncated or damaged ({error}); fetch it again"
            ) from error

    def close(self) -> None:
        self._file.close()
