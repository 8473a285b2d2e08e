"""The first look at the sources: what each holds, which of its rows are wanted, and what it calls its genes.

A source is surveyed by itself, in any process; what was found lies in the building directory.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scfm.data.building.directory import read_json, write_json, written
from scfm.data.building.options import SOURCE_COLUMN, BuildOptions
from scfm.data.opening import open_source
from scfm.data.random import permuted, stream
from scfm.data.sources import NOT_PRIMARY, Source
from scfm.data.store import ObsColumn, ValueKind
from scfm.errors import ScfmError

ALL_ZERO = "no expressed gene"
ORIGINS = ("donor_id", "dataset_id")
OVER_CAP, NOT_DRAWN = "over the cap", "not drawn"
CAP, SUBSAMPLE, HELD_OUT, DEALING = range(32, 36)
"""What a stream of draws is for, besides the purposes of `scfm.data.random`."""


@dataclass(frozen=True)
class Surveyed:
    """What is known of a source after one look.

    Attributes:
        spec: how it was named.
        label: what the shards call it.
        fingerprint: what it is known again by.
        cells: cells it holds.
        values: stored values.
        values_per_block: values that are read in one piece.
        value_kind: counts, or normalised.
        kept: cells that are wanted, as far as the source alone can tell.
        dropped: the others, by reason.
        obs_names: its obs columns.
        categories: of each column that is asked for and there.
        heard: values named in conditions that it has, by column.
        gene_list: name of the file that holds the names of its genes.
        genes: columns of its matrix.
        organisms: what its cells are of, as far as it says.
        provenance: what it says of its origin.
        origins: the donors and data sets that its wanted cells name, by obs column.
    """

    spec: str
    label: str
    fingerprint: dict[str, Any]
    cells: int
    values: int
    values_per_block: int
    value_kind: ValueKind
    kept: int
    dropped: dict[str, int]
    obs_names: list[str]
    categories: dict[str, list[str]]
    heard: dict[str, list[str]]
    gene_list: str
    genes: int
    organisms: list[str]
    provenance: dict[str, Any]
    origins: dict[str, list[str]]


def labels_of(specs: Sequence[str]) -> list[str]:
    """Return what the shards call each source: its file's name, or all of its path where two names are the same."""
    names = Counter(Path(spec).name for spec in specs)
    return [Path(spec).name if names[Path(spec).name] == 1 else spec for spec in specs]


def survey_source(building: str, number: int, spec: str, label: str, options: BuildOptions) -> None:
    """Look at one source, and write what it holds to `survey/`, its gene names to `genes/`.

    Raises ScfmError where the source, or an obs column that is asked for, is unusable.
    """
    place = Path(building)
    done = place / f"survey/{number:05d}.json"
    if done.exists():
        return
    with open_source(
        spec, options.accept_normalised, options.organism, options.obs_value_filter, cache=place / "sources"
    ) as source:
        fingerprint = source.fingerprint()
        names = {*options.carried, *([options.stratify] if options.stratify else [])} - {SOURCE_COLUMN}
        columns = {name: column for name in sorted(names) if (column := source.obs(name)) is not None}
        kept, dropped, heard = _kept(source, spec, options)
        if kept.any() and not source.gene_list():
            raise ScfmError(f"{spec}: neither var nor its index names a gene; give Ensembl ids or gene symbols")
        if options.max_cells_per_source is not None:
            key = np.uint64(stream(options.seed, 0, number, CAP))
            kept, n = drawn(kept, options.max_cells_per_source, key)
            dropped |= {OVER_CAP: n} if n else {}
        with written(place / f"survey/{number:05d}.npz") as file, file.open("wb") as stored:
            arrays: dict[str, Any] = {f"obs:{name}": column.codes for name, column in columns.items()}
            np.savez(stored, kept=np.packbits(kept), **arrays)
        surveyed = Surveyed(
            spec=spec,
            label=label,
            fingerprint=fingerprint,
            cells=source.n_cells,
            values=source.n_values,
            values_per_block=source.values_per_block,
            value_kind=source.value_kind,
            kept=int(kept.sum()),
            dropped=dropped,
            obs_names=source.obs_names,
            categories={name: column.categories for name, column in columns.items()},
            heard=heard,
            gene_list=_store_gene_list(place, source),
            genes=len(source.var),
            organisms=source.organisms(),
            provenance=source.provenance(),
            origins=_origins(source, kept),
        )
        refuse_changed(source, fingerprint)
    write_json(done, asdict(surveyed))


def read_survey(building: Path, number: int) -> Surveyed:
    """Return what was found in a source."""
    return Surveyed(**read_json(building / f"survey/{number:05d}.json"))


def surveyed_rows(building: Path, number: int, cells: int) -> tuple[NDArray[np.bool_], dict[str, NDArray[np.integer]]]:
    """Return which rows of a source are wanted, as far as it alone can tell, and the codes of its obs columns."""
    with np.load(building / f"survey/{number:05d}.npz") as stored:
        codes = {name.removeprefix("obs:"): stored[name] for name in stored.files if name != "kept"}
        return np.unpackbits(stored["kept"], count=cells).astype(bool), codes


def refuse_changed(source: Source, before: dict[str, Any]) -> None:
    """Raise ScfmError where a source is no longer what it was."""
    now = source.fingerprint()
    if now != before:
        raise ScfmError(
            f"{source.label}: {changes(before, now)}; it changed while it was read. Leave it as it is, and {AGAIN}"
        )


AGAIN = "to build anew, pass --restart or remove the directory of the unfinished build"


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Say in what two fingerprints differ."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return ", ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in keys)


def drawn(kept: NDArray[np.bool_], n: int, key: np.uint64) -> tuple[NDArray[np.bool_], int]:
    """Return n of the rows that are kept, drawn by a key, and how many others there were."""
    rows = np.flatnonzero(kept)
    if len(rows) <= n:
        return kept, 0
    chosen = np.zeros_like(kept)
    chosen[rows[permuted(np.arange(len(rows)), len(rows), key) < n]] = True
    return chosen, len(rows) - n


def _kept(
    source: Source, spec: str, options: BuildOptions
) -> tuple[NDArray[np.bool_], dict[str, int], dict[str, list[str]]]:
    """Return which rows pass the conditions on obs, the others under the first that they fail, and the values heard."""
    heard: dict[str, list[str]] = {}
    kept = np.ones(source.n_cells, bool)
    dropped = {NOT_PRIMARY: 0, ALL_ZERO: 0}
    for reason, cells in source.unwanted().items():
        dropped |= {reason: n} if (n := int((kept & cells).sum())) else {}
        kept &= ~cells
    for (name, wanted), values in options.conditions.items():
        column = source.obs(name)
        if column is None:
            raise ScfmError(
                f"{spec}: --where asks for obs column {name!r}, which is not there; there are "
                f"{', '.join(source.obs_names)}"
            )
        passes = _passing(column, values, wanted)
        reason = f"{name} {'not wanted' if wanted else 'unwanted'}"
        dropped |= {reason: n} if (n := int((kept & ~passes).sum())) else {}
        kept &= passes
        heard[name] = sorted({*heard.get(name, ()), *values.intersection(column.categories)})
    return kept, dropped, heard


def _origins(source: Source, kept: NDArray[np.bool_]) -> dict[str, list[str]]:
    """Return the names of donors and data sets among the wanted cells, by which leakage is looked for later."""
    found = {}
    for name in ORIGINS:
        if name in source.obs_names:
            named = source.read_obs(name)[kept].dropna()
            found[name] = sorted(named.astype(str).unique().tolist())
    return found


def _passing(column: ObsColumn, values: set[str], wanted: bool) -> NDArray[np.bool_]:
    # Code -1 picks the last entry: a cell without a value is none of the values.
    named = np.array([*(category in values for category in column.categories), False])
    return named[column.codes] == wanted


def _store_gene_list(building: Path, source: Source) -> str:
    """Write the names of a source's genes, which many sources of a corpus share, and return the name of the file."""
    content = json.dumps([list(names) for names in source.genes])
    name = hashlib.sha256(content.encode()).hexdigest()[:32]
    path = building / f"genes/{name}.json"
    if not path.exists():
        with written(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return name


def read_gene_list(building: Path, name: str) -> tuple[list[str | None], list[str | None]]:
    """Return Ensembl id and symbol of each column of the sources with this list of genes."""
    ensembl, symbols = read_json(building / f"genes/{name}.json")
    return ensembl, symbols
