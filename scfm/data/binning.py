"""Quantile binning of a cell's expressed values, in kernels over many cells.

Bin 0 is zero expression. The edges are the quantiles linspace(0, 1, n_bins - 1) of the cell's non-zero values, linearly
interpolated in float64 exactly as numpy.quantile does; a value falls into the bin that counts the edges at or below it,
so bins run from 1 to n_bins - 1. A value that edges equal is a tie: it may fall into any bin above the edges strictly
below it.
Source: Cui et al., "scGPT", Nature Methods 2024, and the released code's `binning`.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from scfm.data.random import below, draw32

TABLE = 256
"""Counts below this are sorted by counting; most of a cell's counts are."""


@njit(nogil=True, cache=True)
def _interpolate(low: float, high: float, weight: float) -> float:
    """Return the point between two values as numpy.quantile rounds it: from the nearer end."""
    step = high - low
    if weight >= 0.5:
        return high - step * (1.0 - weight)
    return low + step * weight


@njit(nogil=True, cache=True)
def _place(value: float, edges: NDArray[np.float64]) -> tuple[int, int]:
    """Return the edges strictly below a value, and the edges at or below it."""
    return int(np.searchsorted(edges, value, side="left")), int(np.searchsorted(edges, value, side="right"))


@njit(nogil=True, cache=True)
def _choose(strictly_below: int, at_or_below: int, spread_ties: bool, stream: int, index: int) -> int:
    """Return the bin of a value: the highest it may take, or one drawn from all that it may take."""
    if spread_ties and at_or_below > strictly_below:
        return strictly_below + 1 + below(draw32(stream, index), at_or_below - strictly_below)
    return at_or_below


@njit(nogil=True, cache=True)
def bin_reals(
    offsets: NDArray[np.integer],
    values: NDArray[np.floating],
    rows: NDArray[np.int64],
    quantiles: NDArray[np.float64],
    spread_ties: bool,
    streams: NDArray[np.uint64],
    starts: NDArray[np.int64],
    bins: NDArray[np.uint16],
) -> None:
    """Write the bins of the given rows' values of any kind: row i from bins[starts[i]] on, ties keyed by streams[i]."""
    edges = np.empty(len(quantiles), np.float64)
    for i in range(len(rows)):
        row = values[offsets[rows[i]] : offsets[rows[i] + 1]]
        if len(row) == 0:
            continue
        ordered = np.sort(row)
        for j in range(len(quantiles)):
            rank = (len(row) - 1) * quantiles[j]
            k = int(rank)
            high = ordered[min(k + 1, len(row) - 1)]
            edges[j] = _interpolate(float(ordered[k]), float(high), rank - k)
        for t in range(len(row)):
            strictly_below, at_or_below = _place(float(row[t]), edges)
            bins[starts[i] + t] = _choose(strictly_below, at_or_below, spread_ties, streams[i], t)


@njit(nogil=True, cache=True)
def _edges_of_counts(
    held: NDArray[np.int32], large: NDArray, n: int, quantiles: NDArray[np.float64], edges: NDArray[np.float64]
) -> None:
    """Write the quantiles of n counts, given how often each small count occurs and the large ones in order."""
    n_small = n - len(large)
    low, reached = 0, held[0]  # `reached` values are at most `low`
    for j in range(len(quantiles)):
        rank = (n - 1) * quantiles[j]
        k = int(rank)
        if k >= n_small:
            at_k = np.int64(large[k - n_small])
        else:
            while reached <= k:
                low += 1
                reached += held[low]
            at_k = np.int64(low)
        after = min(k + 1, n - 1)
        if after >= n_small:
            at_next = np.int64(large[after - n_small])
        else:
            at_next = np.int64(low)
            if reached <= after:
                at_next += 1
                while held[at_next] == 0:
                    at_next += 1
        edges[j] = _interpolate(float(at_k), float(at_next), rank - k)


@njit(nogil=True, cache=True)
def bin_counts(
    offsets: NDArray[np.integer],
    counts: NDArray[np.unsignedinteger],
    rows: NDArray[np.int64],
    quantiles: NDArray[np.float64],
    spread_ties: bool,
    streams: NDArray[np.uint64],
    starts: NDArray[np.int64],
    bins: NDArray[np.uint16],
) -> None:
    """Write the same bins as `bin_reals`, faster: small counts are sorted by counting and binned by a table."""
    edges = np.empty(len(quantiles), np.float64)
    # neighbours are counted in different rows: mostly ones, they would else wait for each other's increment
    held = np.empty((4, TABLE), np.int32)
    strictly_below, at_or_below = np.empty(TABLE, np.int32), np.empty(TABLE, np.int32)
    longest = 0
    for i in range(len(rows)):
        longest = max(longest, offsets[rows[i] + 1] - offsets[rows[i]])
    large = np.empty(longest, counts.dtype)
    for i in range(len(rows)):
        row = counts[offsets[rows[i]] : offsets[rows[i] + 1]]
        if len(row) == 0:
            continue
        held[:] = 0
        n_large = 0
        for t in range(len(row)):
            if row[t] < TABLE:
                held[t & 3, row[t]] += 1
            else:
                large[n_large] = row[t]
                n_large += 1
        total = held[0] + held[1] + held[2] + held[3]
        large[:n_large].sort()
        _edges_of_counts(total, large[:n_large], len(row), quantiles, edges)

        passed = 0
        for count in range(TABLE):
            if total[count]:
                while passed < len(edges) and edges[passed] < count:
                    passed += 1
                strictly_below[count] = passed
                while passed < len(edges) and edges[passed] <= count:
                    passed += 1
                at_or_below[count] = passed

        for t in range(len(row)):
            if row[t] < TABLE:
                lowest, highest = strictly_below[row[t]], at_or_below[row[t]]
            else:
                lowest, highest = _place(float(row[t]), edges)
            bins[starts[i] + t] = _choose(lowest, highest, spread_ties, streams[i], t)
