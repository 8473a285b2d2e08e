"""Cells that stand in the sources more than once, found by the hash of their profile in bounded memory.

The copy that comes first stays: that of the source named first, there the first row. Cells that express fewer than
`TELLING_GENES` genes can be equal by chance, and are never taken for copies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scfm.data.building.directory import read_json, write_json, written
from scfm.data.building.units import read_facts

TELLING_GENES = 50
BYTES_PER_HASH = 64  # hashes, places and their sorting together
DUPLICATES, HASHES = "duplicates", "cells.hash"


@dataclass(frozen=True)
class Duplicates:
    """Which cells are copies of others.

    Attributes:
        places: (n,) int64 places of the copies to leave out, ascending.
        copies: for each source that has copies, how many, by the source that has the first of the same profile.
    """

    places: NDArray[np.int64]
    copies: dict[int, dict[int, int]]


def find_duplicates(
    building: Path, units: Sequence[tuple[int, int, int]], n_cells: int, n_bytes: float, drop: bool
) -> None:
    """Look through the hashes of all units; write what was found, and the sorted hashes of the cells that stay.

    Args:
        building: the directory, in which all units are finished.
        units: of the plan.
        n_cells: cells in all units.
        n_bytes: memory to use.
        drop: leave the copies out.
    """
    n_parts = max(1, int(-(-n_cells * BYTES_PER_HASH // n_bytes)))
    # each part is a range of hashes, so that the hashes of one part after another are sorted
    bounds = [(2**64 * part // n_parts, 2**64 * (part + 1) // n_parts - 1) for part in range(n_parts)]
    copies: Counter[tuple[int, int]] = Counter()
    dropped = [np.empty(0, np.int64)]
    with written(building / "out" / HASHES) as file, file.open("wb") as stored:
        for low, high in bounds:
            hashes, places, sources, telling = _between(building, units, low, high)
            order = np.argsort(hashes, kind="stable")  # equal ones stay in the order of the sources
            ordered = hashes[order]
            first = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(ordered) else np.empty(0, bool)
            first_of = order[np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))]
            copy = ~first & telling[order]
            pairs, n = np.unique(np.stack([sources[order[copy]], sources[first_of[copy]]]), axis=1, return_counts=True)
            copies.update({(int(a), int(b)): int(k) for a, b, k in zip(*pairs, n, strict=True)})
            if drop:
                dropped.append(places[order[copy]])
                ordered = ordered[~copy]
            ordered.astype("<u8").tofile(stored)
    with written(building / f"{DUPLICATES}.npy") as file, file.open("wb") as stored:
        np.save(stored, np.sort(np.concatenate(dropped)))
    write_json(building / f"{DUPLICATES}.json", [[a, b, n] for (a, b), n in sorted(copies.items())])


def read_duplicates(building: Path) -> Duplicates:
    """Return what was found."""
    copies: dict[int, dict[int, int]] = {}
    for source, first, n in read_json(building / f"{DUPLICATES}.json"):
        copies.setdefault(source, {})[first] = n
    return Duplicates(np.load(building / f"{DUPLICATES}.npy", mmap_mode="r"), copies)


def _between(
    building: Path, units: Sequence[tuple[int, int, int]], low: int, high: int
) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int32], NDArray[np.bool_]]:
    """Return hash, place, source and whether it tells, of the cells with a hash in a range, in the units' order."""
    hashes, places, sources, telling = [], [], [], []
    for number, (source, _, _) in enumerate(units):
        facts = read_facts(building, number)
        inside = (facts.hashes >= np.uint64(low)) & (facts.hashes <= np.uint64(high))
        hashes.append(facts.hashes[inside])
        places.append(facts.places[inside])
        sources.append(np.full(int(inside.sum()), source, np.int32))
        telling.append(facts.n_genes[inside] >= TELLING_GENES)
    return np.concatenate(hashes), np.concatenate(places), np.concatenate(sources), np.concatenate(telling)
