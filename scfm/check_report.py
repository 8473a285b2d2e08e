"""What `scfm check` found: figures for programs, a table and words for people."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from scfm.data.store import ValueKind
from scfm.data.vocabulary import MatchedBy

if TYPE_CHECKING:
    from rich.console import Console

DROPPED_SHOWN = 10
GROUPS = {
    MatchedBy.ID: "matched by Ensembl id",
    MatchedBy.SYMBOL: "matched by symbol",
    MatchedBy.TABLE: "matched by table: id and symbol of one gene",
    MatchedBy.ALIAS: "matched by table: old symbol, alias or second id",
    MatchedBy.UNKNOWN: "dropped: not in the vocabulary",
    MatchedBy.AMBIGUOUS: "dropped: the name could mean several genes",
    MatchedBy.TAKEN: "dropped: another gene of the file has the place",
}
VALUES = {"counts": "raw counts", "normalised": "normalised values", None: "unusable values"}


@dataclass(frozen=True)
class Group:
    """Genes that were matched in one way, or dropped for one reason, and their share of all counts if that is known."""

    genes: int
    share: float | None


@dataclass(frozen=True)
class Coverage:
    """What of a file a vocabulary knows; shares and cells are None where the values cannot be used.

    Attributes:
        against: what the vocabulary is called: the model, or the file.
        groups: by how genes were matched, or why they were dropped.
        covered: share of all counts that fall on matched genes.
        median_covered: median of that share over the cells that have any counts.
        cells_without_match: cells without a count on a matched gene.
        dropped: (name, share of all counts) of the dropped genes, those with most counts first.
    """

    against: str
    groups: dict[MatchedBy, Group]
    covered: float | None
    median_covered: float | None
    cells_without_match: int | None
    dropped: list[tuple[str, float]]

    @property
    def matched(self) -> int:
        """Number of matched genes."""
        return sum(group.genes for by, group in self.groups.items() if by < MatchedBy.UNKNOWN)


@dataclass(frozen=True)
class CheckReport:
    """What a file holds, and whether it would work.

    Attributes:
        label: the file.
        place: where its values stand, `raw.X` or `X`.
        value_kind: what they are; None where they cannot be used.
        cells: number of cells.
        cells_without_counts: cells without any count; None where the values cannot be used.
        genes: number of columns.
        with_id: columns with an Ensembl id.
        with_symbol_only: columns with a symbol and no id.
        coverage: what a vocabulary knows of it; None where it was compared with none.
        problems: why it would not work; empty where it would.
    """

    label: str
    place: str
    value_kind: ValueKind | None
    cells: int
    cells_without_counts: int | None
    genes: int
    with_id: int
    with_symbol_only: int
    coverage: Coverage | None
    problems: list[str]

    @property
    def ok(self) -> bool:
        """Whether the file would work."""
        return not self.problems


def print_report(report: CheckReport, console: Console | None = None) -> None:
    """Print the report as a table, and in words whether the file would work."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    coverage = report.coverage
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("genes", justify="right")
    if coverage:
        table.add_column("share of counts", justify="right")
    table.add_row("with Ensembl id", f"{report.with_id:,}")
    table.add_row("with symbol only", f"{report.with_symbol_only:,}")
    table.add_row("without name", f"{report.genes - report.with_id - report.with_symbol_only:,}", end_section=True)
    for by, group in coverage.groups.items() if coverage else ():
        table.add_row(GROUPS[by], f"{group.genes:,}", _percent(group.share))
    values = f"{VALUES[report.value_kind]} in {report.place}"
    say(f"{report.label}: {report.cells:,} cells, {report.genes:,} genes, {values}")
    if coverage:
        say(f"compared with {coverage.against}")
    console.print(table)
    for line in _in_words(report):
        say(line)


def _in_words(report: CheckReport) -> list[str]:
    lines = []
    if report.cells_without_counts:
        lines.append(f"{report.cells_without_counts:,} cells have no counts at all.")
    if report.coverage:
        coverage = report.coverage
        lines.append(
            f"{coverage.matched:,} of {report.genes:,} genes matched, with {_percent(coverage.covered)} of all counts "
            f"(median of the cells {_percent(coverage.median_covered)})."
        )
        if coverage.cells_without_match:
            lines.append(f"{coverage.cells_without_match:,} cells have no count on a matched gene.")
        worst = [f"{name} {_percent(share)}" for name, share in coverage.dropped[:DROPPED_SHOWN] if share > 0]
        if worst:
            lines.append(f"Dropped genes with most counts: {', '.join(worst)}.")
    return lines + ([f"Would not work: {problem}" for problem in report.problems] or ["Would work."])


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.2%}"
