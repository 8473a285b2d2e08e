"""`scfm compress` and `scfm verify`: shard directories on their way, and after it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from scfm.data.shards import read_manifest, verify_shards
from scfm.errors import ScfmError

LEVEL = 1  # of zstd: higher levels take many times as long, and do not make packed cells smaller


def compress(shards: str, *, out: str, level: int = LEVEL) -> None:
    """Write a copy of a shard directory whose shards are compressed; training reads it through `data.cache`.

    Args:
        shards: Shard directory written by `scfm prepare`.
        out: Where the copy goes: a path, or a URL that fsspec can write to (s3://, gs:// ...).
        level: Of zstd; higher ones take many times as long, and only shards of the list codec are smaller for it.

    Raises ScfmError where a shard is missing or damaged, or the place is taken.
    """
    import pyarrow as pa
    from fsspec.core import url_to_fs
    from rich.progress import track

    directory, manifest = Path(shards), read_manifest(Path(shards))
    filesystem, root = url_to_fs(out.rstrip("/"))
    if filesystem.exists(f"{root}/manifest.json"):
        raise ScfmError(f"{out}: holds a shard directory already; name another --out, or remove it first")
    filesystem.makedirs(f"{root}/shards", exist_ok=True)
    codec = pa.Codec("zstd", compression_level=level)
    sent: list[dict[str, Any]] = []
    for shard in track(manifest["shards"], "compressing"):
        content = _content(directory / shard["file"], shard["sha256"])
        packed = codec.compress(content, asbytes=True)
        name = f"{shard['file']}.zst"
        filesystem.pipe_file(f"{root}/{name}", packed)
        sent.append({"file": name, "bytes": len(packed), "sha256": hashlib.sha256(packed).hexdigest()})
    for name in ("vocab.json", "cells.hash"):
        filesystem.pipe_file(f"{root}/{name}", (directory / name).read_bytes())
    manifest["shards"] = [
        {**shard, "transport": transport} for shard, transport in zip(manifest["shards"], sent, strict=True)
    ]
    # last: without it the directory is none
    filesystem.pipe_file(f"{root}/manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False).encode())
    cells = max(1, manifest["cells"])
    plain, packed_bytes = (sum(record["bytes"] for record in of) for of in (manifest["shards"], sent))
    print(f"{len(sent):,} shards, {plain / cells:,.0f} bytes per cell -> {packed_bytes / cells:,.0f} in {out}")


def verify(shards: str) -> None:
    """Read every shard of a directory and compare it with its SHA-256 in the manifest.

    Args:
        shards: Shard directory written by `scfm prepare`.

    Raises ScfmError that names all damaged files.
    """
    print(f"{verify_shards(shards):,} shards in {shards} are as they were written")


def _content(path: Path, sha256: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ScfmError(f"{path}: cannot be read ({error.strerror})") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ScfmError(f"{path}: is damaged (SHA-256 differs from the manifest's); copy it again")
    return content
