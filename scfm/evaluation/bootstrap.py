"""How sure is a difference between two methods, given that other cells, or other donors, might have been held out?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Resampled = Callable[[NDArray[np.float64]], NDArray[np.float64]]
ROUND = 4_000_000  # weights drawn at a time: 32 MB


@dataclass(frozen=True)
class Interval:
    """A difference, its 95 % percentile interval, and the number of units that were resampled."""

    difference: float
    low: float
    high: float
    units: int


def paired_bootstrap(
    scores_a: Sequence[Resampled],
    scores_b: Sequence[Resampled],
    cells: Sequence[NDArray],
    *,
    strata: Sequence[NDArray] | None = None,
    donors: Sequence[NDArray] | None = None,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Bootstrap score(a) - score(b), averaged over splits, resampling cells with both methods' predictions together.

    A cell (or donor) that is held out in several splits is drawn for all of them at once, so overlapping test sets do
    not pass for independent evidence. The fitted methods are held fixed: how much a method varies from seed to seed is
    not in the interval. Efron & Tibshirani 1993, chapter 13 (percentile interval).

    Args:
        scores_a, scores_b: per split the score as a function of weights (R, n) of its n cells, giving (R,).
        cells: per split (n,) what identifies each cell.
        strata: per split (n,) the group inside which a cell is exchanged for another, the same wherever the cell is;
            with the true types as strata a rare type cannot drop out of a resample and pull macro scores down.
        donors: per split (n,) the donor of each cell: donors are drawn, then cells of each drawn donor (hierarchical).
            `units` of the result are then the donors. Goes without strata.
    """
    distinct, first, cell_of = np.unique(np.concatenate(cells), return_index=True, return_inverse=True)
    bounds = np.cumsum([0, *(len(rows) for rows in cells)])
    rows_of = [cell_of[bounds[k] : bounds[k + 1]] for k in range(len(cells))]
    n = len(distinct)

    def difference(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """(R,) mean difference over splits, of weights (R, distinct cells)."""
        pairs = zip(scores_a, scores_b, rows_of, strict=True)
        return np.mean([a(weights[:, rows]) - b(weights[:, rows]) for a, b, rows in pairs], axis=0)

    if donors is not None:
        draw = _hierarchical_draw(np.concatenate(donors)[first])
        units = len(np.unique(np.concatenate(donors)))
    else:
        draw = _draw_within(np.concatenate(strata)[first] if strata is not None else np.zeros(n))
        units = n
    rng = np.random.default_rng(seed)
    at_once = max(1, ROUND // n)
    found = []
    for done in range(0, n_resamples, at_once):
        drawn = [draw(rng) for _ in range(min(at_once, n_resamples - done))]
        found.append(difference(np.array(drawn, dtype=np.float64)))
    # a score that is not defined in a resample (no cell of a kind was drawn) says nothing about the difference
    low, high = np.nanpercentile(np.concatenate(found), [2.5, 97.5])
    return Interval(float(difference(np.ones((1, n)))[0]), float(low), float(high), units)


def _draw_within(group: NDArray) -> Callable[[np.random.Generator], NDArray[np.int64]]:
    """Return what draws as many cells from each group as it has, and says how often each was drawn."""
    n = len(group)
    order = np.argsort(group, kind="stable")  # group by group a draw is an offset and a share of the group's size
    _, starts, sizes = np.unique(group[order], return_index=True, return_counts=True)
    start, size = np.repeat(starts, sizes), np.repeat(sizes, sizes)

    def draw(rng: np.random.Generator) -> NDArray[np.int64]:
        picked = order[start + (rng.random(n) * size).astype(np.int64)]
        return np.bincount(picked, minlength=n)

    return draw


def _hierarchical_draw(donor: NDArray) -> Callable[[np.random.Generator], NDArray[np.int64]]:
    """Return what draws as many donors as there are, then from each as many of its cells as it has."""
    n = len(donor)
    order = np.argsort(donor, kind="stable")
    _, starts, sizes = np.unique(donor[order], return_index=True, return_counts=True)

    def draw(rng: np.random.Generator) -> NDArray[np.int64]:
        donors = rng.integers(len(sizes), size=len(sizes))
        size = np.repeat(sizes[donors], sizes[donors])
        picked = order[np.repeat(starts[donors], sizes[donors]) + (rng.random(len(size)) * size).astype(np.int64)]
        return np.bincount(picked, minlength=n)

    return draw
