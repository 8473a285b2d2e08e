"""Which cells train and which are held out: drawn once, hashed, and frozen to a file that others can load."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scfm.errors import ScfmError


@dataclass(frozen=True)
class Split:
    """One division of a data set's cells.

    Attributes:
        train: (n_train,) int64 row indices, ascending.
        test: (n_test,) int64 row indices, ascending, none of them in `train`.
        seed: the seed it was drawn with; methods are fitted with the same one.
        protocol: how it was drawn, in words.
    """

    train: NDArray[np.int64]
    test: NDArray[np.int64]
    seed: int
    protocol: str

    def __post_init__(self) -> None:
        if not len(self.train) or not len(self.test):
            raise ScfmError(f"a split needs cells on both sides: {len(self.train)} training, {len(self.test)} held out")
        if both := len(np.intersect1d(self.train, self.test)):
            raise ScfmError(f"{both} cells stand on both sides of the split")

    def hash(self, cell_names: Sequence[str]) -> str:
        """Return the sha256 of the cell names on either side; it does not depend on the order of rows in the file."""
        names = np.asarray(cell_names, dtype=str)
        sides = {side: sorted(names[rows].tolist()) for side, rows in (("train", self.train), ("test", self.test))}
        return hashlib.sha256(json.dumps(sides, sort_keys=True).encode()).hexdigest()


def stratified_split(labels: NDArray, test_fraction: float = 0.2, seed: int = 0) -> Split:
    """Hold out `test_fraction` of every class: of a class with two cells or more at least one is on either side.

    A class with a single cell stays in training. Raises ScfmError for a fraction outside (0, 1) or one class.
    """
    if not 0 < test_fraction < 1:
        raise ScfmError(f"test_fraction: {test_fraction} must lie between 0 and 1")
    classes, class_of = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ScfmError(f"a split needs at least two classes; the labels hold {classes.tolist()}")
    held_out = []
    for k in range(len(classes)):
        rows = np.flatnonzero(class_of == k)
        wanted = round(test_fraction * len(rows))
        n_test = min(max(wanted, 1), len(rows) - 1)
        held_out.append(np.random.default_rng([seed, k]).permutation(rows)[:n_test])
    test = np.sort(np.concatenate(held_out)).astype(np.int64)
    train = np.setdiff1d(np.arange(len(labels), dtype=np.int64), test)
    return Split(train, test, seed, f"random cells, {test_fraction:.0%} of every type held out")


def grouped_split(
    groups: NDArray,
    test_groups: Sequence[str] | None = None,
    *,
    test_fraction: float = 0.2,
    seed: int = 0,
    unit: str = "donor",
) -> Split:
    """Hold out whole donors, batches, studies or species, so that no group stands on both sides.

    Args:
        groups: (N,) group of each cell.
        test_groups: the groups to hold out; without it groups are drawn until they hold `test_fraction` of the cells.
        unit: what a group is, for the protocol.

    Raises ScfmError for a group that is not there, fewer than two groups, or a fraction outside (0, 1).
    """
    groups = np.asarray(groups, dtype=str)
    names, sizes = np.unique(groups, return_counts=True)
    if len(names) < 2:
        raise ScfmError(f"a split by {unit} needs two of them; all cells are of {names.tolist()}")
    if test_groups is not None:
        held_out = sorted({str(name) for name in test_groups})
        if missing := sorted(set(held_out) - set(names)):
            raise ScfmError(f"no cell of {unit} {', '.join(missing)}; there is {', '.join(names)}")
        how = f"{unit} {', '.join(held_out)} held out whole"
    else:
        if not 0 < test_fraction < 1:
            raise ScfmError(f"test_fraction: {test_fraction} must lie between 0 and 1")
        order = np.random.default_rng(seed).permutation(len(names))
        filled = np.cumsum(sizes[order])
        # as many groups as come nearest to the fraction, one at least on either side
        n_test = int(np.abs(filled[:-1] - test_fraction * len(groups)).argmin()) + 1
        held_out = sorted(names[order[:n_test]].tolist())
        how = f"whole {unit}s drawn, about {test_fraction:.0%} of cells held out: {', '.join(held_out)}"
    is_test = np.isin(groups, held_out)
    return Split(
        np.flatnonzero(~is_test).astype(np.int64), np.flatnonzero(is_test).astype(np.int64), seed, f"by {unit}: {how}"
    )


def save_splits(path: Path, splits: Sequence[Split], cell_names: Sequence[str]) -> None:
    """Freeze splits as JSON: protocol, seed, hash, and the names of the held-out and the training cells."""
    names = np.asarray(cell_names, dtype=str)
    if len(np.unique(names)) < len(names):
        raise ScfmError("cell names repeat, so a frozen split would be ambiguous; make obs_names unique first")
    frozen = [
        {
            "protocol": split.protocol,
            "seed": split.seed,
            "sha256": split.hash(cell_names),
            "test": names[split.test].tolist(),
            "train": names[split.train].tolist(),
        }
        for split in splits
    ]
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(frozen, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def load_splits(path: Path, cell_names: Sequence[str]) -> list[Split]:
    """Read frozen splits back as row indices of these cells.

    Raises ScfmError where a cell is missing, or the file was edited since it was frozen.
    """
    row_of = {str(name): row for row, name in enumerate(cell_names)}
    splits = []
    for k, entry in enumerate(json.loads(path.read_text(encoding="utf-8"))):
        if missing := [name for name in entry["train"] + entry["test"] if name not in row_of]:
            raise ScfmError(f"{path}: split {k} names {len(missing)} cells that are not in the data, e.g. {missing[0]}")
        train, test = (np.sort([row_of[name] for name in entry[side]]).astype(np.int64) for side in ("train", "test"))
        split = Split(train, test, entry["seed"], entry["protocol"])
        if split.hash(cell_names) != entry["sha256"]:
            raise ScfmError(f"{path}: split {k} does not match its sha256; the file was edited after it was frozen")
        splits.append(split)
    return splits
