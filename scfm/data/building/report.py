"""What a build wrote and what it left out, read back from the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scfm.data.shards import read_manifest
from scfm.data.store import ValueKind
from scfm.data.vocabulary import Vocabulary

if TYPE_CHECKING:
    from rich.table import Table


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
        fingerprint: what it was known by while it was read.
        copies: cells whose profile another cell has that comes before them, by the file of that other.
        origins: the donors and data sets that its cells name, by obs column.
    """

    file: str
    cells: int
    kept: int
    dropped: dict[str, int]
    genes: int
    genes_matched: int
    provenance: dict[str, Any]
    fingerprint: dict[str, Any] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=dict)
    origins: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class PreparedReport:
    """What `prepare` wrote, and what it left out.

    `hash` is that of the manifest: the same for the same cells, options and seed. `same_dataset` lists sources that say
    that they are the same data set.
    """

    out: Path
    cells: int
    tokens: int
    shards: int
    genes: int
    value_kind: ValueKind
    ambiguous_symbols: int
    sources: list[SourceReport]
    hash: str
    held_out: dict[str, Any] | None
    same_dataset: list[list[str]]

    def table(self) -> Table:
        """Return a rich table with a row per source."""
        from rich.table import Table

        table = Table(
            title=f"{self.cells:,} cells, {self.tokens:,} values ({self.value_kind}), {self.genes:,} genes, "
            f"{self.shards:,} {'shard' if self.shards == 1 else 'shards'} in {self.out}",
            caption="\n".join(self._remarks()) or None,
        )
        reasons = list(dict.fromkeys(r for source in self.sources for r, n in source.dropped.items() if n))
        table.add_column("source", overflow="fold")
        for heading in ("cells", "kept", *(f"dropped: {reason}" for reason in reasons), "genes", "matched"):
            table.add_column(heading, justify="right")
        for source in self.sources:
            dropped = [source.dropped.get(reason, 0) for reason in reasons]
            numbers = (source.cells, source.kept, *dropped, source.genes, source.genes_matched)
            table.add_row(source.file, *(f"{number:,}" for number in numbers))
        return table

    def _remarks(self) -> list[str]:
        remarks = []
        if self.ambiguous_symbols:
            remarks.append(f"{self.ambiguous_symbols:,} symbols name several Ensembl ids")
        if self.held_out:
            groups = self.held_out["groups"]
            remarks.append(
                f"{self.held_out['cells']:,} cells are held out: {len(groups):,} of {self.held_out['by']} ("
                f"{_listed(groups)})"
            )
        for source in self.sources:
            for first, n in source.copies.items():
                where = "it twice" if first == source.file else f"{first} too"
                remarks.append(f"{source.file}: {n:,} cells with a profile that is in {where}")
        remarks += [f"the same data set, as they say: {_listed(files)}" for files in self.same_dataset]
        return remarks


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def read_report(out: Path) -> PreparedReport:
    """Return what a manifest says of the build that wrote it."""
    manifest = read_manifest(out)
    vocabulary = Vocabulary.load(out / "vocab.json")
    return PreparedReport(
        out=out,
        cells=manifest["cells"],
        tokens=manifest["tokens"],
        shards=len(manifest["shards"]),
        genes=vocabulary.n_genes,
        value_kind=manifest["value_kind"],
        ambiguous_symbols=len(vocabulary.ambiguous_symbols),
        sources=[SourceReport(**source) for source in manifest["sources"]],
        hash=manifest["hash"],
        held_out=manifest["held_out"],
        same_dataset=manifest["same_dataset"],
    )
