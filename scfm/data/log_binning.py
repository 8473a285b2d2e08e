"""Bins of whole powers of two of a cell's normalised expression, as scBERT reads it, in kernels over many cells.

The bin of a count is floor(log2(1 + 10,000 * count / total)), at most n_bins - 1; the total is that of the cell over
the genes of the vocabulary, expressed or not. The original takes the logarithm in float32 and cuts its fraction off.
Here a count's bin is the number of k from 1 on with 10,000 * count >= (2^k - 1) * total, in whole numbers: the same
bins (a test compares them), without a logarithm, and right at the edges whatever the platform's logarithm does.
Source: Yang et al., "scBERT", Nature Machine Intelligence 2022.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scfm.compiled import compiled
from scfm.data.expression import LARGEST_COUNT
from scfm.data.store import CellStore
from scfm.errors import ScfmError

TARGET = 10_000
SAMPLED_CELLS = 200
ROUNDING = 1e-3
HIGHEST = 13
"""The bin of a gene that has all the counts of its cell: floor(log2(10,001))."""


def check_logarithms(store: CellStore) -> None:
    """Refuse normalised cells whose values cannot be log2(1 + expression per 10,000), as far as a sample of them shows.

    Raises ScfmError where a value is above log2(10,001), or where most cells are whole under natural logarithms: their
    values then say 10,000 in all, which by base 2 they do not. Cells cut to few genes cannot be told by their sum.
    """
    if store.value_kind == "counts" or store.n_cells == 0:
        return
    rows = np.unique(np.linspace(0, store.n_cells - 1, SAMPLED_CELLS).astype(np.int64))
    whole = 0
    for block, place in zip(*store.locate(rows), strict=True):
        held = store.blocks[block]
        values = held.values[held.offsets[place] : held.offsets[place + 1]].astype(np.float64)
        if values.max(initial=0) > np.log2(1 + TARGET) + ROUNDING:
            raise ScfmError(
                f"data.values: log2 takes normalised values as log2(1 + expression per 10,000), which end at "
                f"{np.log2(1 + TARGET):.1f}; these cells hold {values.max():.4g}. Give raw counts, or normalise them so"
            )
        whole += abs(np.expm1(values).sum() / TARGET - 1) < ROUNDING
    if whole > len(rows) / 2:
        raise ScfmError(
            "data.values: log2 takes normalised values as log2(1 + expression per 10,000); these cells hold natural "
            "logarithms (log1p). Give raw counts, or divide the values by ln 2"
        )


@compiled
def log2_of_counts(
    offsets: NDArray[np.integer],
    counts: NDArray[np.unsignedinteger],
    rows: NDArray[np.int64],
    n_bins: int,
    starts: NDArray[np.int64],
    bins: NDArray[np.uint16],
) -> None:
    """Write the bins of rows of counts: row i from bins[starts[i]] on.

    Args:
        offsets, counts: the rows, as in a CSR matrix.
        rows: (n,) rows to bin.
        n_bins: bins run from 0 to n_bins - 1.
        starts: (n,) for each row.
        bins: where the bins go.
    """
    for i in range(len(rows)):
        row = counts[offsets[rows[i]] : offsets[rows[i] + 1]]
        out = bins[starts[i] : starts[i] + len(row)]
        total = np.uint64(0)
        for t in range(len(row)):
            total += np.uint64(row[t])
        out[:] = 0
        for k in range(1, min(n_bins - 1, HIGHEST) + 1):
            least = (np.uint64(2**k - 1) * total + np.uint64(TARGET - 1)) // np.uint64(TARGET)
            if least > np.uint64(LARGEST_COUNT):
                break
            edge = np.uint32(least)
            for t in range(len(row)):
                out[t] += np.uint16(np.uint32(row[t]) >= edge)


@compiled
def log2_of_reals(
    offsets: NDArray[np.integer],
    values: NDArray[np.floating],
    rows: NDArray[np.int64],
    n_bins: int,
    starts: NDArray[np.int64],
    bins: NDArray[np.uint16],
) -> None:
    """Write the bins of rows that hold log2(1 + expression per 10,000) already; the arguments are those above."""
    for i in range(len(rows)):
        row = values[offsets[rows[i]] : offsets[rows[i] + 1]]
        out = bins[starts[i] : starts[i] + len(row)]
        for t in range(len(row)):
            out[t] = int(min(row[t], n_bins - 1))
