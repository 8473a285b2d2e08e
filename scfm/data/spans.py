"""Spans of files, read into memory: asked of the kernel ahead of their turn, so that a disk has many to choose from.

Cells in true random order are spans of 3 KB. One read at a time waits for the disk each time, and a thread for each
read that waits costs more than the read. The kernel fetches what it is asked for by posix_fadvise without anybody
waiting, so a few threads keep a thousand spans under way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numba import types
from numba.core.typing import signature
from numpy.typing import NDArray

from scfm.compiled import compiled
from scfm.errors import ScfmError

THREADS = 4  # of one call; more than the disk needs where the kernel fetches ahead, for file systems where it does not
AHEAD = 2**20  # bytes that each of them has asked for and not read
ASKED = 2**19  # bytes that the kernel is asked for at once: of more it may fetch the beginning alone
WILL_NEED = 3  # Linux's POSIX_FADV_WILLNEED; macOS has none, and imports this for cells in memory all the same

_pread = types.ExternalFunction("pread", signature(types.intp, types.int32, types.uintp, types.uintp, types.int64))
_advise = types.ExternalFunction(
    "posix_fadvise", signature(types.int32, types.int32, types.int64, types.int64, types.int32)
)


@dataclass(frozen=True)
class FileSpans:
    """Spans of one file, and the memory that they are read into.

    Attributes:
        path: the file.
        at, sizes: (n,) int64 first byte in the file, and number of bytes, of each.
        memory: (bytes,) uint8.
        places: (n,) int64 first byte in `memory` of each.
    """

    path: Path
    at: NDArray[np.int64]
    sizes: NDArray[np.int64]
    memory: NDArray[np.uint8]
    places: NDArray[np.int64]

    def between(self, first: int, last: int) -> FileSpans:
        """Return spans `first` to `last - 1`."""
        some = slice(first, last)
        return FileSpans(self.path, self.at[some], self.sizes[some], self.memory, self.places[some])


def ask_for(path: Path, at: NDArray[np.int64], sizes: NDArray[np.int64]) -> None:
    """Have the kernel fetch spans of a file into its cache, without waiting: (n,) first byte and number of bytes."""
    with _opened(path) as descriptor:
        _ask(descriptor, at, sizes)


def read_spans(files: Sequence[FileSpans]) -> None:
    """Read spans of files into memory, on several threads.

    Raises ScfmError that names a file which cannot be read or ends too early.
    """
    ends = np.cumsum([0, *(len(file.at) for file in files)]).tolist()
    shares = [ends[-1] * i // THREADS for i in range(THREADS + 1)]
    with ThreadPoolExecutor(THREADS, thread_name_prefix="scfm-read") as pool:
        reads = [pool.submit(_read_all, list(_share(files, ends, *share))) for share in pairwise(shares)]
    wait(reads)
    for read in reads:
        read.result()


def _share(files: Sequence[FileSpans], ends: list[int], first: int, last: int) -> Iterator[FileSpans]:
    """Yield spans `first` to `last - 1` of all files in a row; ends: (files + 1) number of spans before each."""
    for file, (begin, end) in zip(files, pairwise(ends), strict=True):
        if first < end and begin < last:
            yield file.between(max(first - begin, 0), last - begin)


def _read_all(files: list[FileSpans]) -> None:
    for file in files:
        with _opened(file.path) as descriptor:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            done = 0
            while True:
                done += _read(descriptor, file.at[done:], file.sizes[done:], file.memory, file.places[done:])
                if done == len(file.at):
                    break
                _read_one(file, done, descriptor)
                done += 1


def _read_one(file: FileSpans, i: int, descriptor: int) -> None:
    """Read a span in as many parts as the system likes, and say what is wrong where it cannot be read."""
    at, place, left = int(file.at[i]), int(file.places[i]), int(file.sizes[i])
    while left:
        n = os.preadv(descriptor, [file.memory.data[place : place + left]], at)
        if n == 0:
            raise ScfmError(f"{file.path}: ends at byte {at:,}, before the cells that its index names; copy it again")
        at, place, left = at + n, place + n, left - n


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ScfmError(f"{path}: cannot be read ({error})") from error


@compiled
def _ask(descriptor: int, at: NDArray[np.int64], sizes: NDArray[np.int64]) -> None:
    for i in range(len(at)):
        for piece in range(at[i], at[i] + sizes[i], ASKED):
            _advise(descriptor, piece, min(ASKED, at[i] + sizes[i] - piece), WILL_NEED)


@compiled
def _read(
    descriptor: int,
    at: NDArray[np.int64],
    sizes: NDArray[np.int64],
    memory: NDArray[np.uint8],
    places: NDArray[np.int64],
) -> int:
    """Read spans one after the other, asking ahead; return how many came whole before one that did not."""
    asked = ahead = 0
    for i in range(len(at)):
        while asked < len(at) and ahead < AHEAD:
            _ask(descriptor, at[asked : asked + 1], sizes[asked : asked + 1])
            ahead += sizes[asked]
            asked += 1
        inside = min(places[i], sizes[i]) >= 0 and places[i] + sizes[i] <= len(memory)
        if not inside or _pread(descriptor, memory.ctypes.data + places[i], sizes[i], at[i]) != sizes[i]:
            return i
        ahead -= sizes[i]
    return len(at)
