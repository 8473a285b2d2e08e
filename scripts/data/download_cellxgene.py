"""Download the h5ad files of CELLxGENE collections by id: in parts that are taken up again, checked, a few at a time.

    python scripts/data/download_cellxgene.py corpus 4195ab4c-20bd-4cd3-8b3d-65601277e731 ...

writes `corpus/COLLECTION/DATASET.h5ad`, and `corpus/downloaded.json` with size, SHA-256, version and title of each.
A file gets its name only when it is whole: of the size that the collection names, and an HDF5 file from its first byte
to its last. What a lost connection left goes on where it stopped; what is there already is not fetched again, unless
the collection has a newer version of it.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scfm.errors import ScfmError

API = "https://api.cellxgene.cziscience.com/curation/v1"
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
TRIES = 6
PAUSE = 2.0  # seconds before the second try; doubled each time
TIMEOUT = 60
WORTH_ANOTHER_TRY = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Dataset:
    """An h5ad file of a collection, as the service describes it; `size` is None where it does not say."""

    collection: str
    id: str
    version: str
    title: str
    url: str
    size: int | None

    @property
    def name(self) -> str:
        """Where it is kept, below the folder of all downloads."""
        return f"{self.collection}/{self.id}.h5ad"


def datasets_of(collection: str, api: str = API) -> list[Dataset]:
    """Return the data sets of a collection that have an h5ad file.

    Raises ScfmError for what is no id, a collection that is not there, and an answer that describes none.
    """
    if not UUID.fullmatch(collection):
        raise ScfmError(f"{collection!r}: not an id of a collection; it is the end of the collection's address")
    url = f"{api}/collections/{collection}"
    try:
        described = json.loads(_fetched(url))
        found = []
        for dataset in described["datasets"]:
            assets = [asset for asset in dataset.get("assets", ()) if asset["filetype"] == "H5AD"]
            if assets:
                size = assets[0].get("filesize")
                version, title = str(dataset.get("dataset_version_id", "")), str(dataset.get("title", ""))
                identity = str(dataset["dataset_id"])
                if not UUID.fullmatch(identity):
                    raise ValueError(f"dataset_id {identity!r}")
                found.append(
                    Dataset(collection, identity, version, title, assets[0]["url"], None if size is None else int(size))
                )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ScfmError(f"{url}: not the description of a collection ({type(error).__name__}: {error})") from error
    if not found:
        raise ScfmError(f"{url}: the collection has no data set with an h5ad file")
    return found


class Downloads:
    """A folder of downloads, and the list of those that are whole.

    Args:
        folder: where the files are, or will be.

    Raises:
        ScfmError: the list that is there cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.list = folder, folder / "downloaded.json"
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:
            self.whole: dict[str, dict[str, Any]] = json.loads(self.list.read_text()) if self.list.exists() else {}
        except ValueError as error:
            raise ScfmError(
                f"{self.list}: cannot be read ({error}); remove it to have all files checked anew"
            ) from error

    def fetch(self, dataset: Dataset) -> bool:
        """Have a data set on the disk; return whether it had to be fetched.

        Raises ScfmError where it cannot be fetched, is not of the promised size, or is no HDF5 file.
        """
        target = self.folder / dataset.name
        known = self.whole.get(dataset.name, {})
        is_it = (known.get("version"), known.get("url")) == (dataset.version, dataset.url)
        if is_it and target.exists() and target.stat().st_size == known["size"]:
            return False
        target.parent.mkdir(exist_ok=True)
        # a part is of one version of one address: another one never goes on where it stopped
        of_this = hashlib.sha256(f"{dataset.url} {dataset.version} {dataset.size}".encode()).hexdigest()[:16]
        part = target.with_name(f".{dataset.id}.{of_this}.part")
        fetch(dataset.url, part, dataset.size)
        with part.open("rb") as file:
            sha256, size = hashlib.file_digest(file, "sha256").hexdigest(), part.stat().st_size
        try:
            _expect_hdf5(part, dataset.url)
        except ScfmError:
            part.unlink()
            raise
        os.replace(part, target)
        with self._lock:
            self.whole[dataset.name] = {**asdict(dataset), "size": size, "sha256": sha256}
            written = self.list.with_name(".downloaded.json.part")
            written.write_text(json.dumps(self.whole, indent=1, sort_keys=True) + "\n")
            os.replace(written, self.list)
        return True

    def changed(self) -> list[str]:
        """Return the names of files that are listed as whole, and are not what was downloaded."""
        found = []
        for name, entry in sorted(self.whole.items()):
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != entry["size"]:
                found.append(name)
                continue
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    found.append(name)
        return found


def fetch(url: str, part: Path, size: int | None) -> None:
    """Write what an address holds, going on after the bytes that are there already.

    Args:
        url: the address.
        part: file to write; what it holds is taken for the beginning.
        size: bytes to expect, None where unknown.

    Raises:
        ScfmError: it cannot be fetched in `TRIES` tries without progress, or has another size.
    """
    tries, furthest = 0, part.stat().st_size if part.exists() else 0
    while True:
        begun = part.stat().st_size if part.exists() else 0
        if size is not None and begun > size:
            part.unlink()
            raise ScfmError(f"{url}: {begun:,} bytes came, {size:,} are expected; try again")
        if size is not None and begun == size:
            return
        try:
            promised = _fetch_rest(url, part, begun)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code not in WORTH_ANOTHER_TRY:
                raise ScfmError(f"{url}: cannot be downloaded ({error})") from error
            if getattr(error, "filename", None) == str(part):
                raise ScfmError(f"{part}: cannot be written ({error})") from error
            reason = str(error)
        else:
            came = part.stat().st_size
            if size is not None and promised is not None and promised != size:
                part.unlink()
                raise ScfmError(f"{url}: has {promised:,} bytes, but its collection says {size:,}; try again later")
            if came == (size if size is not None else promised) or (size is None and promised is None):
                return
            reason = f"the connection closed after {came:,} bytes"
        # a try that brought something does not count: a large file outlives many connections
        now = part.stat().st_size if part.exists() else 0
        tries = 1 if now > furthest else tries + 1
        furthest = max(furthest, now)
        if tries >= TRIES:
            raise ScfmError(f"{url}: cannot be downloaded ({reason}), tried {TRIES} times; run it again to go on")
        time.sleep(PAUSE * 2 ** (tries - 1))


def _fetch_rest(url: str, part: Path, begun: int) -> int | None:
    """Append the bytes from `begun` on; return how many there are in all, None where the server does not say."""
    headers = {"User-Agent": "scfm", "Accept-Encoding": "identity"}
    if begun:
        headers["Range"] = f"bytes={begun}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and begun:  # there is nothing after the bytes that are here: all, or of another file
            total = re.search(r"/(\d+)$", error.headers.get("Content-Range", ""))
            if total and int(total[1]) == begun:
                return begun
            part.unlink()
            raise OSError("what was there is not the beginning of the file") from error
        raise
    with response:
        goes_on = response.status == 206
        if goes_on and not response.headers.get("Content-Range", "").startswith(f"bytes {begun}-"):
            raise OSError(f"the server sent {response.headers.get('Content-Range')}, not the bytes from {begun:,} on")
        length = response.headers.get("Content-Length")
        with part.open("ab" if goes_on else "wb") as file:
            while chunk := response.read(2**20):
                file.write(chunk)
    return None if length is None else int(length) + (begun if goes_on else 0)


def _fetched(url: str) -> bytes:
    """Return what an address holds. Raises ScfmError where it cannot be reached, or does not know of it."""
    for tried in range(TRIES):
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, headers={"User-Agent": "scfm"}), timeout=TIMEOUT
            ) as response:
                return response.read()
        except (OSError, http.client.HTTPException) as error:
            lasting = isinstance(error, urllib.error.HTTPError) and error.code not in WORTH_ANOTHER_TRY
            if lasting or tried == TRIES - 1:
                raise ScfmError(f"{url}: cannot be downloaded ({error})") from error
            time.sleep(PAUSE * 2**tried)
    raise AssertionError("the last try returns or raises")


def _expect_hdf5(path: Path, url: str) -> None:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            missing = [name for name in ("X", "obs", "var") if name not in file]
    except OSError as error:
        raise ScfmError(f"{url}: what came is no whole HDF5 file ({error}); try again") from error
    if missing:
        raise ScfmError(f"{url}: what came is no h5ad file: it has no {', '.join(missing)}")


def download(folder: Path, collections: Sequence[str], at_once: int = 4, api: str = API) -> list[str]:
    """Download collections, saying what happens; return the complaints about files that could not be fetched.

    Raises ScfmError where a collection is not there: before anything is fetched.
    """
    wanted = {dataset.name: dataset for id in dict.fromkeys(collections) for dataset in datasets_of(id, api)}
    downloads, complaints = Downloads(folder), []
    with ThreadPoolExecutor(at_once) as workers:
        running = {workers.submit(downloads.fetch, dataset): dataset for dataset in wanted.values()}
        for number, done in enumerate(as_completed(running), 1):
            dataset = running[done]
            try:
                said = "fetched" if done.result() else "was there"
            except (ScfmError, OSError) as error:
                complaints.append(f"{dataset.name}: {error}")
                said = f"FAILED: {error}"
            print(f"{number}/{len(running)} {dataset.name} ({dataset.title}): {said}", flush=True)
    return complaints


def main() -> int:
    """Download, or check what was downloaded; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write the files")
    parser.add_argument("collections", nargs="*", help="ids of collections, the end of their addresses")
    parser.add_argument("--at-once", type=int, default=4, help="files to fetch at the same time (default: %(default)s)")
    parser.add_argument("--verify", action="store_true", help="fetch nothing; compare all files with their SHA-256")
    parser.add_argument("--api", default=API, help="the curation service (default: %(default)s)")
    given = parser.parse_args()
    if given.verify == bool(given.collections) or given.at_once < 1:
        parser.error("give ids of collections, or --verify and none; --at-once is at least 1")
    try:
        if given.verify:
            complaints = [f"{name}: is not what was downloaded" for name in Downloads(given.folder).changed()]
        else:
            complaints = download(given.folder, given.collections, given.at_once, given.api)
    except (ScfmError, OSError) as error:
        complaints = [str(error)]
    for complaint in complaints:
        print(f"download_cellxgene: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
