"""Fingerprints of cells: tell whether two data sets hold the same raw profile, without keeping the profiles.

They make the leakage check possible (was this test cell in the training data?) and key the random draws of inference.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scfm.compiled import compiled
from scfm.data.expression import take_cells
from scfm.data.random import mix64
from scfm.data.store import PART, CellStore
from scfm.errors import ScfmError


@compiled
def _hash_rows(
    offsets: NDArray[np.integer], genes: NDArray[np.unsignedinteger], bits: NDArray, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    hashes = np.empty(len(offsets) - 1, np.uint64)
    for row in range(len(hashes)):
        total = np.uint64(offsets[row + 1] - offsets[row])
        # A sum does not depend on the order of its terms, and vocabularies order the same genes differently.
        for at in range(offsets[row], offsets[row + 1]):
            total += mix64(keys[genes[at]] + mix64(np.uint64(bits[at])))
        hashes[row] = mix64(total)
    return hashes


def profile_hashes(
    offsets: NDArray[np.integer],
    genes: NDArray[np.unsignedinteger],
    values: NDArray,
    gene_keys: NDArray[np.uint64],
) -> NDArray[np.uint64]:
    """Return a hash of each cell's sparse profile; it does not depend on the vocabulary that numbers the genes.

    Args:
        offsets: (n + 1,) start of each row.
        genes: (nnz,) vocabulary ids.
        values: (nnz,) unsigned counts or float32; equal counts hash alike in any unsigned type.
        gene_keys: (n_genes,) uint64 of `Vocabulary.gene_keys`.

    Returns:
        (n,) uint64.
    """
    return _hash_rows(offsets, genes, values.view(np.uint32) if values.dtype == np.float32 else values, gene_keys)


def store_hashes(store: CellStore) -> NDArray[np.uint64]:
    """Return the `profile_hashes` of all cells of a store, in their order, (N,) uint64."""
    keys = store.vocabulary.gene_keys
    hashes = [profile_hashes(part.offsets, part.genes, part.values, keys) for part in store.in_turn()]
    return np.concatenate([np.empty(0, np.uint64), *hashes])


def row_hashes(store: CellStore, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the `profile_hashes` of some cells of a store, (n,) uint64; only these are read."""
    hashes = np.empty(len(rows), np.uint64)
    for first in range(0, len(rows), PART):
        for block, cells, inside in store.parts(rows[first : first + PART]):
            taken = take_cells(block, inside)
            keys = store.vocabulary.gene_keys
            hashes[first + cells] = profile_hashes(taken.offsets, taken.genes, taken.values, keys)
    return hashes


def hashes_without(known: NDArray[np.uint64], cells: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return sorted hashes (m,) less those of some cells (n,), each of which takes one of its kind away."""
    taken, counts = np.unique(cells, return_counts=True)
    first = np.searchsorted(known, taken)
    there = np.searchsorted(known, taken, side="right") - first
    gone = [np.arange(at, at + min(n, m)) for at, n, m in zip(first, counts, there, strict=True)]
    return np.delete(known, np.concatenate([np.empty(0, np.int64), *gone]))


def save_hashes(path: Path, hashes: NDArray[np.uint64]) -> None:
    """Write a `cells.hash` file: the hashes sorted, raw little-endian uint64."""
    written = path.with_name(path.name + ".tmp")
    np.sort(hashes).astype("<u8").tofile(written)
    os.replace(written, path)


def load_hashes(path: Path) -> NDArray[np.uint64]:
    """Memory-map a `cells.hash` file. Raises ScfmError where it is missing or cut off."""
    if not path.is_file():
        raise ScfmError(f"{path}: there is no such file of cell hashes")
    size = path.stat().st_size
    if size % 8:
        raise ScfmError(f"{path}: {size} bytes are not a whole number of 8-byte hashes; the file is cut off")
    return np.memmap(path, "<u8", mode="r") if size else np.empty(0, np.uint64)


def overlap(known: NDArray[np.uint64], cells: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Say for each of `cells` (n,) whether its hash is among the sorted `known` (m,)."""
    if not len(known):
        return np.zeros(len(cells), bool)
    place = np.searchsorted(known, cells)
    return known[np.minimum(place, len(known) - 1)] == cells
