"""Which of the cells that sources offer are wanted: subsamples, strata, and groups to hold out.

Draws are by key: which cells they take does not depend on the number of processes, and nothing is sorted or stored.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scfm.data.building.directory import written
from scfm.data.building.options import SOURCE_COLUMN, BuildOptions
from scfm.data.building.survey import HELD_OUT, SUBSAMPLE, Surveyed, surveyed_rows
from scfm.data.random import permuted, stream
from scfm.errors import ScfmError


class Chosen:
    """Which rows of each source are wanted once all are known, written to `chosen/`.

    Attributes:
        counts: chosen cells of each source.
        groups_of: for each source, chosen cells by the group they are held out with.
    """

    def __init__(self, building: Path, surveyed: list[Surveyed], options: BuildOptions) -> None:
        self.building, self.surveyed, self.options = building, surveyed, options
        self.counts: list[int] = []
        self.groups_of: list[Counter[str]] = []
        sizes = [self._strata(number) for number in range(len(surveyed))] if options.subsample else []
        wanted = _shares(sum(sizes, Counter[str]()), options.subsample) if options.subsample else {}
        seen = Counter[str]()
        for number, source in enumerate(surveyed):
            kept, codes = surveyed_rows(building, number, source.cells)
            if options.subsample:
                for name, rows in self._rows_by(number, kept, codes, options.stratify):
                    total = sum(size[name] for size in sizes)
                    key = np.uint64(stream(options.seed, sorted(wanted).index(name), 0, SUBSAMPLE))
                    kept[rows[permuted(seen[name] + np.arange(len(rows)), total, key) >= wanted[name]]] = False
                    seen[name] += len(rows)
            self.counts.append(int(kept.sum()))
            by = options.hold_out_by
            self.groups_of.append(
                Counter({name: len(rows) for name, rows in self._rows_by(number, kept, codes, by) if name})
                if by
                else Counter()
            )
            with written(building / f"chosen/{number:05d}.npy") as file, file.open("wb") as stored:
                np.save(stored, np.packbits(kept))

    def units(self, number: int, values_per_unit: int) -> list[tuple[int, int, int]]:
        """Return (source, first row, row after the last) of the units of a source; none is without a wanted row."""
        source = self.surveyed[number]
        most = max(1, values_per_unit // max(1, source.values // max(1, source.cells)))
        rows = -(-source.cells // -(-source.cells // most))  # of one size, so that all processes end at once
        kept = read_chosen(self.building, number, source.cells)
        spans = [(first, min(first + rows, source.cells)) for first in range(0, source.cells, rows)]
        return [(number, first, last) for first, last in spans if kept[first:last].any()]

    def _strata(self, number: int) -> Counter[str]:
        kept, codes = surveyed_rows(self.building, number, self.surveyed[number].cells)
        return Counter({name: len(rows) for name, rows in self._rows_by(number, kept, codes, self.options.stratify)})

    def _rows_by(
        self, number: int, kept: NDArray[np.bool_], codes: dict[str, NDArray[np.integer]], column: str | None
    ) -> list[tuple[str, NDArray[np.int64]]]:
        """Return the kept rows of a source by their category, "" for those that have none."""
        if column is None or column not in codes:
            name = self.surveyed[number].label if column == SOURCE_COLUMN else ""
            return [(name, np.flatnonzero(kept))]
        names = [*self.surveyed[number].categories[column], ""]
        rows = np.flatnonzero(kept)
        of_row = codes[column][rows]
        order = np.argsort(of_row, kind="stable")
        ends = np.flatnonzero(np.diff(of_row[order])) + 1
        return [(names[of_row[part[0]]], rows[part]) for part in np.split(order, ends) if len(part)]


def read_chosen(building: Path, number: int, cells: int) -> NDArray[np.bool_]:
    """(cells,) which rows of a source are wanted."""
    return np.unpackbits(np.load(building / f"chosen/{number:05d}.npy"), count=cells).astype(bool)


def _shares(sizes: Counter[str], wanted: int) -> dict[str, int]:
    """Return how many cells of each stratum to draw: in proportion, rounded to the sum, one at least of each."""
    total = sum(sizes.values())
    if total <= wanted:
        return dict(sizes)
    exact = {name: wanted * size / total for name, size in sizes.items()}
    shares = {name: max(1, int(share)) for name, share in exact.items()}
    for name in sorted(exact, key=lambda name: (int(exact[name]) - exact[name], name)):
        if sum(shares.values()) >= wanted:
            break
        shares[name] = min(sizes[name], shares[name] + 1)
    return shares


def held_out_groups(groups: Counter[str], options: BuildOptions) -> set[str]:
    """Return the groups to hold out: those that are named, or groups drawn until the fraction is reached.

    A group that would exceed the fraction is passed over; where all do, the smallest is taken.
    """
    by = options.hold_out_by
    if by is None:
        return set()
    if len(groups) < 2:
        raise ScfmError(
            f"--hold-out-by {by}: the cells are all of {len(groups) or 'no'} group; one must be left to train on"
        )
    unheard = [name for name in options.hold_out if name not in groups]
    if unheard:
        raise ScfmError(
            f"--hold-out {', '.join(unheard)}: {by} has no such group among the cells that are kept; "
            f"it has {', '.join(sorted(groups)[:20])}"
        )
    if options.hold_out:
        held = set(options.hold_out)
    else:
        assert options.hold_out_fraction is not None
        room = options.hold_out_fraction * groups.total()
        names = sorted(groups)
        shuffled = permuted(np.arange(len(names)), len(names), np.uint64(stream(options.seed, 0, 0, HELD_OUT)))
        held = set()
        for at in shuffled.tolist():
            if groups[names[at]] <= room:
                held.add(names[at])
                room -= groups[names[at]]
        held = held or {min(names, key=lambda name: (groups[name], name))}
    if len(held) == len(groups):
        raise ScfmError(f"--hold-out: that is every group of {by}; one must be left to train on")
    return held
