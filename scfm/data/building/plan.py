"""The decisions of a build, taken once for all units: vocabulary, rows, held-out groups, sizes.

Every cell has a number; where it lands, place and bucket, is a pure function of the number and the seed.
Held-out cells are numbered after all others and have buckets of their own: they are the last rows of the store.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scfm.data.building.chosen import Chosen, held_out_groups
from scfm.data.building.directory import read_json, write_json, written
from scfm.data.building.options import SOURCE_COLUMN, BuildOptions
from scfm.data.building.survey import DEALING, NOT_DRAWN, Surveyed, read_gene_list, read_survey
from scfm.data.gene_table import GeneTable
from scfm.data.organisms import spoken
from scfm.data.random import permuted, stream
from scfm.data.shards import Codec, default_codec, refuse_unfit
from scfm.data.sources import matched_genes, named_genes
from scfm.data.store import ValueKind
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.errors import ScfmError

VALUES_PER_SHARD = 2**28  # a shard is put together in memory


@dataclass(frozen=True)
class PlannedSource:
    """A source and its share of the numbers that cells have.

    Attributes:
        spec, label, fingerprint, cells, dropped: as in `Surveyed`, the rows that were not drawn counted too.
        gene_list: its genes, by the name of the file that says where they stand in the vocabulary.
        first: number of its first cell that is trained on, and of its first that is held out.
        chosen: how many it has of either.
    """

    spec: str
    label: str
    fingerprint: dict[str, Any]
    cells: int
    dropped: dict[str, int]
    gene_list: str
    first: tuple[int, int]
    chosen: tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """What units and shards are made by.

    Attributes:
        sources: where the cells come from.
        value_kind: counts, or normalised where any source is.
        codec: how the shards encode cells.
        categories: category names of each obs column of the shards.
        n_cells: cells that are chosen to train on, and to hold out.
        n_buckets: buckets of either.
        cells_per_bucket: size of a bucket where the order is kept.
        seed: of the shuffling; None keeps the order.
        held_out_by: the column whose groups are held out.
        held_out: these groups.
        min_genes, min_counts: what a cell must express.
        organism, obs_value_filter: what of the sources is read, as in `open_source`.
        units: (source, first row, row after the last) of each.
        values_per_unit: about how many values a unit holds.
        values_per_block: the most that any source reads in one piece.
        values_per_bucket: about the most that a bucket holds.
    """

    sources: list[PlannedSource]
    value_kind: ValueKind
    codec: Codec
    categories: dict[str, list[str]]
    n_cells: tuple[int, int]
    n_buckets: tuple[int, int]
    cells_per_bucket: int
    seed: int | None
    held_out_by: str | None
    held_out: list[str]
    min_genes: int
    min_counts: int
    organism: str | None
    obs_value_filter: str | None
    units: list[tuple[int, int, int]]
    values_per_unit: int
    values_per_block: int
    values_per_bucket: int

    def places_of(self, numbers: NDArray[np.int64], held: bool) -> NDArray[np.int64]:
        """Return the place among all cells of the store of the cells with some numbers."""
        if self.seed is None:
            places = numbers
        else:
            key = np.uint64(stream(self.seed, 0, int(held), DEALING))
            places = permuted(numbers, self.n_cells[held], key)
        return places + (self.n_cells[0] if held else 0)

    def buckets_of(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the bucket of each place.

        Shuffled, every stretch of cells is dealt evenly over all buckets, whose sizes differ by one cell.
        """
        held = places >= self.n_cells[0]
        own = places - np.where(held, self.n_cells[0], 0)
        first, n = np.where(held, self.n_buckets[0], 0), np.where(held, self.n_buckets[1], self.n_buckets[0])
        return first + (own // self.cells_per_bucket if self.seed is None else own % n)


def make_plan(
    building: Path, options: BuildOptions, table: GeneTable | None, given: Vocabulary | None, sizes: Sizes
) -> Plan:
    """Take all decisions, and write plan.json and what belongs to it.

    Args:
        building: the directory, in which all sources are surveyed.
        options: what is asked for.
        table: names that mean the same gene.
        given: the vocabulary; None takes the union of all sources' genes.
        sizes: what memory admits.

    Raises ScfmError where the sources do not have what the options name, or the vocabulary knows no gene of one.
    """
    surveyed = [read_survey(building, number) for number in range(len(options.sources))]
    _refuse_several_organisms(surveyed, options)
    vocabulary = _settle_genes(building, surveyed, table, given)
    value_kind: ValueKind = "normalised" if any(s.value_kind == "normalised" for s in surveyed) else "counts"
    codec = options.codec or default_codec(value_kind)
    refuse_unfit(codec, value_kind)
    if value_kind == "normalised" and options.min_counts:
        raise ScfmError("--min-counts: the values are normalised, not counts; use --min-genes")
    categories = _categories(surveyed, options)
    _refuse_unheard_values(surveyed, options)

    chosen = Chosen(building, surveyed, options)
    groups = sum(chosen.groups_of, Counter[str]())
    held_names = held_out_groups(groups, options)
    numbered, sources = [0, 0], []
    for number, source in enumerate(surveyed):
        held = sum(n for name, n in chosen.groups_of[number].items() if name in held_names)
        both = (chosen.counts[number] - held, held)
        dropped = source.dropped | ({NOT_DRAWN: n} if (n := source.kept - sum(both)) else {})
        first = (numbered[0], numbered[1])
        sources.append(
            PlannedSource(
                source.spec, source.label, source.fingerprint, source.cells, dropped, source.gene_list, first, both
            )
        )
        numbered = [numbered[0] + both[0], numbered[1] + both[1]]
    if not sum(numbered):
        raise ScfmError(f"no cell is left to write: {why_empty([(s.cells, s.dropped) for s in sources])}")
    mean = sum(source.values for source in surveyed) / max(1, sum(source.cells for source in surveyed))
    per_bucket = min(options.cells_per_shard, max(1, int(min(VALUES_PER_SHARD, sizes.values_per_shard) / max(1, mean))))
    values_per_block = max(source.values_per_block for source in surveyed)
    plan = Plan(
        sources=sources,
        value_kind=value_kind,
        codec=codec,
        categories=categories,
        n_cells=(numbered[0], numbered[1]),
        n_buckets=(-(-numbered[0] // per_bucket), -(-numbered[1] // per_bucket)),
        cells_per_bucket=per_bucket,
        seed=None if options.keep_order else options.seed,
        held_out_by=options.hold_out_by,
        held_out=sorted(held_names),
        min_genes=options.min_genes,
        min_counts=options.min_counts,
        organism=options.organism,
        obs_value_filter=options.obs_value_filter,
        units=[unit for number in range(len(surveyed)) for unit in chosen.units(number, sizes.values_per_unit)],
        values_per_unit=sizes.values_per_unit,
        values_per_block=values_per_block,
        values_per_bucket=int(per_bucket * mean),
    )
    vocabulary.save(building / "vocab.json")
    write_json(building / "plan.json", asdict(plan))
    return plan


@dataclass(frozen=True)
class Sizes:
    """What memory admits: values in a unit, and in a shard."""

    values_per_unit: int
    values_per_shard: int


def read_plan(building: Path) -> Plan:
    """Return the plan of a building directory, read once per process."""
    return _read_plan(str(building), (building / "plan.json").stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _read_plan(building: str, _: int) -> Plan:
    stored = read_json(Path(building) / "plan.json")
    stored["sources"] = [PlannedSource(**source) for source in stored["sources"]]
    return Plan(**stored)


def why_empty(sources: list[tuple[int, dict[str, int]]]) -> str:
    """Say how many cells the sources had, and what became of them."""
    dropped = sum((Counter(dropped) for _, dropped in sources), Counter[str]())
    reasons = ", ".join(f"{dropped[reason]:,} {reason}" for reason in {r: 0 for _, d in sources for r in d})
    return f"of {sum(cells for cells, _ in sources):,} cells in the sources: {reasons}"


def _settle_genes(
    building: Path, surveyed: list[Surveyed], table: GeneTable | None, given: Vocabulary | None
) -> Vocabulary:
    """Return the vocabulary, after writing where the genes of every source stand in it."""
    sources_with: defaultdict[str, list[Surveyed]] = defaultdict(list)
    for source in surveyed:
        if not source.kept:  # of another organism, maybe, whose genes are none here
            with written(building / f"genes/{source.gene_list}.npy") as file, file.open("wb") as stored:
                np.save(stored, np.full(source.genes, -1, np.int32))
            continue
        sources_with[source.gene_list].append(source)
    lists = {name: read_gene_list(building, name) for name in sources_with}
    if given is None:
        seen = Counter[Gene]()
        for name, sources in sources_with.items():
            named = named_genes(lists[name])
            for gene, n in Counter(named if table is None else table.canonical(named)).items():
                seen[gene] += n * len(sources)
        given = Vocabulary.from_genes(seen.elements())
    for name, sources in sources_with.items():
        entries = matched_genes(sources[0].spec, lists[name], given, table)
        with written(building / f"genes/{name}.npy") as file, file.open("wb") as stored:
            np.save(stored, entries)
    return given


def _categories(surveyed: list[Surveyed], options: BuildOptions) -> dict[str, list[str]]:
    """Return the category names of each obs column of the shards: the union over the sources."""
    wanted = [*options.carried, *([options.stratify] if options.stratify else [])]
    absent = [n for n in wanted if n != SOURCE_COLUMN and not any(n in source.categories for source in surveyed)]
    if absent:
        there = sorted({name for source in surveyed for name in source.obs_names})
        raise ScfmError(f"no source has an obs column {', '.join(absent)}; there are {', '.join(there)}")
    categories = {SOURCE_COLUMN: [source.label for source in surveyed]}
    for name in options.carried:
        categories[name] = sorted({label for source in surveyed for label in source.categories.get(name, ())})
    return categories


def _refuse_several_organisms(surveyed: list[Surveyed], options: BuildOptions) -> None:
    """Refuse sources of several organisms, unless one is asked for, which leaves out the others."""
    first_of: dict[str, str] = {}
    for source in surveyed:
        for organism in source.organisms if source.kept else ():
            first_of.setdefault(organism, source.spec)
    if options.organism is None and len(first_of) > 1:
        there = "; ".join(f"{spoken(organism)} in {spec}" for organism, spec in first_of.items())
        raise ScfmError(f"the sources are of several organisms ({there}); choose one with --organism")


def _refuse_unheard_values(surveyed: list[Surveyed], options: BuildOptions) -> None:
    """Refuse conditions on values that no cell has: a misspelt name would leave nothing, or everything."""
    heard = {(name, value) for source in surveyed for name, values in source.heard.items() for value in values}
    unheard = [
        f"{name}{'=' if wanted else '!='}{value}"
        for (name, wanted), values in options.conditions.items()
        for value in sorted(values)
        if (name, value) not in heard
    ]
    if unheard:
        raise ScfmError(f"--where {', '.join(map(repr, unheard))}: no source has that value; check how it is spelled")
