"""Shard directories: Arrow files of sparse cells with a manifest, read by memory map without copying.

    manifest.json    what is in the directory, with sizes and SHA-256 of every shard
    vocab.json       what the gene ids mean
    cells.hash       sorted hashes of all profiles
    shards/*.arrow   one Arrow stream with one record batch each; `datasets.Dataset.from_file` reads them too

A row of a shard is a cell: in the list codec `genes` (list of ids, ascending) and `values` (list); in the packed one
`cell` (bytes, as scfm.data.packed says) and `n_genes`; in both one integer code per obs column.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scfm.data.expression import narrowest
from scfm.data.hashing import profile_hashes, save_hashes
from scfm.data.packed import PackedBlock, pack
from scfm.data.store import Block, CellBlock, CellStore, InFile, Lost, ManyCodes, ObsColumn, ValueKind
from scfm.data.vocabulary import Vocabulary
from scfm.errors import ScfmError
from scfm.version import __version__

FORMAT_VERSION = 1
Codec = Literal["list", "packed"]
COLUMNS: dict[Codec, tuple[str, str]] = {"list": ("genes", "values"), "packed": ("cell", "n_genes")}
RESERVED_COLUMNS = COLUMNS["list"] + COLUMNS["packed"]
MappedShard = tuple[Block, InFile, dict[str, NDArray[np.integer]]]  # cells, where they lie, codes of obs columns
MOST_PER_SHARD = 2**31 - 1  # Arrow's offsets are int32


def default_codec(value_kind: ValueKind) -> Codec:
    """Return the codec of cells for which none is asked: packed, but for normalised values, which it cannot hold."""
    return "packed" if value_kind == "counts" else "list"


def refuse_unfit(codec: Codec, value_kind: ValueKind) -> None:
    """Raise ScfmError where a codec cannot hold values of a kind."""
    if codec == "packed" and value_kind == "normalised":
        raise ScfmError("--codec packed: it holds counts, and these cells have normalised values; use --codec list")


@dataclass
class ShardWriter:
    """Writes a shard directory: `write` once per shard, then `finish`; without `finish` there is no manifest.

    Attributes:
        directory: an existing empty directory.
        vocabulary: what the gene ids mean.
        value_kind: counts, or normalised (float32).
        obs: category names of each obs column.
        codec: how cells are encoded; normalised values have no packed form.
    """

    directory: Path
    vocabulary: Vocabulary
    value_kind: ValueKind
    obs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    codec: Codec = "list"
    _shards: list[dict[str, Any]] = field(default_factory=list, init=False)
    _hashes: list[NDArray[np.uint64]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        refuse_unfit(self.codec, self.value_kind)
        (self.directory / "shards").mkdir()

    def write(self, block: CellBlock, codes: Mapping[str, NDArray[np.integer]]) -> None:
        """Write one shard.

        Args:
            block: the cells; genes ascending within a cell, no zeros; float32 values where the store is normalised.
            codes: (n,) codes of each obs column, -1 for missing.
        """
        path = self.directory / f"shards/{len(self._shards):05d}.arrow"
        said = write_shard(path, block, codes, self.obs, self.codec)
        self._shards.append({"file": f"shards/{path.name}", **said})
        self._hashes.append(profile_hashes(block.offsets, block.genes, block.values, self.vocabulary.gene_keys))

    def finish(self, sources: Sequence[Mapping[str, Any]] = (), **how: Any) -> None:
        """Write vocab.json, cells.hash and last the manifest, which also keeps `sources` and `how` it was built."""
        self.vocabulary.save(self.directory / "vocab.json")
        save_hashes(self.directory / "cells.hash", np.concatenate([np.empty(0, np.uint64), *self._hashes]))
        written = (self.directory, self.vocabulary, self.value_kind, self.codec, self.obs, self._shards)
        write_manifest(*written, sources, **how)


def write_shard(
    path: Path,
    block: CellBlock,
    codes: Mapping[str, NDArray[np.integer]],
    obs: Mapping[str, Sequence[str]],
    codec: Codec,
) -> dict[str, Any]:
    """Write one shard, and return what the manifest says of it besides its name.

    Args:
        path: the file to write.
        block: the cells; genes ascending within a cell, no zeros; float32 values where the store is normalised.
        codes: (n,) codes of each obs column, -1 for missing.
        obs: category names of each obs column.
        codec: how cells are encoded.

    Raises ScfmError where the cells are more than one shard can hold.
    """
    genes, values = narrowest(block.genes), narrowest(block.values)
    narrow = CellBlock(block.offsets, genes, values)
    columns = _packed_columns(narrow) if codec == "packed" else _list_columns(narrow)
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
    codec: Codec,
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
        "codec": codec,
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
    """Return the SHA-256 of what a build says of its cells: all of the manifest but where sources lay and shards went.

    Two builds of the same cells with the same options have the same hash, and shards that are equal byte for byte.
    """
    held = {key: value for key, value in manifest.items() if key not in ("hash", "gene_tables", "scfm_version")}
    held["sources"] = [
        {key: value for key, value in source.items() if key != "fingerprint"} for source in manifest["sources"]
    ]
    held["shards"] = [
        {key: value for key, value in shard.items() if key != "transport"} for shard in manifest["shards"]
    ]
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def _list_columns(block: CellBlock) -> dict[str, pa.Array]:
    offsets = _arrow_offsets(block.offsets, "values")
    return {
        "genes": pa.ListArray.from_arrays(offsets, pa.array(block.genes)),
        "values": pa.ListArray.from_arrays(offsets, pa.array(block.values)),
    }


def _packed_columns(block: CellBlock) -> dict[str, pa.Array]:
    starts, data = pack(block)
    offsets = _arrow_offsets(starts, "bytes")
    cells = pa.Array.from_buffers(pa.binary(), block.n_cells, [None, offsets.buffers()[1], pa.py_buffer(data)])
    return {"cell": cells, "n_genes": pa.array(np.diff(block.offsets).astype(np.int32))}


def _arrow_offsets(offsets: NDArray[np.integer], what: str) -> pa.Array:
    if offsets[-1] > MOST_PER_SHARD:
        raise ScfmError(
            f"a shard of {len(offsets) - 1:,} cells holds {offsets[-1]:,} {what}, more than Arrow's "
            f"{MOST_PER_SHARD:,}; use fewer cells per shard"
        )
    return pa.array(offsets.astype(np.int32))


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
    if found[0] != FORMAT_VERSION or found[1] not in COLUMNS:
        raise ScfmError(
            f"{path}: shard format {found[0]!r} with codec {found[1]!r}; "
            f"this scfm reads format {FORMAT_VERSION} with codec {' or '.join(COLUMNS)}"
        )
    return manifest


def open_shards(directory: str | Path, skip_damaged: bool = False) -> CellStore:
    """Memory-map a shard directory; no cell is read, and no obs code.

    Args:
        directory: on this machine.
        skip_damaged: read all shards, compare their SHA-256, and go on without those that are damaged or missing.

    Raises ScfmError naming the file where the manifest, the vocabulary or a shard is missing, cut off or does not
    belong to the others.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    vocabulary = Vocabulary.load(directory / "vocab.json")
    if vocabulary.hash != manifest["vocabulary_hash"]:
        raise ScfmError(f"{directory / 'vocab.json'}: not the vocabulary that these shards were written with")
    mapped: list[MappedShard] = []
    lost: list[Lost] = []
    first = 0
    for shard in manifest["shards"]:
        path = directory / shard["file"]
        try:
            one = map_shard(path, shard, manifest, vocabulary.n_genes)
            if skip_damaged and _sha256(path) != shard["sha256"]:
                raise ScfmError(f"{path}: is damaged (SHA-256 differs from the manifest's)")
        except ScfmError as error:
            if not skip_damaged:
                raise
            lost.append(Lost(range(first, first + shard["cells"]), str(error)))
            one = _without_cells(path, shard, manifest)
        mapped.append(one)
        first += shard["cells"]
    if lost and len(lost) == len(mapped):
        raise ScfmError(f"{directory}: all {len(lost)} shards are damaged; {lost[0].why}")
    return CellStore(
        vocabulary=vocabulary,
        value_kind=manifest["value_kind"],
        blocks=[block for block, _, _ in mapped],
        obs={
            name: ObsColumn(ManyCodes([codes[name] for _, _, codes in mapped]), categories)
            for name, categories in manifest["obs"].items()
        },
        files=[file for _, file, _ in mapped],
        lost=lost,
        shuffled=manifest.get("shuffled", False),
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


def map_shard(path: Path, shard: Mapping[str, Any], manifest: Mapping[str, Any], n_genes: int) -> MappedShard:
    """Map one shard: return its cells, where they lie, and the codes of its obs columns.

    Args:
        path: the file.
        shard: what the manifest says of it.
        manifest: of the directory.
        n_genes: size of the vocabulary.

    Raises ScfmError naming the file where it is missing, cut off or not what the manifest says.
    """
    columns = [*COLUMNS[manifest["codec"]], *manifest["obs"]]
    if not path.is_file():
        raise ScfmError(f"{path}: the shard is missing; copy the directory again, or build the shards again")
    if path.stat().st_size != shard["bytes"]:
        raise ScfmError(
            f"{path}: {path.stat().st_size:,} bytes, but the manifest says {shard['bytes']:,}; the shard is cut off "
            "or belongs to another build"
        )
    try:
        mapped = pa.memory_map(str(path)).read_buffer()
        batch = pa.ipc.open_stream(mapped).read_next_batch()
    except (pa.ArrowException, StopIteration, OSError) as error:
        raise ScfmError(f"{path}: not a readable Arrow stream ({error})") from error
    if batch.schema.names != columns or batch.num_rows != shard["cells"]:
        raise ScfmError(
            f"{path}: holds {batch.num_rows:,} cells with columns {batch.schema.names}, but the manifest says "
            f"{shard['cells']:,} cells with {columns}; the shard belongs to another build"
        )
    block, addresses = _block(batch, shard, str(path), n_genes)
    file = InFile(path, shard["bytes"], tuple(address - mapped.address for address in addresses))
    return block, file, {name: _as_numpy(batch.column(name)) for name in manifest["obs"]}


def _without_cells(path: Path, shard: Mapping[str, Any], manifest: Mapping[str, Any]) -> MappedShard:
    """Stand for a lost shard, so that rows keep their numbers: cells without genes, of the first category."""
    n = shard["cells"]
    block = CellBlock(np.zeros(n + 1, np.int32), np.empty(0, shard["genes"]), np.empty(0, shard["values"]))
    return block, InFile(path, shard["bytes"], (0, 0)), {name: np.zeros(n, np.int16) for name in manifest["obs"]}


def _block(batch: pa.RecordBatch, shard: Mapping[str, Any], name: str, n_genes: int) -> tuple[Block, list[int]]:
    """Return the cells of a shard, and the addresses of the arrays that hold their values."""
    if "cell" not in batch.schema.names:
        genes, values = batch.column("genes"), batch.column("values")
        arrays = [_as_numpy(genes.values), _as_numpy(values.values)]
        return CellBlock(_as_numpy(genes.offsets), *arrays), [array.ctypes.data for array in arrays]
    _, starts, data = batch.column("cell").buffers()
    block = PackedBlock(
        starts=np.frombuffer(starts, np.int32, batch.num_rows + 1),
        sizes=_as_numpy(batch.column("n_genes")),
        data=np.frombuffer(data, np.uint8),
        genes=np.dtype(shard["genes"]),
        values=np.dtype(shard["values"]),
        n_genes=n_genes,
        name_of=lambda place: f"{name}: cell {place:,}",
    )
    return block, [data.address]


def _as_numpy(array: pa.Array) -> NDArray:
    # pyarrow's own to_numpy imports pandas: most of the time of opening, and 30 MB
    letter = "f" if pa.types.is_floating(array.type) else "u" if pa.types.is_unsigned_integer(array.type) else "i"
    kind = np.dtype(f"{letter}{array.type.bit_width // 8}")
    return np.frombuffer(array.buffers()[1], kind, len(array), array.offset * kind.itemsize)
