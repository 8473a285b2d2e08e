"""Shards of a network disk or an object store, in a bounded cache on a local disk.

A file of the cache is named after the SHA-256 of what it holds, so runs and processes share it. Locks on a file beside
it say who fetches it (one process) and who uses it (any number): what is in use is never evicted, not by another
process either, and the locks of a process that was killed are gone with it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scfm.errors import ScfmError

ATTEMPTS = 3
CHUNK = 2**22
# beside a file: as it arrives, as it is decompressed, and a file of no content, as large as both, that takes their room
UNFINISHED = (".part", ".plain", ".room")


@dataclass(frozen=True)
class ShardCache:
    """Fetches files through fsspec, checks them as they arrive, and evicts those that were not used for longest.

    Attributes:
        directory: where they are kept; it is made if need be.
        most_bytes: what the files there may take in all.
    """

    directory: Path
    most_bytes: int

    @contextmanager
    def using(self, location: str, shard: Mapping[str, Any]) -> Iterator[Path]:
        """Give the local copy of a shard, which stays for as long as the context.

        Args:
            location: the shard directory, a path or a URL that fsspec knows.
            shard: what the manifest says of the shard.

        Raises ScfmError that names the file where it cannot be fetched, arrives damaged, or finds no room.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"{shard['sha256']}.arrow"
        with self._lock_of(path).open("wb") as lock:
            while True:
                fcntl.flock(lock, fcntl.LOCK_SH)
                if path.is_file():  # an eviction may come between two locks
                    break
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.is_file():
                    self._fetch(location, shard, path)
            os.utime(path)
            yield path

    def _lock_of(self, path: Path) -> Path:
        return path.with_suffix(".lock")

    def _fetch(self, location: str, shard: Mapping[str, Any], path: Path) -> None:
        sent = shard.get("transport", shard)
        url, complaint = f"{location.rstrip('/')}/{sent['file']}", ""
        part, plain, room = (path.with_suffix(suffix) for suffix in UNFINISHED)
        packed = sent is not shard
        try:
            self._reserve(sent["bytes"] + (shard["bytes"] if packed else 0), room, url)
            for _ in range(ATTEMPTS):
                complaint = _download(url, part, sent["bytes"], sent["sha256"])
                if not complaint:
                    break
            else:
                raise ScfmError(f"{url}: {complaint}, {ATTEMPTS} times in a row")
            if packed:
                _expand(part, plain, url, shard)
                part.unlink()
            with self._room():  # at no moment is the shard there twice, or not at all
                os.replace(plain if packed else part, path)
                _forget(path)
        except OSError as error:
            raise ScfmError(f"{self.directory}: the cache of shards cannot be written ({error})") from error
        finally:
            with self._room():
                _forget(path)

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Let one process, or thread, at a time change what the cache holds."""
        with (self.directory / "room.lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _reserve(self, n_bytes: int, room: Path, url: str) -> None:
        """Make room for a file, least recently used ones first, and take it by an empty (sparse) file of that size."""
        with self._room():
            _forget(room)  # of a process that was killed
            held = {path: path.stat() for path in self.directory.iterdir() if path.suffix in (".arrow", room.suffix)}
            taken = sum(file.st_size for file in held.values())
            for path, file in sorted(held.items(), key=lambda item: item[1].st_mtime_ns):
                if taken + n_bytes <= self.most_bytes:
                    break
                if self._evict(path):
                    taken -= file.st_size
            if taken + n_bytes > self.most_bytes:
                raise ScfmError(
                    f"data.cache_gb: {url} needs {n_bytes / 1e9:,.3f} GB, and of {self.most_bytes / 1e9:,.3f} GB "
                    f"{taken / 1e9:,.3f} GB hold shards in use; give the cache more room"
                )
            with room.open("wb") as file_:
                file_.truncate(n_bytes)

    def _evict(self, path: Path) -> bool:
        """Remove a file that nobody uses; return whether it was one."""
        with self._lock_of(path).open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            path.unlink(missing_ok=True)
            _forget(path)
            return True


def _forget(path: Path) -> None:
    """Remove what a fetch has not finished, and give its room back."""
    for suffix in UNFINISHED:
        path.with_suffix(suffix).unlink(missing_ok=True)


def _download(url: str, into: Path, n_bytes: int, sha256: str) -> str:
    """Copy a whole file; return what is wrong with what arrived, or nothing."""
    from fsspec.core import url_to_fs

    try:
        filesystem, remote = url_to_fs(url)
        filesystem.get_file(remote, str(into))
    except FileNotFoundError:
        return "is not there"
    except Exception as error:  # every file system has errors of its own
        return f"cannot be fetched ({type(error).__name__}: {error})"
    size = into.stat().st_size
    if size != n_bytes:
        return f"{size:,} bytes arrived, but the manifest says {n_bytes:,}"
    with into.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if found == sha256 else "what arrived is damaged: its SHA-256 is not the manifest's"


def _expand(packed: Path, into: Path, url: str, shard: Mapping[str, Any]) -> None:
    """Decompress a file of zstd. Raises ScfmError where that does not give the shard."""
    import pyarrow as pa

    digest = hashlib.sha256()
    try:
        with pa.input_stream(str(packed), compression="zstd") as source, into.open("wb") as sink:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                sink.write(chunk)
    except pa.ArrowException as error:
        raise ScfmError(f"{url}: cannot be decompressed ({error})") from error
    if digest.hexdigest() != shard["sha256"]:
        raise ScfmError(
            f"{url}: does not hold the shard {shard['file']} that the manifest describes; compress it again"
        )
