"""Shard directories anywhere: on this disk, or behind a URL, from which whole shards come into a cache when needed."""

from __future__ import annotations

import hashlib
import os
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
from scfm.data.shards import code_type, map_shard, open_shards, read_manifest
from scfm.data.store import Block, CellBlock, CellStore, InFile, ManyCodes, ObsColumn, Rows
from scfm.data.vocabulary import Vocabulary
from scfm.errors import ScfmError

INDEX = ("manifest.json", "vocab.json", "cells.hash")
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


@dataclass(frozen=True)
class ShardDirectory:
    """A shard directory, wherever it is.

    Attributes:
        location: path or URL.
        index: local directory that holds its manifest, vocabulary and hashes.
        cache: where its shards are kept once they are fetched; None where they lie on this disk as they are.
    """

    location: str
    index: Path
    cache: ShardCache | None

    @property
    def manifest(self) -> dict[str, Any]:
        return read_manifest(self.index)

    def open(self, skip_damaged: bool = False) -> CellStore:
        """Return its cells; no shard is fetched before one of its cells is asked for.

        Raises ScfmError as `open_shards` does, and where damaged shards that are not here yet may be skipped.
        """
        if self.cache is None:
            return open_shards(self.index, skip_damaged)
        if skip_damaged:
            raise ScfmError(
                "data.skip_damaged: shards that are fetched are checked as they arrive, too late to leave them out; "
                f"set it to false, and mend {self.location} where a shard is damaged"
            )
        manifest = self.manifest
        vocabulary = Vocabulary.load(self.index / "vocab.json")
        if vocabulary.hash != manifest["vocabulary_hash"]:
            raise ScfmError(f"{self.location}/vocab.json: not the vocabulary that these shards were written with")
        blocks = [
            FetchedBlock(self.location, shard, manifest, vocabulary.n_genes, self.cache) for shard in manifest["shards"]
        ]
        obs = {
            name: ObsColumn(
                ManyCodes([FetchedCodes(b, name, np.dtype(code_type(categories))) for b in blocks]), categories
            )
            for name, categories in manifest["obs"].items()
        }
        return CellStore(vocabulary, manifest["value_kind"], blocks, obs)


def find_shards(location: str, cache: str | None = None, cache_gb: float = 100.0) -> ShardDirectory:
    """Return a shard directory by its path, or by a URL that fsspec knows (s3://, gs://, http://, file:// ...).

    Args:
        location: the directory; its shards may be compressed for transport.
        cache: local folder for what is fetched; None for `scfm/shards` in the user's cache folder.
        cache_gb: the most that shards may take there.

    Raises ScfmError where there is no such directory.
    """
    remote = "://" in location
    if not remote and not any("transport" in shard for shard in read_manifest(Path(location))["shards"]):
        return ShardDirectory(location, Path(location), None)
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "scfm/shards"
    kept = ShardCache(Path(cache) if cache else home, int(cache_gb * 1e9))
    index = _fetch_index(location.rstrip("/"), kept.directory) if remote else Path(location)
    return ShardDirectory(location.rstrip("/"), index, kept)


def _fetch_index(location: str, cache: Path) -> Path:
    """Return a local folder with the small files of a remote directory, fetched anew where its manifest has changed."""
    from fsspec.core import url_to_fs

    try:
        filesystem, root = url_to_fs(location)
        manifest = filesystem.cat_file(f"{root}/manifest.json")
        folder = cache / "index" / hashlib.sha256(location.encode() + manifest).hexdigest()[:32]
        if (folder / INDEX[0]).is_file():
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        for name in INDEX[:0:-1]:  # the manifest last: it says that the others are there
            part = folder / f"{name}.{os.getpid()}.part"
            filesystem.get_file(f"{root}/{name}", str(part))
            os.replace(part, folder / name)
        part = folder / f"{INDEX[0]}.{os.getpid()}.part"
        part.write_bytes(manifest)
        os.replace(part, folder / INDEX[0])
    except FileNotFoundError as error:
        raise ScfmError(f"{location}: not a shard directory ({error} is not there)") from error
    except Exception as error:  # every file system has errors of its own
        raise ScfmError(f"{location}: cannot be read ({type(error).__name__}: {error})") from error
    return folder
