"""The figures of a study: what each level of each factor changes, pairs of factors, and how much each matters."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scfm.evaluation.metrics import METRICS
from scfm.evaluation.plots import BLUES, FAINT, INK, RULE, WARM, new_figure
from scfm.evaluation.study_results import Study

MOST_FACTORS = 4  # pairs of more would not fit a page
STAGGERED = (8, -8, 16, -16)  # points between a dot and its name: neighbours stand above one another


def sensitivity(study: Study) -> bytes:
    """Draw the mean validation score of every level, a row per factor, the one that moves it most on top."""
    ranked = study.sensitivities()[::-1]
    baseline = study.best(study.baselines)
    with new_figure(7.2, 0.9 + 0.6 * len(ranked)) as (_, (axis,), drawn):
        for y, one in enumerate(ranked):
            axis.plot([min(one.means), max(one.means)], [y, y], color=RULE, lw=3, zorder=1, solid_capstyle="butt")
            order = np.argsort(one.means)
            for place, k in enumerate(order):
                axis.scatter(one.means[k], y, s=26, color=WARM[0], lw=0, zorder=3)
                height = STAGGERED[place % len(STAGGERED)]
                style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 6.5}
                axis.annotate(one.levels[k], (one.means[k], y), (0, height), textcoords="offset points", **style)
        axis.axvline(study.summary(study.default, study.main).mean, color=INK, lw=0.9, ls=(0, (4, 3)))
        if baseline is not None:
            axis.axvline(study.summary(baseline, study.main).mean, color=BLUES[0], lw=0.9, ls=":")
        axis.set_yticks(range(len(ranked)), [one.factor for one in ranked])
        axis.set_ylim(-0.6, len(ranked) - 0.4)
        axis.margins(x=0.06)
        axis.set_xlabel(f"{METRICS[study.main].title} on validation cells")
        axis.grid(axis="x")
        axis.spines["left"].set_visible(False)
    return drawn.getvalue()


def effects(study: Study) -> bytes:
    """Draw the change from the default of every metric by every other level: orange is worse, blue better."""
    metrics = study.plan.protocol.metrics
    names, rows = [], []
    for k, factor in enumerate(study.plan.factors):
        marginals = {metric: study.marginal(k, metric) for metric in metrics}
        for level in range(len(factor.levels)):
            if level == factor.default or level not in marginals[study.main].levels:
                continue
            change = [
                _change(marginals[metric].levels, marginals[metric].scores, level, factor.default) for metric in metrics
            ]
            names.append(f"{factor.name}  {factor.shown(level)}")
            rows.append(change)
    table = np.array(rows)  # (levels, metrics)
    signs = np.array([1 if METRICS[metric].higher_is_better else -1 for metric in metrics])
    largest = max(np.nanmax(np.abs(table)), 1e-3)
    with new_figure(7.2, 0.9 + 0.26 * len(names)) as (_, (axis,), drawn):
        axis.imshow(table * signs, cmap="RdBu", vmin=-1.3 * largest, vmax=1.3 * largest, aspect="auto")
        for row, column in np.argwhere(~np.isnan(table)):
            strong = abs(table[row, column]) > 0.75 * largest
            text = f"{table[row, column]:+.3f}".replace("-", "\u2212")
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if strong else INK)
        axis.set_yticks(range(len(names)), names)
        axis.set_xticks(range(len(metrics)), [METRICS[one].title for one in metrics], rotation=20, ha="left")
        axis.xaxis.tick_top()
        axis.spines[:].set_visible(False)
    return drawn.getvalue()


def _change(levels: list[int], scores: NDArray[np.float64], level: int, default: int) -> float:
    """Return the mean difference to the default's level, NaN where one of the two has no score."""
    if level not in levels or default not in levels:
        return float("nan")
    return float((scores[levels.index(level)] - scores[levels.index(default)]).mean())


def pairs(study: Study) -> bytes:
    """Draw the mean main score by every pair of the factors that matter most: a grid of heat maps, one scale."""
    names = [factor.name for factor in study.plan.factors]
    shown = [names.index(one.factor) for one in study.sensitivities()[:MOST_FACTORS]]
    panels = [(a, b, _by_pair(study, a, b)) for a, b in combinations(shown, 2)]
    values = np.concatenate([table[~np.isnan(table)] for _, _, table in panels])
    columns = min(3, len(panels))
    n_rows = -(-len(panels) // columns)
    with new_figure(7.2, 0.2 + 2.3 * n_rows) as (figure, (axis,), drawn):
        axis.remove()
        places = figure.subplots(n_rows, columns, squeeze=False).ravel()
        for place, (a, b, table) in zip(places, panels, strict=False):
            place.imshow(
                table, cmap="viridis", vmin=values.min(), vmax=max(values.max(), values.min() + 1e-3), aspect="auto"
            )
            middle = (values.min() + values.max()) / 2
            for row, column in np.ndindex(*table.shape):
                value = table[row, column]
                text, colour = ("–", FAINT) if np.isnan(value) else (f"{value:.2f}", "white" if value < middle else INK)
                place.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
            first, second = study.plan.factors[a], study.plan.factors[b]
            place.set_yticks(range(len(first.levels)), [first.shown(k) for k in range(len(first.levels))])
            place.set_xticks(
                range(len(second.levels)), [second.shown(k) for k in range(len(second.levels))], rotation=20, ha="right"
            )
            place.set(ylabel=first.name, xlabel=second.name)
            place.spines[:].set_visible(False)
        for place in places[len(panels) :]:
            place.remove()
    return drawn.getvalue()


def _by_pair(study: Study, a: int, b: int) -> NDArray[np.float64]:
    """Return (levels of a, levels of b) mean main scores over seeds and settings of the other factors; NaN for none.

    All cells are over the same settings, those in which most of the pairs came to an end: else two cells would differ
    by what else was tried there.
    """
    scores: dict[tuple[int, ...], dict[tuple[int, int], float]] = {}
    for one in study.plan.configurations:
        values = study.values(one.name, study.main)
        if one.reason is None and not np.isnan(values).any():
            others = tuple(level for k, level in enumerate(one.levels) if k not in (a, b))
            scores.setdefault(others, {})[one.levels[a], one.levels[b]] = float(values.mean())
    counted = Counter(frozenset(group) for group in scores.values())
    there = max(counted, key=lambda cells: (len(cells), counted[cells]))
    alike = [group for group in scores.values() if set(group) == there]
    table = np.full([len(study.plan.factors[k].levels) for k in (a, b)], np.nan)
    for cell in there:
        table[cell] = np.mean([group[cell] for group in alike])
    return table
