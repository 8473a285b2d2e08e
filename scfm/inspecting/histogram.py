"""Histograms of positive numbers of any size in bounded memory.

A bin is the float32 of a number without its last 17 bits: 64 bins between a number and its double, and whole numbers
below 128 in bins of their own. A quantile read from it is off by less than 1 %.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CUT = 17
N_BINS = 254 << 23 - CUT  # up to 2^127; what is larger counts with the largest
# whole numbers from 1 to 2^32 - 1, which is all that genes and counts of a cell can be
FIRST_WHOLE, END_WHOLE = 127 << 23 - CUT, 159 << 23 - CUT
N_WHOLE = END_WHOLE - FIRST_WHOLE


def bins_of(values: NDArray) -> NDArray[np.int64]:
    """Return the bin of each of some positive numbers, (n,)."""
    return (values.astype(np.float32).view(np.uint32) >> CUT).astype(np.int64)


def lower_edges(bins: NDArray[np.int64], cut: int = CUT) -> NDArray[np.float64]:
    """Return the smallest number of each bin, (n,); a larger `cut` means wider bins."""
    return (bins.astype(np.uint32) << np.uint32(cut)).view(np.float32).astype(np.float64)


def middles(first: int = 0, n_bins: int = N_BINS, *, whole: bool = False) -> NDArray[np.float64]:
    """Return the number that stands for each bin: its middle, or where numbers are whole, the middle of those in it."""
    edges = lower_edges(np.arange(first, first + n_bins + 1))
    low, high = edges[:-1], edges[1:]
    return (np.ceil(low) + np.ceil(high) - 1) / 2 if whole else (low + high) / 2


def quantiles(counts: NDArray[np.integer], values: NDArray[np.floating], shares: list[float]) -> NDArray[np.float64]:
    """Return quantiles of binned numbers.

    Args:
        counts: (..., n) how many numbers each bin holds.
        values: (n,) what stands for each bin, ascending.
        shares: (q,) between 0 and 1.

    Returns:
        (..., q); nan where there are no numbers.
    """
    reached = np.cumsum(counts, axis=-1, dtype=np.int64)
    totals = reached[..., -1]
    found = np.full((*totals.shape, len(shares)), np.nan)
    for q, share in enumerate(shares):
        # the lower of the two middle ones, where there are two
        wanted = np.maximum(np.ceil(share * totals), 1).astype(np.int64)
        place = (reached < wanted[..., None]).sum(-1)
        found[..., q] = np.where(totals > 0, values[np.minimum(place, len(values) - 1)], np.nan)
    return found


def coarse(counts: NDArray[np.integer], values: NDArray[np.floating]) -> tuple[NDArray, NDArray]:
    """Return (edges (k + 1,), counts (k,)) of binned numbers in 8 bins per doubling, from the first used to the last.

    Edges of 8 and more are whole numbers, so that no bin has more whole numbers than its width.
    """
    used = np.flatnonzero(counts)
    wide = bins_of(values[used]) >> 3
    first = int(wide[0])
    summed = np.bincount(wide - first, weights=counts[used]).astype(np.int64)
    return lower_edges(np.arange(first, first + len(summed) + 1), CUT + 3), summed
