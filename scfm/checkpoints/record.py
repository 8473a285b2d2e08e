"""scfm.json: beside an exported checkpoint, all that the original has no place for, so that the way back is exact."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scfm.checkpoints.native import ModelFiles, as_plain, from_plain, read_json
from scfm.data.hashing import load_hashes, save_hashes
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.errors import ScfmError

RECORD = "scfm.json"


@dataclass(frozen=True)
class Record:
    """The model that was exported, and how.

    Attributes:
        files: the native model's own description.
        native_of: for every row of the original's gene embedding the vocabulary's index, -1 for a row that was added.
        added: tensors that the original has and the native model has not.
        kept: what stands in the native model's tensors and has no place in the original's.
    """

    files: ModelFiles
    native_of: list[int]
    added: list[str]
    kept: dict[str, Any] = field(default_factory=dict)


def write_record(folder: Path, record: Record, weights: Path) -> None:
    """Write scfm.json, and cells.hash where the hashes of the training cells are known; `weights` is written already.

    The digest of the weights ties the record to them: what it says of training is not true of weights trained since.
    """
    files = record.files
    content: dict[str, Any] = {
        **as_plain(files),
        "vocabulary": [[gene.id, gene.ensembl, gene.symbol] for gene in files.vocabulary.entries],
        "native_of": record.native_of,
        "added": record.added,
        "kept": record.kept,
        "weights": digest(weights),
        "card": files.card,
    }
    (folder / RECORD).write_text(json.dumps(content), encoding="utf-8")
    if files.cell_hashes is not None:
        save_hashes(folder / "cells.hash", files.cell_hashes)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_record(folder: Path, weights: Path) -> Record:
    """Read what `write_record` wrote.

    Raises:
        ScfmError: it is damaged, of another version, or the weights have changed since.
    """
    path = folder / RECORD
    content = read_json(path)
    needed = {"config", "conditions", "training_data", "vocabulary", "native_of", "added", "kept", "weights", "card"}
    if not needed <= content.keys():
        raise ScfmError(f"{path}: lacks {sorted(needed - content.keys())}; remove it to read the folder without it")
    if digest(weights) != content["weights"]:
        raise changed(weights)
    vocabulary = Vocabulary([Gene(*names) for names in content["vocabulary"]])
    files = from_plain(content, vocabulary, str(path))
    files.card = content["card"]
    if (folder / "cells.hash").exists():
        files.cell_hashes = load_hashes(folder / "cells.hash")
    return Record(files, content["native_of"], content["added"], content["kept"])


def changed(path: Path) -> ScfmError:
    """Return the error of a file that is no longer what was exported with a record."""
    return ScfmError(f"{path}: is not what scfm exported; remove {RECORD} to read the folder without it")
