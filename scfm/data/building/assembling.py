"""The second pass: every bucket is collected from all units, put in order and written as a shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scfm.compiled import compiled
from scfm.data.building.directory import read_json, write_json, written
from scfm.data.building.duplicates import read_duplicates
from scfm.data.building.plan import Plan, read_plan
from scfm.data.building.units import PLACE, UnitFacts, unit_file
from scfm.data.shards import write_shard
from scfm.data.store import CellBlock

TALLY = "tally.npy"


def write_tally(building: Path, facts: list[UnitFacts]) -> None:
    """Write how many cells each bucket got from each unit, so that a shard need not ask all units."""
    with written(building / TALLY) as file, file.open("wb") as stored:
        np.save(stored, np.array([unit.cells for unit in facts], np.int32))


def shards_of(building: Path, plan: Plan) -> list[int]:
    """Return the bucket of each shard: those buckets in which any cell is left."""
    cells = np.load(building / TALLY).sum(axis=0, dtype=np.int64)
    lost = np.bincount(plan.buckets_of(read_duplicates(building).places), minlength=len(cells))
    return np.flatnonzero(cells > lost).tolist()


def sidecar(building: Path, shard: int) -> Path:
    """Return the file that says that a shard is finished, and what the manifest is to say of it."""
    return building / f"shard-{shard:05d}.json"


def make_shard(building: str, shard: int, bucket: int) -> int:
    """Write the cells of a bucket as a shard, and return how many they are.

    Units are mapped, one at a time for their values, so that only the shard itself is held in memory.
    """
    place = Path(building)
    plan = read_plan(place)
    units = np.flatnonzero(np.load(place / TALLY, mmap_mode="r")[:, bucket]).tolist()
    dropped = read_duplicates(place).places
    parts = [_Part.of(unit_file(place, unit), bucket, list(plan.categories), dropped) for unit in units]

    places = np.concatenate([part.places for part in parts])
    order = np.argsort(places)
    row_of = np.empty(len(order), np.int64)
    row_of[order] = np.arange(len(order))
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in parts])[order])]).astype(np.int64)
    genes = np.empty(offsets[-1], np.result_type(*(part.types[0] for part in parts)))
    values = np.empty(offsets[-1], np.result_type(*(part.types[1] for part in parts)))
    first = 0
    for unit, part in zip(units, parts, strict=True):
        batch = _batch(unit_file(place, unit), bucket)
        held = [batch.column(name) for name in ("genes", "values")]
        starts = held[0].offsets.to_numpy()[:-1][part.rows]
        columns = [column.values.to_numpy() for column in held]
        _pour(starts, offsets, row_of[first : first + len(part.rows)], *columns, genes, values)
        first += len(part.rows)
    codes = {name: np.concatenate([part.codes[name] for part in parts])[order] for name in plan.categories}

    file = f"shards/{shard:05d}.arrow"
    with written(place / "out" / file) as temporary:
        said = write_shard(temporary, CellBlock(offsets, genes, values), codes, plan.categories, plan.codec)
    write_json(sidecar(place, shard), {"file": file, **said})
    return len(order)


def read_sidecar(building: Path, shard: int) -> dict[str, Any]:
    """Return what the manifest is to say of a finished shard."""
    return dict(read_json(sidecar(building, shard)))


class _Part:
    """What one unit gives to a shard, but for the genes and values themselves.

    Attributes:
        rows: rows of the batch that stay.
        places: their places in the store.
        lengths: how many genes they express.
        codes: of each obs column.
        types: of genes and values.
    """

    def __init__(self, batch: pa.RecordBatch, obs: list[str], dropped: NDArray[np.int64]) -> None:
        places = batch.column(PLACE).to_numpy()
        at = np.searchsorted(dropped, places)
        copies = np.append(dropped, -1)[at] == places if len(dropped) else np.zeros(len(places), bool)
        self.rows = np.flatnonzero(~copies)
        self.places = places[self.rows]
        self.lengths = np.diff(batch.column("genes").offsets.to_numpy())[self.rows]
        self.codes = {name: batch.column(name).to_numpy()[self.rows] for name in obs}
        self.types = [batch.column(name).values.to_numpy().dtype for name in ("genes", "values")]

    @classmethod
    def of(cls, file: Path, bucket: int, obs: list[str], dropped: NDArray[np.int64]) -> _Part:
        """Read a unit's part of a bucket."""
        return cls(_batch(file, bucket), obs, dropped)


def _batch(file: Path, bucket: int) -> pa.RecordBatch:
    return pa.ipc.open_file(pa.memory_map(str(file))).get_batch(bucket)


@compiled
def _pour(
    starts: NDArray,
    offsets: NDArray[np.int64],
    rows: NDArray[np.int64],
    genes: NDArray,
    values: NDArray,
    genes_out: NDArray,
    values_out: NDArray,
) -> None:
    for i in range(len(rows)):
        start, to, end = starts[i], offsets[rows[i]], offsets[rows[i] + 1]
        for at in range(end - to):
            genes_out[to + at] = genes[start + at]
            values_out[to + at] = values[start + at]
