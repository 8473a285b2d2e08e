"""The figures of the page on a shard directory, each returned as PNG bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scfm.data.store import ValueKind
from scfm.evaluation.plots import FAINT, HUES, new_figure
from scfm.inspecting.histogram import coarse, lower_edges, middles, quantiles
from scfm.inspecting.measuring import Groups, Measured
from scfm.inspecting.tables import WHOLE, count_sizes, percentiles, rounded

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DARK, LIGHT, STRONG = "#0f4c75", "#a8c5dd", "#c2410c"
REST, NONE = "#b9bec7", "#e6e8ec"
MOST_ROWS = 20
MOST_HUES = 8


def per_cell(measured: Measured, value_kind: ValueKind) -> bytes:
    """Draw how many genes a cell expresses and, for counts, how many counts it has, both on logarithmic axes."""
    shown = [(measured.genes_per_cell, np.arange(len(measured.genes_per_cell)) * 1.0, "expressed genes per cell")]
    if value_kind == "counts":
        shown.append((measured.totals, WHOLE, "counts per cell"))
    with new_figure(7.2, 2.8, len(shown)) as (_, axes, drawn):
        for axis, (counts, values, what) in zip(axes, shown, strict=True):
            positive = np.where(values > 0, counts, 0)
            _histogram(axis, *coarse(positive, values))
            low, median, high = percentiles(counts, values)
            ends = quantiles(counts, values, [0.0005, 0.9995])
            for at, style in ((low, ":"), (median, "-"), (high, ":")):
                axis.axvline(max(at, 1), color=STRONG, lw=1.1, ls=style)
            axis.set_xscale("log")
            axis.set_xlim(max(ends[0], 1) / 1.2, max(ends[1], 1) * 1.2)
            _plain_log_ticks(axis)
            axis.set_xlabel(what)
            said = rounded(median) if values is WHOLE else f"{median:,.0f}"
            axis.set_title(f"median {said}", fontweight="normal", color=STRONG)
        axes[0].set_ylabel("share of cells per doubling")
    return drawn.getvalue()


def _histogram(axis: Axes, edges: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
    """Draw a histogram whose area over a logarithmic axis is the share of cells."""
    edges = np.ceil(edges)  # numbers are whole: below 8, bins end where the next one begins
    wide = np.diff(edges) > 0
    starts, ends = edges[:-1][wide], edges[1:][wide]
    height = counts[wide] / counts.sum() / np.log2(ends / np.maximum(starts, 0.5))
    axis.bar(starts, height, ends - starts, align="edge", color=LIGHT, lw=0)
    axis.step(np.append(starts, ends[-1]), np.append(height, height[-1]), where="post", color=DARK, lw=1)
    axis.set_ylim(bottom=0)
    axis.grid(axis="y")


def _plain_log_ticks(axis: Axes) -> None:
    low, high = axis.get_xlim()
    at = [m * 10**k for k in range(12) for m in (1, 2, 5) if low <= m * 10**k <= high]
    if len(at) > 7:
        at = [tick for tick in at if str(tick)[0] == "1"]
    axis.set_xticks(at, [_short(tick) for tick in at])
    axis.minorticks_off()


def _short(number: int) -> str:
    for unit, name in ((1_000_000, "M"), (1_000, "k")):
        if number >= unit:
            return f"{number / unit:g}{name}"
    return f"{number:g}"


def values(measured: Measured, value_kind: ValueKind) -> bytes:
    """Draw how large counts are, by number and by what they add up to; or the histogram of normalised values."""
    with new_figure(7.2, 2.7) as (figure, (axis,), drawn):
        if value_kind == "normalised":
            top = float(quantiles(measured.values, middles(), [0.999])[0])
            edges = np.linspace(0, top, 61)
            inside = lower_edges(np.flatnonzero(measured.values))
            heights, _ = np.histogram(inside, edges, weights=measured.values[measured.values > 0])
            axis.bar(edges[:-1], heights / measured.values.sum(), edges[1] - edges[0], align="edge", color=DARK, lw=0)
            axis.set_xlabel("normalised value (the largest 0.1% are beyond)")
            axis.set_ylabel("share of values")
        else:
            sizes = count_sizes(measured)
            n, total = sum(v for _, v, _ in sizes), sum(c for _, _, c in sizes)
            x = np.arange(len(sizes))
            pair: list[tuple[float, str, str, list[float]]] = [
                (-0.2, DARK, "values of this size", [v / n for _, v, _ in sizes]),
                (0.2, LIGHT, "what they add up to", [c / total for _, _, c in sizes]),
            ]
            for shift, colour, label, shares in pair:
                axis.bar(x + shift, shares, 0.38, color=colour, label=label, lw=0)
                for at, one in zip(x + shift, shares, strict=True):
                    place: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 6.5, "color": FAINT}
                    axis.text(at, one, f"{one:.0%}" if one >= 0.005 else "<1%", **place)
            axis.set_xticks(x, [label.replace(" to ", "\N{EN DASH}").replace(" or more", "+") for label, _, _ in sizes])
            axis.set_xlabel("count of a gene in a cell")
            axis.set_ylabel("share")
            figure.legend(loc="outside upper right", ncols=2)
        axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axis.grid(axis="y")
    return drawn.getvalue()


def genes(measured: Measured) -> bytes:
    """Draw how common genes are: the share of cells by rank, and what the commonest add up to."""
    cells = np.sort(measured.gene_cells)[::-1]
    sums = np.sort(measured.gene_sums)[::-1]
    rank = np.arange(1, len(cells) + 1)
    seen = int((cells > 0).sum())
    with new_figure(7.2, 2.7, 2) as (_, (left, right), drawn):
        left.plot(rank[:seen], cells[:seen] / max(1, measured.sampled), color=DARK, lw=1.6)
        left.axvline(seen, color=STRONG, lw=1.1, ls=":")
        place: dict[str, Any] = {"fontsize": 7.5, "color": STRONG, "va": "bottom", "ha": "right"}
        left.text(seen * 0.85, 0.02, f"{seen:,} genes are seen", transform=left.get_xaxis_transform(), **place)
        left.set(
            xscale="log", yscale="log", xlabel="genes, the commonest first", ylabel="share of cells that express it"
        )
        left.yaxis.set_major_formatter(lambda share, _: f"{share:.4%}".rstrip("0%").rstrip(".") + "%")
        right.plot(rank, np.cumsum(sums) / max(sums.sum(), 1e-30), color=DARK, lw=1.6)
        right.set(
            xscale="log", ylim=(0, 1.03), xlabel="genes, those with most counts first", ylabel="share of all counts"
        )
        right.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        for axis in (left, right):
            _plain_log_ticks(axis)
            axis.grid()
    return drawn.getvalue()


def lengths_by_group(groups: list[Groups], measured: Measured) -> bytes:
    """Draw the expressed genes per cell of each category: 5 to 95 % a line, the middle half a bar, the median a dot."""
    shown = {group.name: _largest(group) for group in groups}
    rows = max(len(kept) for kept in shown.values())
    with new_figure(7.2, 1.0 + 0.2 * rows, len(groups)) as (_, axes, drawn):
        for axis, group in zip(axes, groups, strict=True):
            kept = shown[group.name]
            assert group.genes is not None
            low, first, median, third, high = quantiles(group.genes[kept], WHOLE, [0.05, 0.25, 0.5, 0.75, 0.95]).T
            y = np.arange(len(kept))
            axis.hlines(y, low, high, color=LIGHT, lw=1.2)
            axis.hlines(y, first, third, color=LIGHT, lw=6)
            axis.scatter(median, y, s=16, color=DARK, zorder=3, lw=0)
            axis.set_yticks(y, [_cut(group.categories[k], 30 if len(groups) > 1 else 60) for k in kept], fontsize=7.5)
            axis.set_ylim(rows - 0.4, -0.6)
            axis.set_xscale("log")
            _plain_log_ticks(axis)
            axis.set_title(_title(group.name, kept, group))
            axis.set_xlabel("expressed genes per cell")
            axis.grid(axis="x")
            axis.spines["left"].set_visible(False)
    return drawn.getvalue()


def composition(sources: Groups, group: Groups, measured: Measured) -> bytes:
    """Draw the cells of each source, the colours being the categories of a column."""
    kept = _largest(sources)
    table = measured.pairs[group.name]
    order = np.argsort(-table.sum(0), kind="stable")
    order = order[table.sum(0)[order] > 0]
    coloured = order[:MOST_HUES] if len(order) > MOST_HUES + 1 else order
    parts = [(_cut(group.categories[k], 40), table[kept, k], HUES[i]) for i, k in enumerate(coloured.tolist())]
    if len(order) > len(coloured):
        parts.append((f"{len(order) - len(coloured):,} others", table[kept][:, order[len(coloured) :]].sum(1), REST))
    if (missing := sources.cells[kept] - table[kept].sum(1)).any():
        parts.append(("no value", missing, NONE))
    with new_figure(7.2, max(0.8 + 0.19 * len(kept), 0.5 + 0.17 * len(parts))) as (figure, (axis,), drawn):
        left = np.zeros(len(kept))
        for label, cells, colour in parts:
            axis.barh(np.arange(len(kept)), cells, left=left, height=0.72, color=colour, label=label, lw=0)
            left += cells
        axis.xaxis.set_major_formatter(lambda cells, _: _short(int(cells)))
        axis.set_title(_title("source", kept, sources))
        axis.set_xlabel("cells")
        axis.grid(axis="x")
        axis.spines["left"].set_visible(False)
        axis.set_yticks(range(len(kept)), [_cut(sources.categories[k], 36) for k in kept], fontsize=7.5)
        axis.set_ylim(len(kept) - 0.4, -0.6)
        figure.legend(loc="outside right upper", fontsize=7.5, title=group.name, alignment="left")
    return drawn.getvalue()


def _largest(group: Groups) -> NDArray[np.int64]:
    order = np.argsort(-group.cells, kind="stable")[:MOST_ROWS]
    return order[group.cells[order] > 0]


def _title(name: str, kept: NDArray[np.int64], group: Groups) -> str:
    used = int((group.cells > 0).sum())
    return name if len(kept) == used else f"{name}: the largest {len(kept)} of {used:,}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"
