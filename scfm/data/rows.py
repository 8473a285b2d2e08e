"""Some rows of a store, in no more memory than it takes to say which they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class AllBut:
    """All rows of a store in their order, but for a few.

    Attributes:
        total: rows of the store.
        left_out: (m,) int64 rows that are left out, ascending.
    """

    total: int
    left_out: NDArray[np.int64]

    def __len__(self) -> int:
        return self.total - len(self.left_out)

    def __getitem__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows that stand at some places, (n,) int64."""
        return places + np.searchsorted(self._stay_before, places, side="right")

    @cached_property
    def _stay_before(self) -> NDArray[np.int64]:
        return self.left_out - np.arange(len(self.left_out))

    def __iter__(self) -> Iterator[int]:
        return iter(np.asarray(self).tolist())

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> NDArray:
        return self[np.arange(len(self), dtype=np.int64)].astype(dtype or np.int64, copy=False)


SomeRows = range | NDArray[np.int64] | AllBut


def rows_at(rows: SomeRows, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows that stand at some places among others, (n,) int64."""
    return rows.start + places * rows.step if isinstance(rows, range) else rows[places]


def without(total: int, left_out: NDArray[np.int64]) -> range | AllBut:
    """Return all rows of a store but some, given ascending: a range where these are none, or the last."""
    n = total - len(left_out)
    return range(n) if not len(left_out) or left_out[0] == n else AllBut(total, left_out)
