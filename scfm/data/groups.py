"""Cells by group (a tissue, a source ...): any cell of any group is found by its number, from two bytes per cell."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from scfm.compiled import compiled
from scfm.data.rows import AllBut, SomeRows, rows_at
from scfm.data.store import CellStore, Codes
from scfm.errors import ScfmError

CHUNK = 2**16  # rows: a place among them fits into two bytes
NO_VALUE = "(no value)"


class Groups:
    """The cells of some rows by their category in an obs column; a group has at least one cell.

    Cells without a value are a group of their own. Held are two bytes per cell, and six per group and 65,536 cells.

    Args:
        store: the cells.
        column: obs column that tells the groups.
        rows: ascending rows of the store that are dealt with.

    Raises ScfmError where the store has no such column.

    Attributes:
        rows: as given.
        names: of the groups, in the order of the column's categories.
        sizes: (G,) int64 cells of each group.
    """

    def __init__(self, store: CellStore, column: str, rows: SomeRows) -> None:
        if column not in store.obs:
            raise ScfmError(
                f"data.sample_by: the data have no obs column {column!r}, but {sorted(store.obs)}; "
                f"build the shards with `scfm prepare --obs {column}`"
            )
        held = store.obs[column]
        names = [NO_VALUE, *held.categories]
        n_chunks = -(-len(rows) // CHUNK)
        by_group = np.empty(len(rows), np.uint16)
        counts = np.zeros((len(names), n_chunks + 1), np.int32)
        firsts = np.empty((len(names), n_chunks), np.int32)
        for c in range(n_chunks):
            codes = _codes(held.codes, rows, c * CHUNK, min((c + 1) * CHUNK, len(rows)))
            _sort(codes, by_group[c * CHUNK : c * CHUNK + len(codes)], counts[:, c + 1], firsts[:, c])
        before = np.cumsum(counts, axis=1, dtype=np.int32)
        there = np.flatnonzero(before[:, -1])
        self.rows = rows
        self.names = [names[code] for code in there]
        self.sizes = before[there, -1].astype(np.int64)
        self._index = (by_group, before[there], firsts[there])

    def __len__(self) -> int:
        """Return the number of cells of all groups."""
        return len(self.rows)

    def find(self, groups: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the store rows of cells given by their group and their number in it, (n,) int64."""
        return rows_at(self.rows, _places(*self._index, groups, numbers))


def shares_of(groups: Groups, power: float, weights: Mapping[str, float], most_repeats: float) -> NDArray[np.float64]:
    """Return the share of each group in what is read, (G,), in all 1.

    A share is proportional to cells ** power times the group's weight (1 where none is given), as long as a cell is
    read at most `most_repeats` times while as many cells are read as there are; what is too much goes to the others.

    Raises ScfmError for a weight of a group that does not exist.
    """
    unknown = sorted(set(weights) - set(groups.names))
    if unknown:
        raise ScfmError(
            f"data.sample_weights: no training cells are of group {unknown[0]!r}; the groups of data.sample_by are "
            f"{', '.join(groups.names[:20])}{' ...' if len(groups.names) > 20 else ''}"
        )
    wanted = groups.sizes.astype(np.float64) ** power * [weights.get(name, 1.0) for name in groups.names]
    most = most_repeats * groups.sizes / len(groups)
    full = np.zeros(len(wanted), bool)
    while True:
        left = 1 - most[full].sum()
        shares = np.where(full, most, wanted * (left / max(wanted[~full].sum(), np.finfo(float).tiny)))
        over = ~full & (shares > most)
        if not over.any():
            return shares / shares.sum()
        full |= over


def _codes(codes: Codes, rows: SomeRows, first: int, last: int) -> NDArray[np.integer]:
    """Return the codes of the rows at places `first` to `last - 1`; slices of codes come much faster than rows."""
    if isinstance(rows, range):
        return codes[rows[first] : rows[last - 1] + 1 : rows.step]
    if not isinstance(rows, AllBut):
        return codes[rows[first:last]]
    begin, end = rows[np.array([first, last - 1])].tolist()
    left_out = rows.left_out[slice(*np.searchsorted(rows.left_out, [begin, end]))]
    return _but(codes[begin : end + 1], left_out - begin)


@compiled
def _but(codes: NDArray, left_out: NDArray[np.int64]) -> NDArray:
    kept, first = np.empty(len(codes) - len(left_out), codes.dtype), 0
    for i, last in enumerate(left_out):
        kept[first - i : last - i] = codes[first:last]
        first = last + 1
    kept[first - len(left_out) :] = codes[first:]
    return kept


@compiled
def _sort(codes: NDArray, by_group: NDArray[np.uint16], counts: NDArray[np.int32], firsts: NDArray[np.int32]) -> None:
    """Put the places of some cells in the order of their groups, within a group as they stand.

    Args:
        codes: (n,) category of each cell, -1 for none, which is group 0.
        by_group: (n,) room for the places.
        counts: (G,) zeros, room for the cells of each group.
        firsts: (G,) room for where each group begins in `by_group`.
    """
    following = np.zeros(len(counts), np.int32)  # `counts` and `firsts` are columns: too far apart to count in
    for code in codes:
        following[code + 1] += 1
    first = 0
    for group in range(len(counts)):
        counts[group], firsts[group] = following[group], first
        following[group] = first
        first += counts[group]
    for place in range(len(codes)):
        group = codes[place] + 1
        by_group[following[group]] = place
        following[group] += 1


@compiled
def _places(
    by_group: NDArray[np.uint16],
    before: NDArray[np.int32],
    firsts: NDArray[np.int32],
    groups: NDArray[np.int64],
    numbers: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return the place of each cell that is given by its group and its number in it, (n,)."""
    places = np.empty(len(numbers), np.int64)
    for i in range(len(numbers)):
        group = groups[i]
        chunk, after = 0, firsts.shape[1]
        while after - chunk > 1:
            middle = (chunk + after) // 2
            if before[group, middle] <= numbers[i]:
                chunk = middle
            else:
                after = middle
        inside = firsts[group, chunk] + numbers[i] - before[group, chunk]
        places[i] = chunk * CHUNK + by_group[chunk * CHUNK + inside]
    return places
