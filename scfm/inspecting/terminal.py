"""What is in a shard directory, in a terminal."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scfm.inspecting.contents import Contents
from scfm.inspecting.tables import Table, share

if TYPE_CHECKING:
    from rich.console import Console

MOST_ROWS = 10
MOST_LINES = 14
BAR = 40
LEFT_TO_THE_PAGE = "What the sources say of themselves"


def print_contents(contents: Contents, console: Console | None = None) -> None:
    """Print words, tables of the largest categories, and a histogram of the expressed genes per cell."""
    from rich.console import Console

    console = console or Console()
    say = partial(console.print, markup=False, highlight=False)
    say(f"{contents.directory}: {contents.headline()}", style="bold")
    for sentence in contents.sentences():
        say(sentence)
    for table in contents.tables():
        if table.title != LEFT_TO_THE_PAGE:
            say()
            _print_table(table, console)
    say()
    say("Expressed genes (tokens) per cell, all cells", style="bold")
    for line in histogram_lines(contents.measured.genes_per_cell):
        console.print(line, markup=False, highlight=False, no_wrap=True)
    say()
    _print_facts(contents.facts(), console)
    for caution in contents.cautions():
        say(f"Note: {caution}")


def histogram_lines(cells: NDArray[np.int64]) -> list[str]:
    """Return a histogram of whole numbers as lines with bars; `cells` (n,) holds how many cells have each number.

    Steps are round, and the last line holds the hundredth part of the cells that lies furthest out.
    """
    if not cells.any():
        return []
    reached = np.cumsum(cells)
    top = int(np.searchsorted(reached, 0.99 * reached[-1]))
    step = next(m * 10**k for k in range(9) for m in (1, 2, 5) if m * 10**k * MOST_LINES > top)
    sums = np.add.reduceat(cells, np.arange(0, len(cells), step))
    shown = min(top // step + 1, len(sums))
    counts = [*sums[:shown].tolist(), int(sums[shown:].sum())]
    labels = [f"{k * step:,} to {(k + 1) * step - 1:,}" for k in range(shown)] + [f"{shown * step:,} or more"]
    if not counts[-1]:
        counts, labels = counts[:-1], labels[:-1]
    width, most, total = max(map(len, labels)), max(counts), sum(counts)
    return [
        f"{label:>{width}}  {_bar(n / most)} {n:,} ({share(n, total)})" for label, n in zip(labels, counts, strict=True)
    ]


def _bar(filled: float) -> str:
    eighths = round(filled * BAR * 8)
    return "\N{FULL BLOCK}" * (eighths // 8) + " \u258f\u258e\u258d\u258c\u258b\u258a\u2589"[eighths % 8].strip()


def _print_table(table: Table, console: Console) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Drawn
    from rich.text import Text

    console.print(Text(table.title, style="bold"), Text(table.note, style="dim"))
    drawn = Drawn(box=SIMPLE_HEAD, pad_edge=False)
    shown = [k for k, column in enumerate(table.columns) if column not in table.wide]
    for k in shown:
        if k == 0:
            drawn.add_column(Text(table.columns[k]), overflow="fold", min_width=18)
        else:
            left = table.columns[k] in table.text
            drawn.add_column(Text(table.columns[k]), justify="left" if left else "right")
    for row in table.rows[:MOST_ROWS]:
        drawn.add_row(*(Text(row[k], no_wrap=k > 0) for k in shown))
    if len(table.rows) > MOST_ROWS:
        drawn.add_row(Text(f"and {len(table.rows) - MOST_ROWS:,} more, on the page", style="dim"))
    console.print(drawn)


def _print_facts(facts: dict[str, str], console: Console) -> None:
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn.grid(padding=(0, 2))
    drawn.add_column()
    drawn.add_column(overflow="fold")
    for name, text in facts.items():
        drawn.add_row(Text(name, style="dim"), Text(text))
    console.print(drawn)
