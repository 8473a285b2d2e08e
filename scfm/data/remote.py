"""Shard directories anywhere: on this disk, or behind a URL, from which whole shards come into a cache when needed."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scfm.data.cache import ShardCache
from scfm.data.fetching import FetchedBlock, FetchedCodes
from scfm.data.shards import code_type, open_shards, read_manifest
from scfm.data.store import CellStore, ManyCodes, ObsColumn
from scfm.data.vocabulary import Vocabulary
from scfm.errors import ScfmError

INDEX = ("manifest.json", "vocab.json", "cells.hash")


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
        shuffled = manifest.get("shuffled", False)
        return CellStore(vocabulary, manifest["value_kind"], blocks, obs, shuffled=shuffled)


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
