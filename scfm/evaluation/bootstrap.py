"""How sure is a difference between two methods, given that other cells might have been held out?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Interval:
    """A difference, its 95 % percentile interval, and the number of units that were resampled."""

    difference: float
    low: float
    high: float
    units: int


def paired_bootstrap(
    codes_a: Sequence[NDArray[np.int64]],
    codes_b: Sequence[NDArray[np.int64]],
    units: Sequence[NDArray],
    n_labels: int,
    score: Callable[[NDArray], NDArray[np.float64]],
    *,
    strata: Sequence[NDArray] | None = None,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Bootstrap score(a) - score(b), averaged over splits, resampling units with both methods' predictions together.

    A unit (a cell, or the donor it comes from) that is held out in several splits is drawn for all of them at once, so
    overlapping test sets do not pass for independent evidence. The fitted methods are held fixed: how much a method
    varies from seed to seed is not in the interval. Efron & Tibshirani 1993, chapter 13 (percentile interval).

    Args:
        codes_a, codes_b: per split (n,) places in the flat (L, L + 1) confusion matrix (`metrics.confusion_codes`).
        units: per split (n,) the unit of each cell.
        n_labels: L.
        score: maps confusion matrices (..., L, L + 1) to scores (...,).
        strata: per split (n,) the group inside which a unit is exchanged for another, the same for all cells of a unit;
            with the true types as strata a rare type cannot drop out of a resample and pull macro scores down.
    """
    from scipy.sparse import csr_matrix

    shape = (n_labels, n_labels + 1)
    distinct, first_cell, unit_of = np.unique(np.concatenate(units), return_index=True, return_inverse=True)
    group = np.concatenate(strata)[first_cell] if strata is not None else np.zeros(len(distinct))
    # number the units group by group, so that a draw inside a group is an offset and a share of the group's size
    rank = np.empty(len(distinct), dtype=np.int64)
    rank[np.argsort(group, kind="stable")] = np.arange(len(distinct))
    unit_of = rank[unit_of]
    _, starts, sizes = np.unique(np.sort(group), return_index=True, return_counts=True)
    start, size = np.repeat(starts, sizes), np.repeat(sizes, sizes)
    bounds = np.cumsum([0, *(len(codes) for codes in codes_a)])

    def by_unit(codes: NDArray[np.int64], split: int) -> csr_matrix:
        """(units, L * (L + 1)): how many cells each unit puts into each place of the confusion matrix."""
        rows = unit_of[bounds[split] : bounds[split + 1]]
        return csr_matrix((np.ones(len(codes)), (rows, codes)), shape=(len(distinct), shape[0] * shape[1]))

    tables = [(by_unit(a, k), by_unit(b, k)) for k, (a, b) in enumerate(zip(codes_a, codes_b, strict=True))]

    def difference(weights: NDArray) -> NDArray[np.float64]:
        """(R,) mean difference over splits, of unit weights (R, units)."""
        scores = [[score((weights @ table).reshape(-1, *shape)) for table in pair] for pair in tables]
        return np.mean([a - b for a, b in scores], axis=0)

    rng = np.random.default_rng(seed)
    n = len(distinct)
    chunk = max(1, 4_000_000 // n)  # keeps the weights of one round near 32 MB
    resampled = []
    for done in range(0, n_resamples, chunk):
        draws = [
            np.bincount(start + (rng.random(n) * size).astype(np.int64), minlength=n)
            for _ in range(min(chunk, n_resamples - done))
        ]
        resampled.append(difference(np.array(draws, dtype=np.float64)))
    low, high = np.percentile(np.concatenate(resampled), [2.5, 97.5])
    return Interval(float(difference(np.ones((1, n)))[0]), float(low), float(high), n)
