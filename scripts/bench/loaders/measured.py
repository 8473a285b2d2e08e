"""Times one loader in a process of its own, and prints what it took; needs nothing but the standard library."""

from __future__ import annotations

import json
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version

EVERY = 0.02  # seconds between two looks at the memory


def measure(open_loader: Callable[[], Iterator[int]], most_cells: int, packages: list[str]) -> None:
    """Time a loader over its cells and print JSON.

    Time runs from the first question for a batch, opened and imported before, to the last batch; CPU time is that of
    all threads and of all worker processes. Private memory is the highest anonymous memory of this process meanwhile,
    its interpreter and libraries included; where there are workers, theirs is not.

    Args:
        open_loader: returns what yields the number of cells of one batch after another.
        most_cells: the batch that reaches so many is the last.
        packages: whose versions are named.
    """
    started = time.perf_counter()
    loader = open_loader()
    opened = time.perf_counter() - started
    most, stop = [0], threading.Event()
    watch = threading.Thread(target=_watch, args=(most, stop), daemon=True)
    watch.start()
    read, wall, cpu, cells = _bytes_read(), time.perf_counter(), _cpu(), 0
    first_batch = 0.0
    for n in loader:
        first_batch = first_batch or time.perf_counter() - wall
        cells += n
        if cells >= most_cells:
            break
    wall, cpu, read = time.perf_counter() - wall, _cpu() - cpu, _bytes_read() - read
    stop.set()
    watch.join()
    print(
        json.dumps(
            {
                "cells": cells,
                "wall": wall,
                "cpu": cpu,
                "open": opened,
                "first_batch": first_batch,
                "private_bytes": most[0],
                "bytes_read": read,
                "load": os.getloadavg()[0],
                "versions": {name: version(name) for name in packages},
            }
        )
    )


def _cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _bytes_read() -> int:
    """Return what this process has had read from the disk so far."""
    with open("/proc/self/io") as file:
        return int(next(line for line in file if line.startswith("read_bytes")).split()[1])


def _anonymous() -> int:
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith("RssAnon")).split()[1])


def _watch(most: list[int], stop: threading.Event) -> None:
    while not stop.wait(EVERY):
        most[0] = max(most[0], _anonymous())
