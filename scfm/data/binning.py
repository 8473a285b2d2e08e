"""Quantile binning of a cell's expressed values, in kernels over many cells.

Bin 0 is zero expression. The edges are the quantiles linspace(0, 1, n_bins - 1) of the cell's non-zero values, linearly
interpolated in float64 exactly as numpy.quantile does; a value falls into the bin that counts the edges at or below it,
so bins run from 1 to n_bins - 1. A value that edges equal is a tie: it may fall into any bin above the edges strictly
below it. Source: Cui et al., "scGPT", Nature Methods 2024, and the released code's `binning`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scfm.compiled import compiled
from scfm.data.random import below, draw32

TABLE = 256
"""Counts below this are sorted by counting and binned by a table; most of a cell's counts are."""
LARGE = np.uint16(TABLE)  # unsigned, or numba takes every index for one that may be negative


@compiled
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
    """Write the bins of rows of counts: row i from bins[starts[i]] on.

    Args:
        offsets, counts: the rows, as in a CSR matrix; no count is zero.
        rows: (n,) rows to bin.
        quantiles: linspace(0, 1, n_bins - 1).
        spread_ties: draw the bin of a tie from all that it may take, keyed by streams[i]; else take the highest.
        streams, starts: (n,) for each row.
        bins: where the bins go.
    """
    edges = np.empty(len(quantiles), np.float64)
    # neighbours are counted in different rows: mostly ones, they would else wait for each other's increment
    held = np.empty((4, TABLE), np.int32)
    longest = (offsets[rows + 1] - offsets[rows]).max()
    large, large_at = np.empty(longest, np.int64), np.empty(longest, np.int64)
    draws = np.empty(longest, np.uint32)  # drawn before they are used, in a loop that vectorises
    # of every small count, the edges below it, and those at or below it; the last entry stands for all large counts,
    # whose bins are found one by one
    below_it, highest = np.zeros(TABLE + 1, np.uint16), np.zeros(TABLE + 1, np.uint16)
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
                large[n_large], large_at[n_large] = row[t], t
                n_large += 1
        _write_edges(held, large[:n_large], len(row), quantiles, edges)
        _count_edges(edges, False, highest)
        out = bins[starts[i] : starts[i] + len(row)]
        if spread_ties:
            _count_edges(edges, True, below_it)
            for t in range(len(row)):
                draws[t] = draw32(streams[i], t)
            for t in range(len(row)):
                entry = min(row[t], LARGE)
                high = int(highest[entry])
                low = min(int(below_it[entry]) + 1, high)
                out[t] = low + below(draws[t], high - low + 1)
        else:
            for t in range(len(row)):
                out[t] = highest[min(row[t], LARGE)]
        for t in large_at[:n_large]:
            out[t] = _search(float(row[t]), edges, spread_ties, streams[i], t)


@compiled
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
    """Write the bins of rows of any values, read as float32, by sorting; the arguments are those of `bin_counts`."""
    edges = np.empty(len(quantiles), np.float64)
    for i in range(len(rows)):
        row = values[offsets[rows[i]] : offsets[rows[i] + 1]].astype(np.float32)
        if len(row) == 0:
            continue
        order = _ascending(row)
        ordered = row[order]
        edges_of_reals(ordered, quantiles, edges)
        out = bins[starts[i] : starts[i] + len(row)]
        below_it, highest = 0, 0  # edges below the value, and edges at or below it
        for t in range(len(row)):
            while highest < len(edges) and edges[highest] <= ordered[t]:
                highest += 1
            out[order[t]] = highest
            if spread_ties:
                while below_it < len(edges) and edges[below_it] < ordered[t]:
                    below_it += 1
                lowest = min(below_it + 1, highest)
                out[order[t]] = lowest + below(draw32(streams[i], order[t]), highest - lowest + 1)


@compiled
def _ascending(row: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the places of the values in ascending order: a radix sort, a byte at a time from the lowest.

    As unsigned numbers, the bits of floats come in the order of the floats once the sign bit is turned over, and all
    bits of a negative one. A comparison sort would mispredict every other branch.
    """
    words, n = row.view(np.uint32), len(row)
    keys, held = np.empty(n, np.uint32), np.zeros((4, 256), np.int64)
    for t in range(n):
        flip = np.uint32(0xFFFFFFFF) if words[t] >> np.uint32(31) else np.uint32(0x80000000)
        keys[t] = words[t] ^ flip
        for digit in range(4):
            held[digit, (keys[t] >> np.uint32(8 * digit)) & np.uint32(255)] += 1
    order, spare = np.arange(n), np.empty(n, np.int64)
    for digit in range(4):
        place = np.cumsum(held[digit]) - held[digit]
        for at in order:
            byte = (keys[at] >> np.uint32(8 * digit)) & np.uint32(255)
            spare[place[byte]] = at
            place[byte] += 1
        order, spare = spare, order
    return order


@compiled
def edges_of_reals(ordered: NDArray[np.floating], quantiles: NDArray[np.float64], edges: NDArray[np.float64]) -> None:
    """Write the quantiles, (n_bins - 1,), of a cell's values in ascending order, as numpy.quantile gives them."""
    for j in range(len(quantiles)):
        rank = (len(ordered) - 1) * quantiles[j]
        k = int(rank)
        after = ordered[min(k + 1, len(ordered) - 1)]
        edges[j] = _interpolate(float(ordered[k]), float(after), rank - k)


@compiled
def _interpolate(low: float, high: float, weight: float) -> float:
    """Return the point between two values as numpy.quantile rounds it: from the nearer end."""
    step = high - low
    if weight >= 0.5:
        return high - step * (1.0 - weight)
    return low + step * weight


@compiled
def _search(value: float, edges: NDArray[np.float64], spread_ties: bool, stream: int, index: int) -> int:
    """Return the bin of a value: the highest it may take, or one drawn from all that it may take."""
    highest = int(np.searchsorted(edges, value, side="right"))
    if spread_ties:
        lowest = min(int(np.searchsorted(edges, value, side="left")) + 1, highest)
        return lowest + below(draw32(stream, index), highest - lowest + 1)
    return highest


@compiled
def _write_edges(
    held: NDArray[np.int32],
    large: NDArray[np.int64],
    n: int,
    quantiles: NDArray[np.float64],
    edges: NDArray[np.float64],
) -> None:
    """Write the edges of a cell.

    Args:
        held: (4, TABLE) how often each small count was seen, in four parts; summed in place.
        large: the counts from TABLE on; sorted in place.
        n: number of counts.
        quantiles, edges: (n_bins - 1,).
    """
    total = held[0]
    for count in range(TABLE):
        total[count] += held[1, count] + held[2, count] + held[3, count]
    large.sort()
    _edges_of_counts(total, large, n, quantiles, edges)


@compiled
def _count_edges(edges: NDArray[np.float64], strictly: bool, table: NDArray[np.uint16]) -> None:
    """Write how many of the edges, ascending, lie at or below each count up to TABLE - 1, or strictly below it."""
    at = 0
    for j in range(len(edges)):
        whole = int(min(edges[j], float(TABLE)))
        # the first count that the edge is below, or at or below; counts up to there have j edges
        first = min(whole + int(strictly or whole < edges[j]), TABLE)
        for count in range(at, first):
            table[count] = j
        at = max(at, first)
    for count in range(at, TABLE):
        table[count] = len(edges)


@compiled
def _edges_of_counts(
    total: NDArray[np.int32],
    large: NDArray[np.int64],
    n: int,
    quantiles: NDArray[np.float64],
    edges: NDArray[np.float64],
) -> None:
    """Write the quantiles of n counts, given how often each small one occurs and the large ones in order."""
    n_small = n - len(large)
    count, reached = 0, total[0]  # `reached` of the counts are at most `count`
    for j in range(len(quantiles)):
        rank = (n - 1) * quantiles[j]
        k = int(rank)
        after = min(k + 1, n - 1)
        if k >= n_small:
            at_k = large[k - n_small]
        else:
            while reached <= k:
                count += 1
                reached += total[count]
            at_k = count
            if reached > after:  # mostly: the same count follows, and nothing lies between
                edges[j] = float(count)
                continue
        if after >= n_small:
            at_after = large[after - n_small]
        else:
            at_after = at_k + 1
            while total[at_after] == 0:
                at_after += 1
        edges[j] = _interpolate(float(at_k), float(at_after), rank - k)
