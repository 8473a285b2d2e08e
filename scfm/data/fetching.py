"""Shards that lie elsewhere: each is fetched whole into the cache when its cells are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scfm.data.cache import ShardCache
from scfm.data.reading import MapReader, RunReader
from scfm.data.store import Block, CellBlock, CellStore, InFile, Rows

FETCHES = 4  # shards at a time


@dataclass(frozen=True)
class FetchedBlock:
    """A shard that is fetched when its cells are asked for."""

    location: str
    shard: Mapping[str, Any]
    manifest: Mapping[str, Any]
    n_genes: int
    cache: ShardCache

    @property
    def n_cells(self) -> int:
        return self.shard["cells"]

    @property
    def most_bytes(self) -> int:
        """What the shard takes in the cache while it arrives."""
        return self.shard["bytes"] + (self.shard["transport"]["bytes"] if "transport" in self.shard else 0)

    def held(self, stack: ExitStack) -> tuple[Block, InFile, dict[str, NDArray[np.integer]]]:
        """Return the mapped cells, where they lie and their obs codes; the file stays until the stack is closed."""
        from scfm.data.shards import map_shard  # brings pyarrow, which cells in memory do without

        path = stack.enter_context(self.cache.using(self.location, self.shard))
        return map_shard(path, self.shard, self.manifest, self.n_genes)

    def lengths(self, places: NDArray[np.int64]) -> NDArray[np.int32]:
        with ExitStack() as stack:
            return self.held(stack)[0].lengths(places)

    def gather(self, places: NDArray[np.int64]) -> tuple[CellBlock, NDArray[np.int64]]:
        with ExitStack() as stack:  # what is mapped can be read even after the file was evicted
            return self.held(stack)[0].gather(places)


@dataclass(frozen=True)
class FetchedCodes:
    """The codes of one obs column of a shard that is fetched when they are asked for."""

    block: FetchedBlock
    column: str
    dtype: np.dtype

    def __len__(self) -> int:
        return self.block.n_cells

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.integer]:
        return np.asarray(self)[rows]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> NDArray:
        with ExitStack() as stack:
            return np.array(self.block.held(stack)[2][self.column], dtype)


@dataclass
class FetchingReader:
    """Has the shards of a stage fetched, several at a time, and keeps them until the stage is released.

    Attributes:
        store: cells in shards of which none may be on this disk yet.
        mode: how cells are read from the files once they are here.
    """

    store: CellStore
    mode: Literal["map", "read"]
    _held: dict[int, ExitStack] = field(default_factory=dict, init=False)

    def load(self, rows: NDArray[np.int64]) -> Rows:
        needed = np.unique(self.store.locate(rows)[0]).tolist()
        stack, blocks = ExitStack(), list(self.store.blocks)
        files = [InFile(Path(), 0, ())] * len(blocks)
        stacks = [stack.enter_context(ExitStack()) for _ in needed]

        def hold(b: int, own: ExitStack) -> None:
            block = self.store.blocks[b]
            assert isinstance(block, FetchedBlock)
            blocks[b], files[b], _ = block.held(own)

        try:
            with ThreadPoolExecutor(FETCHES, thread_name_prefix="scfm-fetch") as pool:
                list(pool.map(hold, needed, stacks))
            here = CellStore(self.store.vocabulary, self.store.value_kind, blocks, files=files)
            loaded = (MapReader(here) if self.mode == "map" else RunReader(here)).load(rows)
        except BaseException:
            stack.close()
            raise
        self._held[id(loaded)] = stack
        return loaded

    def release(self, loaded: Rows) -> None:
        self._held.pop(id(loaded)).close()
