"""Shard directories: Arrow files of sparse cells with a manifest, read by memory map without copying.

    manifest.json    what is in the directory, with sizes and SHA-256 of every shard
    vocab.json       what the gene ids mean
    cells.hash       sorted hashes of all profiles
    shards/*.arrow   one Arrow stream with one record batch each; `datasets.Dataset.from_file` reads them too

A row of a shard is a cell: `genes` (list of ids, ascending), `values` (list), and one integer code per obs column.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scfm.data.expression import narrowest
from scfm.data.hashing import profile_hashes, save_hashes
from scfm.data.store import CellBlock, CellStore, ObsColumn, ValueKind
from scfm.data.vocabulary import Vocabulary
from scfm.errors import ScfmError
from scfm.version import __version__

FORMAT_VERSION = 1
RESERVED_COLUMNS = ("genes", "values")
MAX_TOKENS_PER_SHARD = 2**31 - 1  # Arrow's list offsets are int32


@dataclass
class ShardWriter:
    """Writes a shard directory: `write` once per shard, then `finish`; without `finish` there is no manifest.

    Attributes:
        directory: an existing empty directory.
        vocabulary: what the gene ids mean.
        value_kind: counts, or normalised (float32).
        obs: category names of each obs column.
    """

    directory: Path
    vocabulary: Vocabulary
    value_kind: ValueKind
    obs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    _shards: list[dict[str, Any]] = field(default_factory=list, init=False)
    _hashes: list[NDArray[np.uint64]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        (self.directory / "shards").mkdir()

    def write(self, block: CellBlock, codes: Mapping[str, NDArray[np.integer]]) -> None:
        """Write one shard.

        Args:
            block: the cells; genes ascending within a cell, no zeros; float32 values where the store is normalised.
            codes: (n,) codes of each obs column, -1 for missing.
        """
        path = self.directory / f"shards/{len(self._shards):05d}.arrow"
        self._shards.append({"file": f"shards/{path.name}", **write_shard(path, block, codes, self.obs)})
        self._hashes.append(profile_hashes(block.offsets, block.genes, block.values, self.vocabulary.gene_keys))

    def finish(self, sources: Sequence[Mapping[str, Any]] = (), **how: Any) -> None:
        """Write vocab.json, cells.hash and last the manifest, which also keeps `sources` and `how` it was built."""
        self.vocabulary.save(self.directory / "vocab.json")
        save_hashes(self.directory / "cells.hash", np.concatenate([np.empty(0, np.uint64), *self._hashes]))
        write_manifest(self.directory, self.vocabulary, self.value_kind, self.obs, self._shards, sources, **how)


def write_shard(
    path: Path,
    block: CellBlock,
    codes: Mapping[str, NDArray[np.integer]],
    obs: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Write one shard, and return what the manifest says of it besides its name.

    Args:
        path: the file to write.
        block: the cells; genes ascending within a cell, no zeros; float32 values where the store is normalised.
        codes: (n,) codes of each obs column, -1 for missing.
        obs: category names of each obs column.
    """
    if len(block.genes) > MAX_TOKENS_PER_SHARD:
        raise ScfmError(
            f"a shard of {block.n_cells:,} cells holds {len(block.genes):,} values, more than Arrow's "
            f"{MAX_TOKENS_PER_SHARD:,}; use fewer cells per shard"
        )
    offsets = pa.array(block.offsets.astype(np.int32))
    genes, values = narrowest(block.genes), narrowest(block.values)
    columns = {
        "genes": pa.ListArray.from_arrays(offsets, pa.array(genes)),
        "values": pa.ListArray.from_arrays(offsets, pa.array(values)),
    }
    for name, categories in obs.items():
        columns[name] = pa.array(codes[name].astype(code_type(categories)))
    batch = pa.record_batch(columns)

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return {
        "cells": block.n_cells,
        "tokens": len(genes),
        "bytes": path.stat().st_size,
        "sha256": _sha256(path),
        "genes": str(genes.dtype),
        "values": str(values.dtype),
    }


def code_type(categories: Sequence[str]) -> type[np.signedinteger]:
    """Return the integer type that obs codes of so many categories are stored in."""
    return np.int16 if len(categories) <= 2**15 else np.int32


def write_manifest(
    directory: Path,
    vocabulary: Vocabulary,
    value_kind: ValueKind,
    obs: Mapping[str, Sequence[str]],
    shards: Sequence[Mapping[str, Any]],
    sources: Sequence[Mapping[str, Any]],
    **how: Any,
) -> None:
    """Write the manifest, the last file of a shard directory: its shards, their sources, and `how` it was built."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "scfm_version": __version__,
        "vocabulary_hash": vocabulary.hash,
        "value_kind": value_kind,
        "codec": "list",
        "cells": sum(shard["cells"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        **how,
        "obs": {name: list(categories) for name, categories in obs.items()},
        "sources": list(sources),
        "shards": list(shards),
    }
    written = directory / "manifest.json.tmp"
    written.write_text(json.dumps({**manifest, "hash": manifest_hash(manifest)}, indent=1, ensure_ascii=False), "utf-8")
    os.replace(written, directory / "manifest.json")


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what a build says of its cells: all of the manifest but where and when sources lay.

    Two builds of the same cells with the same options have the same hash, and shards that are equal byte for byte.
    """
    held = {key: value for key, value in manifest.items() if key not in ("hash", "gene_tables", "scfm_version")}
    held["sources"] = [
        {key: value for key, value in source.items() if key != "fingerprint"} for source in manifest["sources"]
    ]
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read the manifest of a shard directory. Raises ScfmError where it is missing, unreadable or of another format."""
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ScfmError(
            f"{directory}: not a shard directory (no manifest.json); `scfm prepare SOURCE... --out DIR` writes one"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ScfmError(f"{path}: not JSON ({error}); build the shards again") from error
    found = (manifest.get("format_version"), manifest.get("codec")) if isinstance(manifest, dict) else (None, None)
    if found != (FORMAT_VERSION, "list"):
        raise ScfmError(
            f"{path}: shard format {found[0]!r} with codec {found[1]!r}; "
            f"this scfm reads format {FORMAT_VERSION} with codec 'list'"
        )
    return manifest


def open_shards(directory: str | Path) -> CellStore:
    """Memory-map a shard directory; nothing but the obs codes is read.

    Raises ScfmError naming the file where the manifest, the vocabulary or a shard is missing, cut off or does not
    belong to the others.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    vocabulary = Vocabulary.load(directory / "vocab.json")
    if vocabulary.hash != manifest["vocabulary_hash"]:
        raise ScfmError(f"{directory / 'vocab.json'}: not the vocabulary that these shards were written with")
    batches = [_map_shard(directory, shard, list(manifest["obs"])) for shard in manifest["shards"]]
    codes = {name: [_as_numpy(batch.column(name)) for batch in batches] for name in manifest["obs"]}
    return CellStore(
        vocabulary=vocabulary,
        value_kind=manifest["value_kind"],
        blocks=[_block(batch) for batch in batches],
        obs={name: ObsColumn(np.concatenate(codes[name]), manifest["obs"][name]) for name in manifest["obs"]},
    )


def verify_shards(directory: str | Path) -> int:
    """Read every shard, compare its SHA-256 with the manifest's, and return how many shards there are.

    Raises ScfmError that names all damaged files.
    """
    directory = Path(directory)
    open_shards(directory)
    shards = read_manifest(directory)["shards"]
    damaged = [shard["file"] for shard in shards if _sha256(directory / shard["file"]) != shard["sha256"]]
    if damaged:
        raise ScfmError(
            f"{directory}: {len(damaged)} of {len(shards)} shards are damaged (SHA-256 differs from the manifest's): "
            f"{', '.join(damaged)}; copy them again, or build the shards again"
        )
    return len(shards)


def _map_shard(directory: Path, shard: Mapping[str, Any], obs: list[str]) -> pa.RecordBatch:
    path = directory / shard["file"]
    if not path.is_file():
        raise ScfmError(f"{path}: the shard is missing; copy the directory again, or build the shards again")
    if path.stat().st_size != shard["bytes"]:
        raise ScfmError(
            f"{path}: {path.stat().st_size:,} bytes, but the manifest says {shard['bytes']:,}; the shard is cut off "
            "or belongs to another build"
        )
    try:
        batch = pa.ipc.open_stream(pa.memory_map(str(path))).read_next_batch()
    except (pa.ArrowException, StopIteration, OSError) as error:
        raise ScfmError(f"{path}: not a readable Arrow stream ({error})") from error
    if batch.schema.names != [*RESERVED_COLUMNS, *obs] or batch.num_rows != shard["cells"]:
        raise ScfmError(
            f"{path}: holds {batch.num_rows:,} cells with columns {batch.schema.names}, but the manifest says "
            f"{shard['cells']:,} cells with {[*RESERVED_COLUMNS, *obs]}; the shard belongs to another build"
        )
    return batch


def _block(batch: pa.RecordBatch) -> CellBlock:
    genes, values = batch.column("genes"), batch.column("values")
    return CellBlock(_as_numpy(genes.offsets), _as_numpy(genes.values), _as_numpy(values.values))


def _as_numpy(array: pa.Array) -> NDArray:
    return array.to_numpy(zero_copy_only=True)
