"""The first pass over the values: a unit is some rows of one source, read, filtered and dealt to buckets on disk.

units/00007.arrow    an Arrow file with a batch per bucket
units/00007.npz      hash and place of each cell in the order of the source, sizes by bucket; written last
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scfm.data.building.chosen import read_chosen
from scfm.data.building.directory import written
from scfm.data.building.options import SOURCE_COLUMN
from scfm.data.building.plan import Plan, read_plan
from scfm.data.building.survey import ALL_ZERO, read_survey, refuse_changed, surveyed_rows
from scfm.data.expression import joined, take_cells
from scfm.data.hashing import profile_hashes
from scfm.data.opening import open_source
from scfm.data.shards import code_type
from scfm.data.store import CellBlock
from scfm.data.vocabulary import Vocabulary

FEW_GENES, FEW_COUNTS = "too few genes", "too few counts"
PLACE = "place"


@dataclass(frozen=True)
class UnitFacts:
    """What is known of a finished unit.

    Attributes:
        hashes: (n,) uint64 of the profiles, in the order of the source.
        places: (n,) int64 place of each cell among all cells of the store.
        n_genes: (n,) uint32 expressed genes of each cell.
        cells, tokens: (buckets,) int64 how much each bucket got.
        largest: the largest count, 0 where values are normalised.
        dropped: cells that were left out, by reason.
    """

    hashes: NDArray[np.uint64]
    places: NDArray[np.int64]
    n_genes: NDArray[np.uint32]
    cells: NDArray[np.int64]
    tokens: NDArray[np.int64]
    largest: int
    dropped: dict[str, int]


def unit_file(building: Path, number: int) -> Path:
    """Return the file of a unit's cells; that of its facts has the suffix .npz."""
    return building / f"units/{number:06d}.arrow"


def is_finished(building: Path, number: int) -> bool:
    """Say whether a unit needs no more work."""
    return unit_file(building, number).with_suffix(".npz").exists()


def read_facts(building: Path, number: int) -> UnitFacts:
    """Return what is known of a finished unit."""
    with np.load(unit_file(building, number).with_suffix(".npz")) as stored:
        reasons = [name for name in stored.files if name.startswith("dropped:")]
        return UnitFacts(
            hashes=stored["hashes"],
            places=stored["places"],
            n_genes=stored["n_genes"],
            cells=stored["cells"],
            tokens=stored["tokens"],
            largest=int(stored["largest"]),
            dropped={name.removeprefix("dropped:"): int(stored[name]) for name in reasons},
        )


def make_unit(building: str, number: int) -> int:
    """Read the cells of a unit, deal them to buckets, and return how many rows were read.

    Raises ScfmError where values cannot be used, or the source is not the one that was surveyed.
    """
    place = Path(building)
    plan = read_plan(place)
    which, first, last = plan.units[number]
    planned = plan.sources[which]
    chosen = read_chosen(place, which, planned.cells)
    entries = np.load(place / f"genes/{planned.gene_list}.npy")
    dropped = Counter({ALL_ZERO: 0})
    parts: list[CellBlock] = []
    rows: list[NDArray[np.int64]] = []
    with open_source(
        planned.spec, plan.value_kind == "normalised", plan.organism, plan.obs_value_filter, cache=place / "sources"
    ) as source:
        refuse_changed(source, planned.fingerprint)
        for start, block in source.cells(entries, plan.value_kind, first, last):
            here = chosen[start : start + block.n_cells].copy()
            for reason, fails in _failures(block, plan):
                dropped[reason] += int((here & fails).sum())
                here &= ~fails
            kept = np.flatnonzero(here)
            parts.append(block if len(kept) == block.n_cells else take_cells(block, kept))
            rows.append(start + kept)
        # what was read last may already be of another file
        refuse_changed(source, planned.fingerprint)
    whole, taken = joined(parts), np.concatenate(rows)
    parts.clear()

    places = _places(plan, which, place, chosen, taken)
    buckets = plan.buckets_of(places)
    codes = _codes(plan, which, place, taken)
    order = np.lexsort((places, buckets))
    cells = np.bincount(buckets, minlength=sum(plan.n_buckets))
    lengths = np.diff(whole.offsets)
    with written(unit_file(place, number)) as file:
        _write_buckets(file, whole, places, codes, plan, np.split(order, np.cumsum(cells)[:-1]))
    vocabulary = Vocabulary.load(place / "vocab.json")
    reasons: dict[str, Any] = {f"dropped:{reason}": np.int64(n) for reason, n in dropped.items()}
    with written(unit_file(place, number).with_suffix(".npz")) as file, file.open("wb") as stored:
        np.savez(
            stored,
            hashes=profile_hashes(whole.offsets, whole.genes, whole.values, vocabulary.gene_keys),
            places=places,
            n_genes=lengths.astype(np.uint32),
            cells=cells,
            tokens=np.bincount(buckets, weights=lengths, minlength=len(cells)).astype(np.int64),
            largest=0 if plan.value_kind == "normalised" else int(whole.values.max(initial=0)),
            **reasons,
        )
    return last - first


def _failures(block: CellBlock, plan: Plan) -> list[tuple[str, NDArray[np.bool_]]]:
    """Return for each reason to leave a cell out which cells it holds for."""
    n_genes = np.diff(block.offsets)
    failures = [(ALL_ZERO, n_genes == 0)]
    if plan.min_genes:
        failures.append((FEW_GENES, n_genes < plan.min_genes))
    if plan.min_counts:
        running = np.concatenate([[0], np.cumsum(block.values, dtype=np.int64)])
        failures.append((FEW_COUNTS, np.diff(running[block.offsets]) < plan.min_counts))
    return failures


def _places(
    plan: Plan, which: int, building: Path, chosen: NDArray[np.bool_], rows: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the places of some rows of a source, from the numbers that its chosen rows have."""
    held = _held_rows(plan, which, building, chosen)
    places = np.empty(len(rows), np.int64)
    for side, of_side in enumerate((chosen & ~held, held)):
        mine = of_side[rows]
        numbers = plan.sources[which].first[side] + np.cumsum(of_side)[rows[mine]] - 1
        places[mine] = plan.places_of(numbers, held=bool(side))
    return places


def _held_rows(plan: Plan, which: int, building: Path, chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(cells,) which rows of a source are chosen and held out."""
    if plan.held_out_by is None:
        return np.zeros_like(chosen)
    if plan.held_out_by == SOURCE_COLUMN:
        return chosen if plan.sources[which].label in plan.held_out else np.zeros_like(chosen)
    surveyed = read_survey(building, which)
    names = surveyed.categories.get(plan.held_out_by)
    if names is None:
        return np.zeros_like(chosen)
    _, codes = surveyed_rows(building, which, surveyed.cells)
    # code -1 picks the last entry: a cell of no known group is trained on
    return chosen & np.array([*(name in plan.held_out for name in names), False])[codes[plan.held_out_by]]


def _codes(plan: Plan, which: int, building: Path, rows: NDArray[np.int64]) -> dict[str, NDArray[np.integer]]:
    """Return the codes of some rows of a source in the union of categories, -1 for what is missing."""
    surveyed = read_survey(building, which)
    _, own = surveyed_rows(building, which, surveyed.cells)
    codes: dict[str, NDArray[np.integer]] = {}
    for name, categories in plan.categories.items():
        dtype = code_type(categories)
        if name == SOURCE_COLUMN:
            codes[name] = np.full(len(rows), which, dtype)
        elif name not in own:
            codes[name] = np.full(len(rows), -1, dtype)
        else:
            code_of = {label: code for code, label in enumerate(categories)}
            # Code -1 picks the last entry: missing stays missing.
            united = np.array([*(code_of[label] for label in surveyed.categories[name]), -1], dtype)
            codes[name] = united[own[name][rows]]
    return codes


def _write_buckets(
    file: Path,
    whole: CellBlock,
    places: NDArray[np.int64],
    codes: dict[str, NDArray[np.integer]],
    plan: Plan,
    buckets: list[NDArray[np.int64]],
) -> None:
    schema = pa.schema(
        [
            (PLACE, pa.int64()),
            ("genes", pa.list_(pa.from_numpy_dtype(whole.genes.dtype))),
            ("values", pa.list_(pa.from_numpy_dtype(whole.values.dtype))),
            *((name, pa.from_numpy_dtype(code_type(plan.categories[name]))) for name in codes),
        ]
    )
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as stream:
        for rows in buckets:
            part = take_cells(whole, rows)
            offsets = pa.array(part.offsets.astype(np.int32))
            lists = [pa.ListArray.from_arrays(offsets, pa.array(column)) for column in (part.genes, part.values)]
            others = [pa.array(column[rows]) for column in codes.values()]
            stream.write_batch(pa.record_batch([pa.array(places[rows]), *lists, *others], schema=schema))
