"""Everything that is known of a shard directory, before it is shown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scfm.data.store import CellStore
from scfm.data.vocabulary import Vocabulary
from scfm.inspecting.measuring import Measured
from scfm.inspecting.tables import (
    WHOLE,
    Table,
    gene_table,
    group_table,
    length_table,
    ordered_groups,
    origin_table,
    percentiles,
    rounded,
    share,
    source_table,
    value_table,
)

FEW_GENES = 0.5
NAMES_SHOWN = 12


@dataclass(frozen=True)
class Contents:
    """A shard directory, measured.

    Attributes:
        directory: where it is.
        manifest: what its build says of it.
        vocabulary: its genes.
        measured: what was found in its shards.
        sizes: bytes of what it is made of, by name.
        seconds: what measuring took.
    """

    directory: Path
    manifest: dict[str, Any]
    vocabulary: Vocabulary
    measured: Measured
    sizes: dict[str, int]
    seconds: float

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @property
    def shard_bytes_per_cell(self) -> float:
        return self.sizes["shards"] / max(1, self.measured.cells)

    def headline(self) -> str:
        """Return the sizes that everybody asks for first."""
        manifest = self.manifest
        kinds = {"counts": "expressed genes with their counts", "normalised": "normalised values"}
        n = len(manifest["sources"])
        return (
            f"{self.measured.cells:,} cells, {self.vocabulary.n_genes:,} genes, {manifest['tokens']:,} "
            f"{kinds[manifest['value_kind']]}, {'1 source' if n == 1 else f'{n:,} sources'}; "
            f"{human(sum(self.sizes.values()))}, {self.shard_bytes_per_cell:,.0f} bytes per cell."
        )

    def sentences(self) -> list[str]:
        """Return what the figures say, in words."""
        measured = self.measured
        low, median, high = percentiles(measured.genes_per_cell, np.arange(len(measured.genes_per_cell)) * 1.0)
        said = [f"A cell expresses {median:,.0f} genes in the median; nine in ten between {low:,.0f} and {high:,.0f}."]
        of = " of the sample" if measured.run else ""
        if self.manifest["value_kind"] == "counts":
            low, median, high = percentiles(measured.totals, WHOLE)
            said.append(
                f"A cell{of} has {rounded(median)} counts in the median; nine in ten between {rounded(low)} and "
                f"{rounded(high)}."
            )
        seen = int((measured.gene_cells > 0).sum())
        said.append(
            f"{seen:,} of {self.vocabulary.n_genes:,} genes of the vocabulary are expressed in at least one cell{of}."
        )
        return said

    def facts(self) -> dict[str, str]:
        """Return genes, copies, held-out groups, and how the shards were built."""
        return {
            "genes": self._genes(),
            "copies": self._copies(),
            "held out": self._held_out(),
            "cells left out": self._left_out(),
            "filters": self._filters(),
            "order": self._order(),
            "codec": self._codec(),
            "size on disk": ", ".join(f"{name} {human(size)}" for name, size in self.sizes.items()),
            "sample": self.sample(),
            "built by": f"scfm {self.manifest['scfm_version']}",
            "hash": self.manifest.get("hash", "none"),
        }

    def sample(self) -> str:
        """Return which cells were measured, and how they were drawn."""
        measured = self.measured
        sizes = "Cells, categories, expressed genes per cell and profiles are of all cells."
        if not measured.run:
            return f"None: everything is of all {measured.cells:,} cells."
        return (
            f"{sizes} Values, counts per cell and genes are of {measured.sampled:,} cells "
            f"({share(measured.sampled, measured.cells)}): one run of up to {measured.run} neighbouring cells from a "
            "place drawn in each of equal stretches of the corpus; the same cells each time. --sample 0 reads all."
        )

    def cautions(self) -> list[str]:
        """Return what a reader of the figures, or a user of the cells, should know."""
        manifest, measured = self.manifest, self.measured
        said = []
        if manifest["value_kind"] == "normalised":
            said.append("The values are normalised, not counts: only their order within a cell is comparable.")
        if not manifest.get("shuffled", True):
            said.append(
                "The cells are in the order of their sources (--keep-order): fit for inference, not for training."
            )
        sources = manifest["sources"]
        n_genes = self.vocabulary.n_genes
        narrow = [s for s in sources if s["genes_matched"] < FEW_GENES * n_genes and s["kept"]]
        if narrow:
            cells = sum(s["kept"] for s in narrow)
            said.append(
                f"{len(narrow):,} of {len(sources):,} sources, with {share(cells, measured.cells)} of the cells, "
                f"measured fewer than half of the {n_genes:,} genes: the others are not zero there, but unknown "
                f"({_listed([s['file'] for s in sorted(narrow, key=lambda s: -s['kept'])], 3)})."
            )
        full_length = [s["file"] for s in sources if s.get("provenance", {}).get("full_length_assays")]
        if full_length:
            said.append(
                f"Full-length assays count reads, which grow with the length of a gene: {_listed(full_length, 3)}."
            )
        for group in ordered_groups(measured):
            if group.missing:
                said.append(f"{share(group.missing, measured.cells)} of the cells have no value for {group.name}.")
        if "source" in measured.groups and len(sources) > 1:
            group = measured.groups["source"]
            largest = int(np.argmax(group.cells))
            if group.cells[largest] > measured.cells / 2:
                portion = share(group.cells[largest], measured.cells)
                said.append(f"{portion} of the cells are of one source, {group.categories[largest]}.")
        said += [f"The same data set, as they say: {_listed(files, 5)}." for files in manifest.get("same_dataset", [])]
        if not manifest.get("held_out"):
            said.append("No group is held out: a validation set drawn from these cells shares donors with training.")
        return said

    def tables(self) -> list[Table]:
        """Return all tables, in the order in which they are read."""
        manifest, measured = self.manifest, self.measured
        found = [
            source_table(manifest, measured),
            *(group_table(group, measured) for group in ordered_groups(measured)),
        ]
        found += [length_table(measured), value_table(measured, manifest["value_kind"])]
        found += [gene_table(measured, self.vocabulary, manifest["value_kind"]), origin_table(manifest)]
        return [table for table in found if table]

    def _genes(self) -> str:
        measured, n_genes = self.measured, self.vocabulary.n_genes
        cells = measured.gene_cells
        never, rare = int((cells == 0).sum()), int(((cells > 0) & (cells < 0.001 * measured.sampled)).sum())
        of = " in the sample" if measured.run else ""
        shared = len(self.vocabulary.ambiguous_symbols)
        with_id = sum(gene.ensembl is not None for gene in self.vocabulary.entries[:n_genes])
        return (
            f"{n_genes:,} in the vocabulary, {with_id:,} with an Ensembl id; {never:,} never expressed{of}, "
            f"{rare:,} in fewer than one cell in a thousand; {shared:,} symbols name several genes."
        )

    def _copies(self) -> str:
        found = [(s["file"], first, n) for s in self.manifest["sources"] for first, n in s.get("copies", {}).items()]
        n = sum(copies for _, _, copies in found)
        pairs = [
            f"{copies:,} of {file} {'twice in it' if file == first else f'in {first}'}"
            for file, first, copies in sorted(found, key=lambda pair: -pair[2])
        ]
        done = {"drop": "left out", "keep": "kept"}.get(self.manifest.get("duplicates", ""), "found")
        said = (
            f"{n:,} cells with the profile of an earlier cell were {done}"
            if n
            else "The build found none (the same counts in the same genes)"
        )
        said += f" ({_listed(pairs, 5)})." if n else "."
        equal = self.measured.equal_profiles
        if equal:
            said += (
                f" In the shards {equal:,} cells have a profile that another has; those with fewer than 50 expressed "
                "genes are never taken for copies."
            )
        elif equal == 0:
            said += " In the shards no two cells have the same profile."
        return said

    def _held_out(self) -> str:
        held_out = self.manifest.get("held_out")
        if not held_out:
            return "Nothing."
        groups = held_out["groups"]
        portion = share(held_out["cells"], self.measured.cells)
        return (
            f"{held_out['cells']:,} cells ({portion}), the last of the store: {len(groups):,} of {held_out['by']} "
            f"({_listed(groups, NAMES_SHOWN)})."
        )

    def _left_out(self) -> str:
        sources = self.manifest["sources"]
        reasons: dict[str, int] = {}
        for source in sources:
            for reason, n in source["dropped"].items():
                reasons[reason] = reasons.get(reason, 0) + n
        cells, kept = (sum(source[key] for source in sources) for key in ("cells", "kept"))
        why = ", ".join(f"{n:,} {reason}" for reason, n in sorted(reasons.items(), key=lambda item: -item[1]) if n)
        return f"{cells - kept:,} of {cells:,}{f': {why}' if why else ''}." if sources else "Not recorded."

    def _filters(self) -> str:
        filters = {name: value for name, value in self.manifest.get("filters", {}).items() if value}
        said = [
            f"{name}: {', '.join(map(str, value)) if isinstance(value, list) else value}"
            for name, value in filters.items()
        ]
        asked = {
            source["provenance"]["obs_value_filter"]
            for source in self.manifest["sources"]
            if source.get("provenance", {}).get("obs_value_filter")
        }
        return "; ".join([*said, *(f"obs_value_filter: {one}" for one in sorted(asked))]) or "None."

    def _order(self) -> str:
        order = "shuffled" if self.manifest.get("shuffled", True) else "that of the sources"
        return f"{order}, seed {self.manifest['seed']}" if "seed" in self.manifest else order

    def _codec(self) -> str:
        shards = self.manifest["shards"]
        cells = [shard["cells"] for shard in shards]
        kinds = {key: sorted({shard[key] for shard in shards}) for key in ("genes", "values")}
        span = (
            f"{min(cells):,} to {max(cells):,}" if cells and min(cells) < max(cells) else f"{max(cells, default=0):,}"
        )
        return (
            f"{self.manifest['codec']}; {len(shards):,} {'shard' if len(shards) == 1 else 'shards'} of {span} cells; "
            f"gene ids {'/'.join(kinds['genes'])}, values {'/'.join(kinds['values'])}"
        )


def sizes_of(directory: Path, store: CellStore) -> dict[str, int]:
    """Return the bytes of the shards and of the files beside them."""
    beside = [directory / name for name in ("cells.hash", "vocab.json", "manifest.json")]
    return {"shards": sum(file.n_bytes for file in store.files)} | {
        path.name: path.stat().st_size for path in beside if path.is_file()
    }


def human(n_bytes: float) -> str:
    """Return a size in the unit that people would use."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:,.0f} {unit}" if unit == "bytes" else f"{n_bytes:,.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.2f} TB"


def _listed(names: list[str], shown: int) -> str:
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more:,} more" if more > 0 else "")
