"""What is in a shard directory, as one self-contained HTML page."""

from __future__ import annotations

from html import escape
from itertools import count

from scfm.evaluation.page import Figure, definitions, document, figure_html, items
from scfm.evaluation.provenance import provenance
from scfm.inspecting import plots
from scfm.inspecting.contents import Contents
from scfm.inspecting.measuring import Groups
from scfm.inspecting.tables import (
    Table,
    gene_table,
    group_table,
    length_table,
    ordered_groups,
    origin_table,
    source_table,
    value_table,
)

OPEN_ROWS = 15  # the others unfold
MOST_ROWS = 1000
PANELS = 2
STYLE = """
.scroll { margin-top: 24px; }
th:first-child, td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 130px; }
td.text { white-space: normal; overflow-wrap: anywhere; max-width: 320px; }
details { font-size: 13.5px; } summary { color: var(--faint); padding: 6px 0; cursor: pointer; }
"""


def render(contents: Contents) -> str:
    """Return the page: words, then for sources, cells, values and genes a figure beside its table, then the build."""
    manifest, measured = contents.manifest, contents.measured
    kind = manifest["value_kind"]
    of_sample = f" {measured.sampled:,} sampled cells." if measured.run else " All cells."
    tables, figures = count(1), count(1)

    def drawn(table: Table | None) -> str:
        return table_html(next(tables), table) if table and table.rows else ""

    def shown(png: bytes, title: str, caption: str) -> str:
        return figure_html(next(figures), Figure(png, title, caption))

    groups = ordered_groups(measured)
    source = measured.groups.get("source")
    paired = [group for group in groups if group.name in measured.pairs and 1 < _used(group) <= plots.MOST_ROWS][
        :PANELS
    ]
    boxed = [group for group in (source, *groups) if group and group.genes is not None and _used(group) > 1][:PANELS]
    parts = ["<h2>Sources</h2>", drawn(source_table(manifest, measured))]
    for group in paired if source else ():
        assert source  # as there are pairs with it
        parts.append(
            shown(plots.composition(source, group, measured), f"Cells of sources by {group.name}", "All cells.")
        )
    parts += ["<h2>Cells</h2>", *(drawn(group_table(group, measured)) for group in groups)]
    caption = "Lines: median (solid), 5 and 95% (dotted); one cell in a thousand lies beyond. Genes: all cells."
    caption += f" Counts:{of_sample.lower()}" if kind == "counts" else ""
    parts.append(shown(plots.per_cell(measured, kind), "What a cell holds", caption))
    if boxed:
        caption = "Line: 5 to 95% of the cells; bar: the middle half; dot: median. All cells."
        names = " and ".join(group.name for group in boxed)
        parts.append(shown(plots.lengths_by_group(boxed, measured), f"Expressed genes per cell, by {names}", caption))
    parts += [drawn(length_table(measured)), "<h2>Values</h2>"]
    caption = "What expressed genes have as values; zeros are not stored." + of_sample
    parts.append(shown(plots.values(measured, kind), "Values of expressed genes", caption))
    parts += [drawn(value_table(measured, kind)), "<h2>Genes</h2>"]
    caption = (
        "Left: the share of cells that express a gene, by rank. Right: the share of all values' sum, added up."
        + of_sample
    )
    parts.append(shown(plots.genes(measured), "How common genes are", caption))
    parts += [drawn(gene_table(measured, contents.vocabulary, kind)), "<h2>Build</h2>"]
    parts += [definitions({name: escape(text) for name, text in contents.facts().items()})]
    parts += ["<h2>Origin</h2>", drawn(origin_table(manifest))]
    origin = provenance()
    parts.append(
        definitions(
            {
                "directory": f"<code>{escape(str(contents.directory.resolve()))}</code>",
                "page": f"scfm {origin['scfm']} inspect, {escape(origin['time'])}, {contents.seconds:,.1f} s",
            }
        )
    )
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in contents.sentences())
    cautions = contents.cautions()
    notes = f"<h2>Read with care</h2><ul>{items(cautions)}</ul>" if cautions else ""
    title = f"What is in {contents.name}"
    sample = f"<p>Sample: {escape(contents.sample())}</p>" if measured.run else ""
    return document(
        title,
        f'<h1>{escape(title)}</h1><p class="byline">{escape(contents.headline())}</p>\n'
        f'<div class="verdict">{said}</div>\n{notes}{sample}\n' + "\n".join(parts),
        STYLE,
    )


def table_html(number: int, table: Table) -> str:
    """Return a numbered table with its caption; of a long one the first rows, the others to be unfolded."""
    caption = f"<b>Table {number}. {escape(table.title)}.</b> {escape(table.note)}"
    styles = ["text" if k and column in table.text else "" for k, column in enumerate(table.columns)]
    head = "".join(_cell("th", style, column) for style, column in zip(styles, table.columns, strict=True))
    rows = [
        "<tr>" + "".join(_cell("td", style, text) for style, text in zip(styles, row, strict=True)) + "</tr>"
        for row in table.rows[:MOST_ROWS]
    ]
    open_rows = len(rows) if len(rows) <= OPEN_ROWS + 3 else OPEN_ROWS
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows[:open_rows])}</tbody>"
    first = f"<table><caption>{caption}</caption>{body}</table>"
    if open_rows == len(rows):
        return f'<div class="scroll">{first}</div>'
    n = len(table.rows) - open_rows
    more = f" (the first {MOST_ROWS - open_rows:,} of them)" if len(table.rows) > MOST_ROWS else ""
    rest = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows[open_rows:])}</tbody></table>"
    return f'<div class="scroll">{first}<details><summary>{n:,} more{more}</summary>{rest}</details></div>'


def _cell(tag: str, style: str, text: str) -> str:
    return f'<{tag} class="{style}">{escape(text)}</{tag}>' if style else f"<{tag}>{escape(text)}</{tag}>"


def _used(group: Groups) -> int:
    return int((group.cells > 0).sum())
