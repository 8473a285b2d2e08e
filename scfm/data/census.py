"""Cells of the CELLxGENE Census, read from its SOMA in blocks: a release on S3, or one with its layout on a disk.

A value filter chooses the cells, as `cellxgene_census.get_anndata` takes it; they are in the order of their
`soma_joinid`. Each of their data sets is named in the provenance, with its citation and its number of cells.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from scfm.data.cellxgene import full_length_assays
from scfm.data.organisms import TAXA, canonical_organism
from scfm.data.sources import VALUES_PER_BLOCK, Source
from scfm.errors import ScfmError

if TYPE_CHECKING:
    import pyarrow as pa

SCHEME = "census:"
VERSION = re.compile(r"stable|latest|\d{4}-\d{2}-\d{2}")
# TileDB asks for a buffer of this size for each column that is read, and at most so much to unpack tiles in.
MEMORY = {"soma.init_buffer_bytes": 64 * 2**20, "sm.mem.total_budget": 2**30}
ABOUT_DATASETS = {"dataset_title": "title", "citation": "citation", "dataset_version_id": "version"}


def census_place(spec: str) -> str:
    """Return the version or the uri that `census:...` names, a path as an absolute one.

    Raises ScfmError for a path at which there is nothing.
    """
    place = spec.removeprefix(SCHEME)
    if VERSION.fullmatch(place) or "://" in place:
        return place
    if not place or not Path(place).is_dir():
        raise ScfmError(
            f"{spec}: no Census: neither a version (stable, latest, or a date such as 2025-11-08), nor a uri such as "
            "s3://..., nor a folder"
        )
    return str(Path(place).resolve())


class CensusSource(Source):
    """Some cells of a Census, of which only the rows asked for are in memory; use it in a `with` statement.

    Args:
        spec: `census:` and a version, a uri or a folder.
        accept_normalised: as for any source; the Census holds counts.
        organism: whose experiment is read, by Latin name or taxon id.
        obs_value_filter: condition on obs, "tissue == 'lung' and is_primary_data == True"; None takes all cells.
        cache: existing folder where the joinids of the chosen cells are kept, and looked for.

    Raises:
        ScfmError: there is no such Census or organism, the filter cannot be read or chooses no cell, or packages lack.
    """

    place = "X/raw"
    # As coordinates and values, a block takes about twice what it does as rows of an h5ad file.
    values_per_block = VALUES_PER_BLOCK // 2

    def __init__(
        self,
        spec: str,
        accept_normalised: bool = False,
        organism: str = "Homo sapiens",
        obs_value_filter: str | None = None,
        cache: Path | None = None,
    ) -> None:
        self.label, self.accept_normalised, self.layers = spec, accept_normalised, []
        self.obs_value_filter = obs_value_filter
        self.wanted_organism = canonical_organism(organism)
        with self._readable("the Census"):
            self._census = _open(census_place(spec))
        try:
            self._open_experiment()
            with self._readable(f"cells where {obs_value_filter}" if obs_value_filter else "obs"):
                self._joinids, self.n_values = self._chosen(cache)
        except BaseException:
            self.close()
            raise
        self.n_cells = len(self._joinids)
        if not self.n_cells:
            self.close()
            raise ScfmError(f"{spec}: no cell of {organism} passes the filter {obs_value_filter!r}; check its spelling")

    def _open_experiment(self) -> None:
        with self._readable("census_info and census_data"):
            data, key = self._census["census_data"], _key_of(self.wanted_organism)
            if key not in data:
                there = ", ".join(sorted(data.keys()))
                raise ScfmError(f"{self.label}: there is no organism {key} in census_data; there are {there}")
            self._obs, rna = data[key].obs, data[key].ms["RNA"]
            self._x = rna.X["raw"]
            var = rna.var.read().concat().to_pandas().sort_values("soma_joinid")
            self.obs_names = [name for name in self._obs.schema.names if not name.startswith("soma_")]
            self._about = self._read_about()
            self._cells_in_all = self._obs.count
        if not np.array_equal(var["soma_joinid"], np.arange(len(var))):
            raise ScfmError(
                f"{self.label}: the joinids of its genes are not 0, 1, 2 ...; it has not the Census's layout"
            )
        self.var = var.set_index("feature_id", drop=False)

    def _read_about(self) -> dict[str, str]:
        """Return version and dates as `census_info` has them; a SOMA of one's own need not have any."""
        if "census_info" not in self._census or "summary" not in self._census["census_info"]:
            return {}
        summary = self._census["census_info"]["summary"].read().concat().to_pandas()
        said = dict(zip(summary["label"].astype(str), summary["value"].astype(str), strict=True))
        names = ("census_schema_version", "census_build_date", "dataset_schema_version")
        return {name: said[name] for name in names if name in said}

    def _chosen(self, cache: Path | None) -> tuple[NDArray[np.int64], int]:
        """Return the joinids of the chosen cells, ascending, and how many values they have together."""
        asked = [self._census.uri, self._about, self.wanted_organism, self.obs_value_filter, self._cells_in_all]
        name = "census-" + hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
        if cache is not None and (cache / f"{name}.json").exists():
            values = json.loads((cache / f"{name}.json").read_text())["values"]
            return np.load(cache / f"{name}.npy", mmap_mode="r"), values
        counted = [name for name in ("nnz",) if name in self.obs_names]
        parts, values = [], 0
        for table in self._read_rows(counted):
            parts.append(table["soma_joinid"].to_numpy())
            values += int(table["nnz"].to_numpy().sum()) if counted else 0
        joinids = np.sort(np.concatenate([np.empty(0, np.int64), *parts]))
        if not counted:
            values = int(self._x.nnz * len(joinids) / max(1, self._cells_in_all))
        if cache is not None:
            for suffix, content in ((".npy", joinids), (".json", {"values": values})):
                part = cache / f".{name}.{os.getpid()}{suffix}"
                if isinstance(content, dict):
                    part.write_text(json.dumps(content))
                else:
                    np.save(part, content)
                os.replace(part, cache / f"{name}{suffix}")
        return joinids, values

    def _read_rows(self, columns: list[str]) -> Iterator[pa.Table]:
        chosen = {} if self.obs_value_filter is None else {"value_filter": self.obs_value_filter}
        yield from self._obs.read(column_names=["soma_joinid", *columns], **chosen)

    def read(self, first: int, last: int) -> csr_matrix:
        joinids = np.asarray(self._joinids[first:last])
        shape = (last - first, len(self.var))
        if not len(joinids):
            return csr_matrix(shape, dtype=np.float32)
        # one range is much cheaper to ask for than many points
        in_a_row = int(joinids[-1] - joinids[0]) + 1 == len(joinids)
        wanted = slice(int(joinids[0]), int(joinids[-1])) if in_a_row else joinids
        parts: list[tuple[NDArray, NDArray, NDArray]] = []
        with self._readable(f"the values of cells {joinids[0]} to {joinids[-1]}"):
            for table in self._x.read((wanted, slice(None))).tables():
                rows = np.searchsorted(joinids, table["soma_dim_0"].to_numpy()).astype(np.int32)
                columns = table["soma_dim_1"].to_numpy().astype(np.int32)
                parts.append((table["soma_data"].to_numpy(), rows, columns))
        if not parts:
            return csr_matrix(shape, dtype=np.float32)
        values, rows, columns = (np.concatenate(part) for part in zip(*parts, strict=True))
        return csr_matrix((values, (rows, columns)), shape)

    def read_obs(self, name: str) -> pd.Series:
        import pyarrow as pa

        with self._readable(f"obs column {name!r}"):
            table = pa.concat_tables(self._read_rows([name])).unify_dictionaries()
        joinids = table["soma_joinid"].to_numpy()
        order = np.argsort(joinids)
        if not np.array_equal(joinids[order], self._joinids):
            raise ScfmError(f"{self.label}: obs column {name!r} has other cells than before; the Census has changed")
        return table[name].to_pandas().iloc[order].reset_index(drop=True)

    def cell_name(self, row: int) -> str:
        return f"soma_joinid {self._joinids[row]}"

    def organisms(self) -> list[str]:
        return [str(self.wanted_organism)]

    def fingerprint(self) -> dict[str, Any]:
        return {
            "uri": self._census.uri,
            **self._about,
            "organism": self.wanted_organism,
            "obs_value_filter": self.obs_value_filter,
            "cells": self.n_cells,
            "values": self.n_values,
        }

    def provenance(self) -> dict[str, Any]:
        """Return the release, what was asked of it, assays to heed, and the data sets with their numbers of cells."""
        said: dict[str, Any] = {
            **self._about,
            "organisms": self.organisms(),
            "obs_value_filter": self.obs_value_filter,
            "cells_without_filter": self._cells_in_all,
            "datasets": self._datasets(),
        }
        assays = full_length_assays(self.obs("assay_ontology_term_id"))
        return said | ({"full_length_assays": assays} if assays else {})

    def _datasets(self) -> dict[str, dict[str, Any]]:
        column = self.obs("dataset_id")
        if column is None:
            return {}
        codes = np.asarray(column.codes)
        cells = np.bincount(codes[codes >= 0], minlength=len(column.categories))
        found: dict[str, dict[str, Any]] = {
            name: {"cells": int(n)} for name, n in zip(column.categories, cells, strict=True)
        }
        if "census_info" in self._census and "datasets" in self._census["census_info"]:
            with self._readable("census_info/datasets"):
                table = self._census["census_info"]["datasets"].read().concat().to_pandas()
            for row in table[table["dataset_id"].astype(str).isin(list(found))].to_dict("records"):
                said = {name: str(row[key]) for key, name in ABOUT_DATASETS.items() if key in row}
                found[str(row["dataset_id"])].update(said)
        return found

    @contextmanager
    def _readable(self, what: str) -> Iterator[None]:
        try:
            yield
        except ScfmError:
            raise
        except ImportError as error:
            raise ScfmError(
                f"{self.label}: the Census is read with tiledbsoma and cellxgene-census, which are not installed: "
                f"pip install 'scfm[census]' ({error})"
            ) from error
        except Exception as error:  # TileDB raises RuntimeError, SOMAError, KeyError and more, as its versions go
            raise ScfmError(f"{self.label}: {what} cannot be read: {error}") from error

    def close(self) -> None:
        self._census.close()


def _key_of(organism: str | None) -> str:
    return TAXA.get(organism or "", organism or "").lower().replace(" ", "_")


def _open(place: str) -> Any:
    import cellxgene_census

    chosen: dict[str, Any] = {"census_version": place} if VERSION.fullmatch(place) else {"uri": place}
    return cellxgene_census.open_soma(**chosen, tiledb_config=MEMORY)
