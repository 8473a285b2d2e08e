"""Which way cells are read: from memory, by map, by reads, or fetched from elsewhere first."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scfm.data.fetching import FetchedBlock, FetchingReader
from scfm.data.reading import MapReader, Reader, RunReader
from scfm.data.store import CellStore
from scfm.errors import ScfmError

ReadMode = Literal["auto", "map", "read"]
SHARE_OF_MEMORY = 0.5  # what maps may fill: the rest of the machine needs memory too
MOST_MAPPED = 100  # shards: a batch takes its cells from all of them, map by map, and then one buffer is faster


@dataclass(frozen=True)
class Access:
    """How the cells of a store are read.

    Attributes:
        reader: what brings them into memory; None where they are there.
        region: as `CellOrder` has it: cells of so many neighbouring shards come together as the cache can hold.
        said: the same in words, for the log.
    """

    reader: Reader | None
    region: int
    said: str


def choose(store: CellStore, mode: ReadMode) -> Access:
    """Decide how to read a store: as asked for, or by map where its files are few and fit in half of the memory.

    Raises ScfmError where reads are asked for and the store is not made of files.
    """
    fetched = [block for block in store.blocks if isinstance(block, FetchedBlock)]
    sizes = [block.shard["bytes"] for block in fetched] or [file.n_bytes for file in store.files]
    if not sizes:
        if mode == "read":
            raise ScfmError("data.read: read needs shards on disk; these cells are in memory")
        return Access(None, 0, "cells are in memory")
    memory, why = memory_bytes(), f"data.read: {mode}"
    if mode == "auto":
        mode = "map" if sum(sizes) <= SHARE_OF_MEMORY * memory and len(sizes) <= MOST_MAPPED else "read"
        why = f"{sum(sizes) / 1e9:,.1f} GB in {len(sizes):,} shards, {memory / 1e9:,.1f} GB of memory"
    said = f"cells are read by {'memory map' if mode == 'map' else 'reads of whole runs of cells'} ({why})"
    if not fetched:
        return Access(MapReader(store) if mode == "map" else RunReader(store), 0, said)
    cache = fetched[0].cache
    in_cache = cache.most_bytes // max(block.most_bytes for block in fetched)
    together = max(1, in_cache // 2 - 1)  # two stages may touch a region each, and a shard beyond either
    region = together * (store.n_cells // len(fetched)) if together < len(fetched) else 0
    said += f" from {fetched[0].location}, {together:,} shards at a time through {cache.directory}"
    return Access(FetchingReader(store, mode), region, said)


def memory_bytes() -> int:
    """Return the memory of this machine, or of the control group that the process may not leave."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    said = limit.read_text().strip() if limit.is_file() else "max"
    return memory if said == "max" else min(memory, int(said))
