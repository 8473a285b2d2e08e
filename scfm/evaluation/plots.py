"""The figures of a report, each returned as PNG bytes: quiet, direct, and safe for colour-blind readers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scfm.evaluation.metrics import METRICS
from scfm.evaluation.protocol import KINDS
from scfm.threads import same_threads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from scfm.evaluation.harness import Comparison

INK, FAINT, RULE = "#1d2433", "#6b7280", "#d9dde3"
# Paul Tol's muted scheme: nine hues that stay apart for all common kinds of colour blindness
HUES = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499")
MARKERS = "os^DvP"
BASELINE_MARKERS = "os^vPX*<>"
WARM = ("#c2410c", "#f59e0b", "#be185d", "#7c2d12", "#eab308")
BLUES = ("#0f4c75", "#2a6f97", "#468faf", "#61a5c2", "#89c2d9", "#a8b3c1")
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.handletextpad": 0.4,
}


@contextmanager
def new_figure(
    width: float, height: float, columns: int = 1, **options: Any
) -> Iterator[tuple[Figure, list[Axes], io.BytesIO]]:
    """Open a figure in scfm's style, outside of pyplot's global state; on leaving, it is drawn into the buffer."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    drawn = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(wspace=0.05))
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, columns, squeeze=False, **options)[0].tolist()
        yield figure, axes, drawn
        # no software version in the file: the same data give the same bytes
        figure.savefig(drawn, format="png", dpi=200, facecolor="white", metadata={"Software": None})


def colours_of(comparison: Comparison) -> dict[str, str]:
    """Return a colour per method: models in warm tones, the best baseline darkest among blues, controls in grey."""
    main = comparison.protocol.main
    ranked = sorted(comparison.names("baseline"), key=lambda name: -comparison.summary(name, main).mean)
    colours = {name: WARM[k % len(WARM)] for k, name in enumerate(comparison.names("model"))}
    colours |= {name: BLUES[min(k, len(BLUES) - 1)] for k, name in enumerate(ranked)}
    return colours | dict.fromkeys(comparison.names("negative control", "positive control"), FAINT)


def _markers(comparison: Comparison) -> dict[str, str]:
    """Return a marker per model (D) and baseline (each its own, as all baselines are blue)."""
    baselines = comparison.names("baseline")
    own = {name: BASELINE_MARKERS[k % len(BASELINE_MARKERS)] for k, name in enumerate(baselines)}
    return dict.fromkeys(comparison.names("model"), "D") | own


def score_dots(comparison: Comparison, metrics: Sequence[str]) -> bytes:
    """Draw every method's score: a dot per seed, a bar at the mean, one panel per metric, a rule between the kinds."""
    colours = colours_of(comparison)
    names = comparison.ranked(*KINDS)[::-1]
    with new_figure(7.2, 0.55 + 0.29 * len(names), len(metrics), sharey=True) as (_, axes, drawn):
        for axis, metric in zip(axes, metrics, strict=True):
            for y, name in enumerate(names):
                values = np.array([run.values[metric] for run in comparison.runs_of(name)])
                axis.plot([values.mean()] * 2, [y - 0.27, y + 0.27], color=colours[name], lw=2.2, solid_capstyle="butt")
                axis.scatter(values, np.full(len(values), y), s=22, color=colours[name], alpha=0.55, lw=0)
                if y and comparison.kinds[name] != comparison.kinds[names[y - 1]]:
                    axis.axhline(y - 0.5, color=RULE, lw=0.8)
            axis.set_title(METRICS[metric].title)
            axis.set_xlim(min(0, axis.get_xlim()[0]), 1.02)
            axis.grid(axis="x")
            axis.spines["left"].set_visible(False)
        axes[0].set_yticks(range(len(names)), names)
        for text, name in zip(axes[0].get_yticklabels(), names, strict=True):
            text.set_fontweight("bold" if comparison.kinds[name] == "model" else "normal")
            text.set_color(FAINT if comparison.kinds[name].endswith("control") else INK)
    return drawn.getvalue()


def umap_of(embedding: NDArray, seed: int = 0) -> NDArray[np.float32]:
    """Return the UMAP of an embedding (n, d), (n, 2): 15 neighbours, Euclidean, scanpy's defaults."""
    import anndata
    import scanpy

    cells = anndata.AnnData(np.asarray(embedding, dtype=np.float32))
    with same_threads():
        scanpy.pp.neighbors(cells, use_rep="X", n_neighbors=min(15, len(embedding) - 1), random_state=seed)
        scanpy.tl.umap(cells, random_state=seed)
    return cells.obsm["X_umap"]


def neighbour_agreement(embedding: NDArray, labels: NDArray[np.str_], n_train: int, neighbours: int = 10) -> float:
    """Return the mean share of a held-out cell's nearest training cells that have its label, in an embedding (n, d)."""
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=min(neighbours, n_train)).fit(embedding[:n_train])
    nearest = index.kneighbors(embedding[n_train:], return_distance=False)
    return float((labels[:n_train][nearest] == labels[n_train:, None]).mean())


def umap_pair(embeddings: Mapping[str, NDArray], labels: NDArray[np.str_], n_train: int) -> bytes:
    """Draw UMAPs side by side: training cells pale, held-out cells on top, types by hue and marker, one legend.

    Args:
        embeddings: title -> (n, d), the training cells first.
        labels: (n,) type of each cell.
        n_train: how many of the n cells trained the methods.
    """
    from matplotlib.lines import Line2D

    names, counts = np.unique(labels, return_counts=True)
    look = {
        name: (HUES[k % len(HUES)], MARKERS[k // len(HUES) % len(MARKERS)])
        for k, name in enumerate(names[np.argsort(-counts)])
    }
    held_out = np.arange(len(labels)) >= n_train
    hue_of, marker_of = (np.array([look[name][k] for name in labels]) for k in (0, 1))
    order = np.random.default_rng(0).permutation(len(labels))  # else the last type covers the others
    large = float(np.clip(9000 / held_out.sum(), 6, 20))
    edged: dict[str, Any] = {"lw": large / 40, "edgecolor": "white", "zorder": 3}
    titles = [fill(title, 66 // len(embeddings)) for title in embeddings]
    lines = max(title.count("\n") + 1 for title in titles)
    # panels, the share of neighbours beneath them, titles above, and the legend
    height = 0.86 * 6.8 / len(embeddings) + 0.5 + 0.18 * lines + 0.2 * -(-len(look) // 3)
    with new_figure(7.2, height, len(embeddings)) as (figure, axes, drawn):
        for axis, title, embedding in zip(axes, titles, embeddings.values(), strict=True):
            points = umap_of(embedding)
            for marker in dict.fromkeys(marker for _, marker in look.values()):
                here = order[marker_of[order] == marker]
                for side, size, style in ((~held_out, 7, {"alpha": 0.28, "lw": 0}), (held_out, large, edged)):
                    rows = here[side[here]]
                    axis.scatter(points[rows, 0], points[rows, 1], s=size, c=hue_of[rows], marker=marker, **style)
            agreement = neighbour_agreement(embedding, labels, n_train)
            axis.set_title(title)
            axis.set_xlabel(f"neighbours of the same type: {agreement:.0%}", color=INK)
            axis.set(xticks=[], yticks=[])
            axis.spines[["left", "bottom"]].set_visible(False)
            axis.set_box_aspect(0.86)
        handles = [
            Line2D([], [], color=hue, marker=marker, ls="", ms=5.5, label=name) for name, (hue, marker) in look.items()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, columnspacing=1.6)
    return drawn.getvalue()


def umap_rows(embeddings: Mapping[str, NDArray], colourings: Mapping[str, NDArray[np.str_]]) -> bytes:
    """Draw the UMAP of each embedding in a column, coloured by one property of the cells in each row.

    Args:
        embeddings: title -> (n, d).
        colourings: what is coloured by -> (n,) names, a legend each.
    """
    from matplotlib.lines import Line2D

    n = len(next(iter(colourings.values())))
    order = np.random.default_rng(0).permutation(n)  # else the last batch covers the others
    with new_figure(7.2, 0.3 + (0.3 + 6.6 / max(len(embeddings), 2)) * len(colourings)) as (figure, (axis,), drawn):
        axis.remove()
        rows = figure.subfigures(len(colourings), 1, squeeze=False)[:, 0]
        points = {title: umap_of(embedding)[order] for title, embedding in embeddings.items()}
        for row, (what, names) in zip(rows, colourings.items(), strict=True):
            kinds, counts = np.unique(names, return_counts=True)
            kinds = kinds[np.argsort(-counts)] if what == next(iter(colourings)) else kinds
            hues = HUES if row is rows[0] else HUES[::-1]  # a batch is not taken for a type
            hue = {kind: hues[k % len(hues)] for k, kind in enumerate(kinds)}
            colours = [hue[name] for name in names[order]]
            for panel, (title, place) in zip(
                row.subplots(1, len(points), squeeze=False)[0], points.items(), strict=True
            ):
                panel.scatter(place[:, 0], place[:, 1], s=max(1.5, min(9, 6000 / n)), c=colours, alpha=0.75, lw=0)
                panel.set_title(fill(title, 72 // len(points)) if row is rows[0] else "")
                panel.set(xticks=[], yticks=[])
                panel.spines[["left", "bottom"]].set_visible(False)
                panel.set_box_aspect(0.95)
            handles = [Line2D([], [], color=hue[kind], marker="o", ls="", ms=5, label=kind) for kind in kinds]
            columns = len(kinds) if sum(map(len, kinds)) + 6 * len(kinds) < 110 else 3
            place_of = {"loc": "outside lower center", "ncols": columns, "columnspacing": 1.4}
            row.legend(handles=handles, title=f"by {what}", **place_of)
    return drawn.getvalue()


def learning_curve(comparison: Comparison, metrics: Sequence[str]) -> bytes:
    """Draw scores by the number of training cells, a panel for each metric: mean over seeds, bars the deviation."""
    colours = colours_of(comparison)
    names = comparison.ranked("model", "baseline")
    markers = _markers(comparison)
    cells = {split.seed: len(split.train) for split in comparison.splits}
    rows = [*comparison.curve, *(row | {"training_cells": cells[row["seed"]]} for row in comparison.rows())]
    with new_figure(7.2, 3.6, len(metrics), sharey=True) as (figure, axes, drawn):
        for axis, metric in zip(axes, metrics, strict=True):
            for name in names:
                found: dict[Any, list[tuple[int, float]]] = {}
                for row in rows:
                    if (row["method"], row["metric"]) == (name, metric):
                        found.setdefault(row.get("cells_per_type"), []).append((row["training_cells"], row["value"]))
                points = sorted((*np.mean(of, axis=0), np.std(of, axis=0)[1]) for of in found.values())
                x, y, spread = np.array(points).T
                model = comparison.kinds[name] == "model"
                style: dict[str, Any] = {"color": colours[name], "lw": 1.8 if model else 1.1}
                axis.errorbar(x, y, spread, marker=markers[name], ms=4, elinewidth=0.8, label=name, **style)
            axis.set_xscale("log")
            axis.set_title(METRICS[metric].title)
            axis.set_xlabel("training cells")
            axis.set_ylim(0, 1.02)
            axis.grid(axis="y")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, columnspacing=1.6)
    return drawn.getvalue()


def confusion(comparison: Comparison, methods: Sequence[str]) -> bytes:
    """Draw confusion matrices side by side, summed over splits: shade by share of the true type, numbers are cells."""
    tables = [np.sum([run.scores.confusion for run in comparison.runs_of(name)], axis=0) for name in methods]
    columns = [*comparison.labels, "other"]
    # the column of labels outside the list is drawn only where somebody used it
    if not any(table[:, -1].any() for table in tables):
        tables, columns = [table[:, :-1] for table in tables], columns[:-1]
    order = np.argsort([-cells for cells in comparison.support], kind="stable")
    n = len(order)
    listed = [*order, *range(n, len(columns))]
    columns = [columns[k] for k in listed]
    longest = max(map(len, columns))
    with new_figure(7.2, 0.9 + 0.22 * n + 0.06 * longest, len(methods), sharey=True) as (_, axes, drawn):
        for axis, name, table in zip(axes, methods, tables, strict=True):
            table = table[np.ix_(order, listed)]
            totals = table.sum(1, keepdims=True)
            share = np.divide(table, totals, out=np.zeros(table.shape), where=totals > 0)
            axis.imshow(share, cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
            if n <= 25:
                for row, column in np.argwhere(table > 0):
                    colour = "white" if share[row, column] > 0.55 else INK
                    place: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 6.5}
                    axis.text(column, row, f"{table[row, column]}", color=colour, **place)
            axis.set_title(name)
            axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7.5)
            axis.set_xlabel("predicted")
            axis.set_xticks(np.arange(-0.5, len(columns)), minor=True)
            axis.set_yticks(np.arange(-0.5, n), minor=True)
            axis.grid(which="minor", color="white", lw=1.2)
            axis.tick_params(which="minor", length=0)
            axis.spines[:].set_visible(False)
        axes[0].set_yticks(range(n), columns[:n], fontsize=7.5)
        axes[0].set_ylabel("true")
    return drawn.getvalue()


def per_class_f1(comparison: Comparison) -> bytes:
    """Draw F1 of every type, commonest first: a dot per method at the mean over seeds, a line over the seeds' range."""
    colours = colours_of(comparison)
    markers = _markers(comparison)
    order = np.argsort(comparison.held_out, kind="stable")
    names = comparison.ranked("model", "baseline")
    with new_figure(7.2, 1.1 + max(0.36, 0.09 * len(names)) * len(order)) as (figure, (axis,), drawn):
        for k, name in enumerate(names):
            runs = [run.scores for run in comparison.runs_of(name)]
            # a type without a held-out cell in a split has no F1 there
            found = [np.where(one.confusion.sum(1) > 0, one.f1, np.nan) for one in runs]
            scores = np.array(found)[:, order]  # (seeds, L)
            y = np.arange(len(order)) + 0.8 * (0.5 - (k + 0.5) / len(names))
            style: dict[str, Any] = {"color": colours[name], "zorder": 3 if comparison.kinds[name] == "model" else 2}
            axis.hlines(y, np.nanmin(scores, axis=0), np.nanmax(scores, axis=0), lw=1.6, alpha=0.45, **style)
            axis.scatter(np.nanmean(scores, axis=0), y, s=24, marker=markers[name], label=name, lw=0, **style)
        labels = [f"{comparison.labels[i]}  ({comparison.held_out[i]:,})" for i in order]
        axis.set_yticks(range(len(order)), labels)
        axis.set_yticks(np.arange(0.5, len(order) - 1), minor=True)
        axis.tick_params(which="minor", length=0)
        axis.grid(axis="y", which="minor")
        axis.grid(axis="x")
        axis.set_xlim(-0.02, 1.02)
        axis.set_ylim(-0.55, len(order) - 0.45)
        axis.set_xlabel("F1 on held-out cells")
        axis.spines["left"].set_visible(False)
        figure.legend(loc="outside upper center", ncols=4 if len(names) < 5 else 3, columnspacing=1.8)
    return drawn.getvalue()


def calibration(comparison: Comparison, methods: Sequence[str]) -> bytes:
    """Draw confidence against accuracy, cells of all splits together, the size of a dot by the cells in its bin.

    Bars are 95 % Wilson intervals of the share that is right.
    """
    colours = colours_of(comparison)
    with new_figure(7.2, 2.9, len(methods), sharey=True) as (_, axes, drawn):
        for axis, name in zip(axes, methods, strict=True):
            found = [run.scores.reliability for run in comparison.runs_of(name) if run.scores.reliability is not None]
            cells = np.sum([one.cells for one in found], axis=0)
            used = cells > 0
            confidence, right = (
                np.sum([getattr(one, value) * one.cells for one in found], axis=0)[used] / cells[used]
                for value in ("confidence", "accuracy")
            )
            axis.plot([0, 1], [0, 1], color=FAINT, lw=0.9, ls=(0, (4, 3)))
            axis.plot(confidence, right, color=colours[name], lw=1.2, alpha=0.6)
            axis.vlines(confidence, *_wilson(right, cells[used]), color=colours[name], lw=1, alpha=0.5)
            axis.scatter(confidence, right, s=12 + 160 * cells[used] / cells.sum(), color=colours[name], lw=0, zorder=3)
            axis.set_title(name)
            axis.set(xlim=(-0.02, 1.04), ylim=(-0.02, 1.04), xlabel="confidence")
            axis.grid()
            axis.set_box_aspect(0.8)
        axes[0].set_ylabel("share of cells labelled right")
    return drawn.getvalue()


def _wilson(share: NDArray, n: NDArray) -> tuple[NDArray, NDArray]:
    """Return the ends of the 95 % interval of shares of n (Wilson 1927), which never leave 0 to 1."""
    z = 1.96
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return middle - half, middle + half
