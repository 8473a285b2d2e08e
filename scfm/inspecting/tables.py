"""What was measured, as tables that a terminal and a page both show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scfm.data.store import ValueKind
from scfm.data.vocabulary import Vocabulary
from scfm.inspecting.histogram import FIRST_WHOLE, N_WHOLE, middles, quantiles
from scfm.inspecting.measuring import Groups, Measured

FIRST_COLUMNS = ("tissue", "tissue_general", "assay", "cell_type", "disease")
LENGTHS = (512, 1_199, 2_048, 4_096, 8_192)
TOP_GENES = 25
SPAN = "5 to 95%"
WHOLE = middles(FIRST_WHOLE, N_WHOLE, whole=True)


@dataclass(frozen=True)
class Table:
    """Rows of cells that are ready to be shown; the first column is text.

    `text` names further columns of text, `wide` those for which a terminal has no room.
    """

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: Sequence[str] = ()
    wide: Sequence[str] = (SPAN,)


def source_table(manifest: dict[str, Any], measured: Measured) -> Table | None:
    """Return what became of the cells of each source, the largest first; None where the manifest names none."""
    sources = sorted(manifest["sources"], key=lambda source: -source["kept"])
    if not sources:
        return None
    reasons = list(dict.fromkeys(reason for source in sources for reason, n in source["dropped"].items() if n))
    copies = any(source.get("copies") for source in sources)
    group = measured.groups.get("source")
    place = {name: k for k, name in enumerate(group.categories)} if group else {}
    rows = []
    for source in sources:
        numbers = [source["cells"], source["kept"], *(source["dropped"].get(reason, 0) for reason in reasons)]
        numbers += [sum(source["copies"].values())] if copies else []
        numbers += [source["genes"], source["genes_matched"]]
        medians = _medians(group, place[source["file"]]) if group and source["file"] in place else []
        rows.append([source["file"], *(f"{number:,}" for number in numbers), *medians])
    columns = ["source", "cells", "kept", *(f"dropped: {reason}" for reason in reasons)]
    columns += ["copies"] if copies else []
    columns += [
        "genes",
        "genes matched",
        *(_median_names(group) if group and rows and len(rows[0]) > len(columns) + 2 else []),
    ]
    note = "Cells in each source, those kept, and why others were left out. Medians are within 1%."
    note += " Copies: cells whose profile stands in an earlier source, or earlier in the same." if copies else ""
    return Table("Sources", note, columns, rows, wide=(SPAN, "median counts"))


def ordered_groups(measured: Measured) -> list[Groups]:
    """Return the obs columns but for source, those that people look for first at the front."""
    names = [name for name in measured.groups if name != "source"]
    front = [name for name in FIRST_COLUMNS if name in names]
    return [measured.groups[name] for name in [*front, *(name for name in names if name not in front)]]


def group_table(group: Groups, measured: Measured) -> Table:
    """Return the cells of each category of an obs column, the largest first."""
    held_out = bool(sum(other.held_out.sum() for other in measured.groups.values()))
    rows = []
    for k in np.argsort(-group.cells, kind="stable").tolist():
        row = [group.categories[k], f"{group.cells[k]:,}", share(group.cells[k], measured.cells)]
        row += [f"{group.held_out[k]:,}"] if held_out else []
        rows.append(row + _medians(group, k))
    if group.missing:
        empty = [""] * (int(held_out) + len(_median_names(group)))
        rows.append(["(no value)", f"{group.missing:,}", share(group.missing, measured.cells), *empty])
    used = int((group.cells > 0).sum())
    note = f"{used:,} {'category' if used == 1 else 'categories'}"
    note += f", {len(group.categories) - used:,} more without a cell." if used < len(group.categories) else "."
    columns = [group.name, "cells", "share", *(["held out"] if held_out else []), *_median_names(group)]
    return Table(f"Cells by {group.name}", note, columns, rows)


def length_table(measured: Measured) -> Table:
    """Return how many cells are longer than usual choices of `data.max_genes`, and how many values that leaves."""
    sizes = np.arange(len(measured.genes_per_cell))
    tokens = max(1, int((sizes * measured.genes_per_cell).sum()))
    longest = int(np.flatnonzero(measured.genes_per_cell)[-1]) if measured.cells else 0
    rows = []
    for limit in [one for one in LENGTHS if one < longest] + [longest]:
        longer = int(measured.genes_per_cell[limit + 1 :].sum())
        kept = int((np.minimum(sizes, limit) * measured.genes_per_cell).sum())
        rows.append([f"{limit:,}", f"{longer:,}", share(longer, measured.cells), share(kept, tokens)])
    return Table(
        "What a limit on the length of a cell leaves",
        "data.max_genes in a recipe; of a longer cell so many expressed genes are drawn. All cells.",
        ["max_genes", "longer cells", "share", "values kept"],
        rows,
    )


def value_table(measured: Measured, value_kind: ValueKind) -> Table:
    """Return how often values occur: counts by size, normalised values as quantiles."""
    title = "Values of expressed genes"
    if value_kind == "normalised":
        shares = [0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99]
        found = quantiles(measured.values, middles(), shares)
        rows = [[f"{one:.0%}", f"{value:.2g}"] for one, value in zip(shares, found, strict=True)]
        return Table(title, _where(measured), ["quantile", "value"], [*rows, ["largest", f"{measured.largest:.4g}"]])
    n, total = int(measured.values.sum()), float(measured.gene_sums.sum())
    rows = [
        [label, f"{values:,}", share(values, n), share(counts, total)]
        for label, values, counts in count_sizes(measured)
    ]
    return Table(title, _where(measured), ["count", "values", "share of values", "share of all counts"], rows)


def count_sizes(measured: Measured) -> list[tuple[str, int, float]]:
    """Return (label, values, their sum) of counts by size."""
    whole = middles(whole=True)
    ends = [1, 2, 3, 4, 5, 10, 20, 50, 100, 1_000]
    found = []
    for low, high in zip(ends, [*ends[1:], np.inf], strict=True):
        inside = (whole >= low) & (whole < high)
        values, counts = int(measured.values[inside].sum()), float((measured.values * whole)[inside].sum())
        label = (
            f"{low:,}"
            if high == low + 1
            else (f"{low:,} to {int(high) - 1:,}" if high < np.inf else f"{low:,} or more")
        )
        if values:
            found.append((label, values, counts))
    return found


def gene_table(measured: Measured, vocabulary: Vocabulary, value_kind: ValueKind) -> Table:
    """Return the genes that most cells express."""
    total = float(measured.gene_sums.sum())
    rows = []
    for k in np.argsort(-measured.gene_cells, kind="stable")[:TOP_GENES].tolist():
        if not measured.gene_cells[k]:
            break
        gene, cells = vocabulary.entries[k], int(measured.gene_cells[k])
        row = [gene.symbol or gene.id, gene.ensembl or "", f"{cells:,}", share(cells, measured.sampled)]
        mean = f"{measured.gene_sums[k] / cells:,.2f}"
        rows.append([*row, mean, *([share(measured.gene_sums[k], total)] if value_kind == "counts" else [])])
    columns = ["gene", "Ensembl id", "cells", "share of cells", "mean where expressed"]
    columns += ["share of all counts"] if value_kind == "counts" else []
    note = f"The {len(rows)} genes that most cells express. {_where(measured)}"
    return Table(
        "Commonest genes", note, columns, rows, text=("Ensembl id",), wide=("Ensembl id", "share of all counts")
    )


def origin_table(manifest: dict[str, Any]) -> Table | None:
    """Return what the sources say of themselves; None where they say nothing."""
    titles = {"title": "title", "organisms": "organism", "schema_version": "schema", "dataset_id": "dataset id"}
    titles |= {"citation": "citation"}
    said = [(source["file"], source.get("provenance", {})) for source in manifest["sources"]]
    used = [key for key in titles if any(of.get(key) for _, of in said)]
    if not used:
        return None
    rows = [[file, *(_as_text(of.get(key)) for key in used)] for file, of in said]
    columns = ["source", *(titles[key] for key in used)]
    return Table("What the sources say of themselves", "As in the files.", columns, rows, text=columns[1:])


def share(part: float, whole: float) -> str:
    """Return a share in per cent, with enough digits for small ones; nothing is called 0 % or 100 % that is not."""
    if not whole:
        return ""
    ratio = part / whole
    if 0 < ratio < 0.0001:
        return "<0.01%"
    if 0.9995 <= ratio < 1:
        return ">99.9%"
    return f"{ratio:.2%}" if 0 < ratio < 0.01 else f"{ratio:.1%}"


def rounded(number: float) -> str:
    """Return a number as whole, in three digits: what a histogram knows of it."""
    if np.isnan(number):
        return ""
    digits = max(0, len(str(int(number))) - 3)
    return f"{round(number / 10**digits) * 10**digits:,}"


def _medians(group: Groups, k: int) -> list[str]:
    found = []
    if group.genes is not None:
        low, median, high = quantiles(group.genes[k], WHOLE, [0.05, 0.5, 0.95])
        found += [rounded(median), f"{rounded(low)} to {rounded(high)}" if not np.isnan(median) else ""]
    if group.counts is not None:
        found.append(rounded(float(quantiles(group.counts[k], WHOLE, [0.5])[0])))
    return found


def _median_names(group: Groups) -> list[str]:
    names = ["median genes", SPAN] if group.genes is not None else []
    return names + (["median counts"] if group.counts is not None else [])


def _where(measured: Measured) -> str:
    return f"Of {measured.sampled:,} sampled cells." if measured.run else "All cells."


def _as_text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def percentiles(counts: NDArray[np.int64], values: NDArray[np.floating]) -> tuple[float, float, float]:
    """Return the 5th, 50th and 95th percentile of binned numbers."""
    low, median, high = quantiles(counts, values, [0.05, 0.5, 0.95]).tolist()
    return low, median, high
