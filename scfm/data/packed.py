"""The packed codec: a cell is one run of bytes, about two for each expressed gene.

A cell of n genes is n bytes of gaps between its ascending gene ids, then n bytes of counts less one, then what did not
fit into a byte: byte 255 stands for a number of two bytes at the end of the cell, 255 less than the true one, and there
65535 for one of four bytes that follows it, which is the true one. All little-endian. The gap of the first gene is its
id; of others, the number of genes between it and the one before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scfm.compiled import compiled
from scfm.data.store import CellBlock
from scfm.errors import ScfmError

BYTE, WORD = 255, 65535  # what stands for a number that does not fit
STRETCH = 128  # counts among which a large one is looked for at once


@dataclass(frozen=True)
class PackedBlock:
    """Cells of a packed shard, decoded when they are asked for.

    Attributes:
        starts: (n + 1,) integer start of each cell in `data`.
        sizes: (n,) int32 number of genes of each cell.
        data: (bytes,) uint8.
        genes, values: types that hold every gene id and every count; what they decode to.
        n_genes: size of the vocabulary: ids from there on are damage.
        name_of: what an error calls the cell at a place.
    """

    starts: NDArray[np.integer]
    sizes: NDArray[np.int32]
    data: NDArray[np.uint8]
    genes: np.dtype
    values: np.dtype
    n_genes: int
    name_of: Callable[[int], str]

    @property
    def n_cells(self) -> int:
        return len(self.sizes)

    def lengths(self, places: NDArray[np.int64]) -> NDArray[np.int32]:
        return self.sizes[places]

    def gather(self, places: NDArray[np.int64]) -> tuple[CellBlock, NDArray[np.int64]]:
        """Decode some cells. Raises ScfmError that names the first damaged one."""
        offsets = np.zeros(len(places) + 1, np.int64)
        np.cumsum(self.sizes[places], out=offsets[1:])
        genes, values = np.empty(offsets[-1], self.genes), np.empty(offsets[-1], self.values)
        damaged = _decode(self.starts, self.data, places, self.n_genes, offsets, genes, values)
        if damaged >= 0:
            raise ScfmError(
                f"{self.name_of(int(places[damaged]))} is damaged: its bytes are no packed cell; `scfm verify` finds "
                "damaged shards, data.skip_damaged trains without them"
            )
        return CellBlock(offsets, genes, values), np.arange(len(places))


def pack(block: CellBlock) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Encode cells of counts: return the start of each cell, (n + 1,), and the bytes.

    Raises ScfmError where gene ids do not ascend within a cell, or a count is zero.
    """
    starts = np.zeros(block.n_cells + 1, np.int64)
    wrong = _measure(block.offsets, block.genes, block.values, starts[1:])
    if wrong >= 0:
        raise ScfmError(f"cell {wrong:,}: its gene ids do not ascend, or one of its counts is 0; it cannot be packed")
    np.cumsum(starts, out=starts)
    data = np.empty(starts[-1], np.uint8)
    _encode(block.offsets, block.genes, block.values, starts, data)
    return starts, data


@compiled
def _measure(offsets: NDArray, genes: NDArray, counts: NDArray, sizes: NDArray[np.int64]) -> int:
    """Write the bytes that each cell takes; return the first cell that cannot be packed, or -1."""
    for i in range(len(sizes)):
        row, row_counts = genes[offsets[i] : offsets[i + 1]], counts[offsets[i] : offsets[i + 1]]
        size, before, fine = 2 * len(row), -1, True
        for t in range(len(row)):
            gene, count = int(row[t]), int(row_counts[t])
            gap, less = gene - before - 1, count - 1
            fine &= gap >= 0
            fine &= less >= 0
            size += 2 * int(gap >= BYTE) + 4 * int(gap >= BYTE + WORD)
            size += 2 * int(less >= BYTE) + 4 * int(less >= BYTE + WORD)
            before = gene
        if not fine:
            return i
        sizes[i] = size
    return -1


@compiled
def _put(number: int, data: NDArray[np.uint8], tail: int) -> int:
    """Write a number of 255 or more at `tail`; return where the next one goes."""
    word = min(number - BYTE, WORD)
    data[tail], data[tail + 1] = word & 255, word >> 8
    tail += 2
    if word == WORD:
        for byte in range(4):
            data[tail + byte] = (number >> (8 * byte)) & 255
        tail += 4
    return tail


@compiled
def _encode(offsets: NDArray, genes: NDArray, counts: NDArray, starts: NDArray[np.int64], data: NDArray) -> None:
    for i in range(len(starts) - 1):
        row, row_counts = genes[offsets[i] : offsets[i + 1]], counts[offsets[i] : offsets[i + 1]]
        cell, n = data[starts[i] : starts[i + 1]], len(row)
        tail, before = 2 * n, -1
        for t in range(n):
            gap, before = int(row[t]) - before - 1, int(row[t])
            cell[t] = min(gap, BYTE)
            if gap >= BYTE:
                tail = _put(gap, cell, tail)
        less = cell[n : 2 * n]
        for t in range(n):
            less[t] = min(int(row_counts[t]) - 1, BYTE)
        for t in range(n):
            if less[t] == BYTE:
                tail = _put(int(row_counts[t]) - 1, cell, tail)


@compiled
def _take(cell: NDArray[np.uint8], tail: int) -> tuple[int, int]:
    """Read a number of 255 or more at `tail`; return it and where the next one is. Past the end there are zeros."""
    word = 0
    for byte in range(2):
        if tail + byte < len(cell):
            word |= int(cell[tail + byte]) << (8 * byte)
    tail += 2
    if word < WORD:
        return word + BYTE, tail
    number = 0
    for byte in range(4):
        if tail + byte < len(cell):
            number |= int(cell[tail + byte]) << (8 * byte)
    return number, tail + 4


@compiled
def _largest(numbers: NDArray[np.uint8]) -> np.uint8:
    largest = np.uint8(0)
    for number in numbers:
        largest = max(largest, number)
    return largest


@compiled
def _decode(
    starts: NDArray[np.integer],
    data: NDArray[np.uint8],
    places: NDArray[np.int64],
    n_genes: int,
    offsets: NDArray[np.int64],
    genes: NDArray[np.unsignedinteger],
    values: NDArray[np.unsignedinteger],
) -> int:
    """Decode cell places[i] to offsets[i] on; return the first i whose bytes are no cell, or -1.

    Whether any gap is larger than a byte is asked first, in a loop that vectorises, and so is the one that copies all
    counts: few cells have large gaps, and the loop for the others then needs no branch. Large counts are rare too, and
    looked for a stretch at a time.
    """
    for i in range(len(places)):
        first, last = int(starts[places[i]]), int(starts[places[i] + 1])
        n = offsets[i + 1] - offsets[i]
        if not (first >= 0 and first + 2 * n <= last and last <= len(data)):
            return i
        cell = data[first:last]
        gaps, less, tail = cell[:n], cell[n : 2 * n], 2 * n
        ids, counts = genes[offsets[i] : offsets[i + 1]], values[offsets[i] : offsets[i + 1]]
        gene = -1
        if _largest(gaps) < BYTE:
            for t in range(n):
                gene += int(gaps[t]) + 1
                ids[t] = gene
        else:
            for t in range(n):
                gap = int(gaps[t])
                if gap == BYTE:
                    gap, tail = _take(cell, tail)
                gene += gap + 1
                ids[t] = gene
        for t in range(n):
            counts[t] = int(less[t]) + 1
        for begin in range(0, n if tail < len(cell) else 0, STRETCH):
            if _largest(less[begin : begin + STRETCH]) == BYTE:
                for t in range(begin, min(begin + STRETCH, n)):
                    if less[t] == BYTE:
                        number, tail = _take(cell, tail)
                        counts[t] = number + 1
        if tail != len(cell) or gene >= n_genes:
            return i
    return -1
