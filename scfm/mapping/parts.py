"""An index on the disk: a JSON file that lists its parts, and safetensors files that are read where they lie.

index.json                      the model, label names, batch column, parts and calibration; replacing it commits
part-00000.safetensors          vectors (n, D) float16, label:NAME (n,) int32, cells (n,) uint64 profile hashes
calibration-00001.safetensors   leave-one-out neighbours of a sample; the number is that of the parts it was made with
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scfm.errors import ScfmError

FORMAT_VERSION = 1
INDEX = "index.json"
LABEL = "label:"
TYPES = {"F16": "<f2", "F32": "<f4", "I32": "<i4", "I64": "<i8", "U64": "<u8"}


@dataclass
class Part:
    """Cells that were added together.

    Attributes:
        vectors: (n, D) float16 unit vectors.
        labels: column -> (n,) int32 index into the index's categories of it.
        cells: (n,) uint64 profile hashes.
        source: where the cells came from, written into results.
        file: name in the index's folder; None for a part that is not on the disk yet.
    """

    vectors: NDArray[np.float16]
    labels: dict[str, NDArray[np.int32]]
    cells: NDArray[np.uint64]
    source: str
    file: str | None = None

    def __len__(self) -> int:
        return len(self.vectors)


@dataclass(frozen=True)
class Calibration:
    """Leave-one-out neighbours of a sample of the reference's own cells.

    Attributes:
        rows: (s,) sampled rows.
        distances: (s, K) ascending distances to the nearest other cells (of other batches where the index has them).
        neighbours: (s, K) their rows, -1 where there are fewer.
    """

    rows: NDArray[np.int64]
    distances: NDArray[np.float32]
    neighbours: NDArray[np.int64]


@dataclass
class Content:
    """All of an index.

    Attributes:
        model: what made the vectors: `hash`, `source` and `width`.
        categories: label column -> its names, in the order in which they were met.
        batch: obs column of which calibration takes neighbours from other values only, or None.
        parts: cells, in the order in which they were added.
        calibration: None until it was made.
    """

    model: dict[str, Any]
    categories: dict[str, list[str]]
    batch: str | None = None
    parts: list[Part] = field(default_factory=list)
    calibration: Calibration | None = None


def write_index(folder: Path, content: Content, known: str | None) -> str:
    """Write the parts that are not in the folder yet, then replace index.json; return the digest of the new one.

    Whoever reads meanwhile, or after a crash, has the former index whole.

    Args:
        folder: receives the files; is made if need be.
        content: a part with a file name is there already.
        known: digest of the index.json that `content` extends; None for a new folder.

    Raises:
        ScfmError: the folder holds something else, or an index that has changed since it was read.
    """
    path = folder / INDEX
    if known is None and folder.exists() and any(folder.iterdir()):
        raise ScfmError(f"{folder}: is not empty; choose another folder for the index, or extend the one that is there")
    if known is not None and digest(path) != known:
        raise ScfmError(f"{path}: has changed since it was read; load the index again and repeat the extension")
    folder.mkdir(parents=True, exist_ok=True)
    assert content.calibration is not None
    for number, part in enumerate(content.parts):
        if part.file is None:
            labels = {f"{LABEL}{name}": codes for name, codes in part.labels.items()}
            name = f"part-{number:05}.safetensors"
            write_tensors(folder / name, {"vectors": part.vectors, "cells": part.cells, **labels})
            part.file = name
    calibration = f"calibration-{len(content.parts):05}.safetensors"
    write_tensors(folder / calibration, vars(content.calibration))
    listed = {
        "format_version": FORMAT_VERSION,
        "model": content.model,
        "labels": content.categories,
        "batch": content.batch,
        "calibration": calibration,
        "parts": [{"file": part.file, "cells": len(part), "source": part.source} for part in content.parts],
    }
    written = path.with_name(f".{INDEX}.partial")
    written.write_text(json.dumps(listed, indent=1), encoding="utf-8")
    os.replace(written, path)
    for former in folder.glob("calibration-*.safetensors"):
        if former.name != calibration:
            former.unlink()
    return digest(path)


def read_index(folder: Path) -> tuple[Content, str]:
    """Return an index, its vectors memory-mapped, and the digest of its index.json.

    Raises ScfmError where the folder is no index, or a file is missing, damaged or not what index.json says.
    """
    path = folder / INDEX
    if not path.is_file():
        raise ScfmError(f"{folder}: is not a reference index (no {INDEX}); `scfm index` makes one")
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        if (version := listed["format_version"]) != FORMAT_VERSION:
            raise ScfmError(f"{path}: format version {version}; this scfm reads {FORMAT_VERSION}")
        model, categories, batch = listed["model"], listed["labels"], listed["batch"]
        parts = [(str(part["file"]), int(part["cells"]), str(part["source"])) for part in listed["parts"]]
        calibration, width = str(listed["calibration"]), int(model["width"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ScfmError(f"{path}: cannot be read ({type(error).__name__}: {error}); the index is damaged") from error
    content = Content(model, categories, batch)
    for file, n, source in parts:
        tensors = map_tensors(folder / file)
        needed = {"vectors": (n, width), "cells": (n,), **{f"{LABEL}{name}": (n,) for name in categories}}
        if (shapes := {name: tensor.shape for name, tensor in tensors.items()}) != needed:
            raise ScfmError(f"{folder / file}: holds {shapes}, index.json says {needed}; the index is damaged")
        labels = {name: tensors[f"{LABEL}{name}"] for name in categories}
        content.parts.append(Part(tensors["vectors"], labels, tensors["cells"], source, file))
    stored = map_tensors(folder / calibration)
    if stored.keys() != {"rows", "distances", "neighbours"}:
        raise ScfmError(f"{folder / calibration}: holds {sorted(stored)}; the index is damaged")
    content.calibration = Calibration(**stored)
    return content, digest(path)


def write_tensors(path: Path, tensors: dict[str, NDArray]) -> None:
    """Write a safetensors file under a temporary name, then rename it; the library's own writer copies every tensor."""
    header: dict[str, Any] = {}
    widest_first = sorted(tensors, key=lambda name: -tensors[name].itemsize)  # so that every tensor is aligned
    end = 0
    for name in widest_first:
        begin, end = end, end + tensors[name].nbytes
        kind = next(known for known, numpy_name in TYPES.items() if tensors[name].dtype == np.dtype(numpy_name))
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    written = path.with_name(f".{path.name}.partial")
    with written.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in widest_first:
            np.ascontiguousarray(tensors[name]).tofile(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(written, path)


def map_tensors(path: Path) -> dict[str, NDArray]:
    """Return the tensors of a safetensors file as views of the mapped file: what is not read takes no memory."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy"):  # checks the header, the offsets, and that nothing was cut off
            pass
    except (OSError, SafetensorError) as error:
        raise ScfmError(f"{path}: cannot be read as safetensors ({error}); the file is missing or damaged") from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in TYPES:
            raise ScfmError(f"{path}: {name} is of type {entry['dtype']}, which no index has; the file is damaged")
        begin, end = entry["data_offsets"]
        kind = np.dtype(TYPES[entry["dtype"]])
        flat = np.frombuffer(mapped, kind, (end - begin) // kind.itemsize, 8 + size + begin)
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
