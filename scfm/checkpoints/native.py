"""The native model directory: what a trained model is, in files that anything can read.

config.json          sizes, tokenisation, value kind, heads
vocab.json           the genes
model.safetensors    backbone.* and heads.<task>.*
conditions.json      the names behind batch, modality and perturbation indices
training_data.json   what it was trained on, and cells.hash, the hashes of those cells
README.md            the model card
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from scfm.checkpoints.hub import model_folder
from scfm.data.hashing import load_hashes, save_hashes
from scfm.data.store import CellStore, ValueKind, only_genes
from scfm.data.tokens import TokenConfig, Tokeniser
from scfm.data.vocabulary import Vocabulary
from scfm.errors import ScfmError
from scfm.model import MODELS
from scfm.model.heads import HeadSpec
from scfm.recipe import ModelConfig

FORMAT_VERSION = 1


@dataclass
class ModelFiles:
    """A model and all that gives its numbers a meaning.

    Attributes:
        model: the recipe's model section.
        tokens: how cells become tokens; mask ratios play no part in inference.
        value_kind: what it was trained on, raw `counts` or `normalised` values.
        vocabulary: what the gene ids mean.
        heads: what it predicts.
        cell_conditions: obs column -> category names behind its indices.
        gene_conditions: condition -> category names behind its indices.
        gene_tables: condition -> index of every vocabulary entry.
        genes_read: ids of the genes that it reads, if not all of the vocabulary (the highly variable ones ...).
        training_data: manifest entries of what it was trained on.
        cell_hashes: (n,) sorted profile hashes of the cells it was trained on, or None where that is not known.
        card: text of README.md.
    """

    model: ModelConfig
    tokens: TokenConfig
    value_kind: ValueKind
    vocabulary: Vocabulary
    heads: list[HeadSpec]
    cell_conditions: dict[str, list[str]] = field(default_factory=dict)
    gene_conditions: dict[str, list[str]] = field(default_factory=dict)
    gene_tables: dict[str, list[int]] = field(default_factory=dict)
    genes_read: list[str] | None = None
    training_data: dict[str, Any] = field(default_factory=dict)
    cell_hashes: NDArray[np.uint64] | None = None
    card: str = ""

    def tokeniser(self, tokens: TokenConfig | None = None) -> Tokeniser:
        """Return what turns cells into this model's tokens; `tokens` in place of its own where given."""
        tables = {name: np.asarray(table, np.int64) for name, table in self.gene_tables.items()}
        return Tokeniser(tokens or self.tokens, self.vocabulary, self.value_kind, tables, self.entries_read)

    @property
    def entries_read(self) -> NDArray[np.int64] | None:
        """Vocabulary ids (n,) of the genes that it reads, ascending; None for all."""
        if self.genes_read is None:
            return None
        read = set(self.genes_read)
        return np.array([entry for entry, gene in enumerate(self.vocabulary.entries) if gene.id in read], np.int64)

    def reading(self, store: CellStore) -> CellStore:
        """Return the cells with the genes that the model reads and no others: what its tokeniser takes."""
        entries = self.entries_read
        return store if entries is None else only_genes(store, entries)

    def build(self) -> nn.Module:
        """Return a network of this form with fresh weights."""
        if self.model.name not in MODELS:
            raise ScfmError(f"model.name: {self.model.name!r} is not known; choose one of {sorted(MODELS)}")
        return MODELS[self.model.name](
            self.model,
            n_tokens=len(self.vocabulary),
            pad=self.vocabulary.pad,
            n_bins=self.tokens.bins or 1,
            cell_conditions={name: len(names) for name, names in self.cell_conditions.items()},
            gene_conditions={name: len(names) for name, names in self.gene_conditions.items()},
            heads=self.heads,
        )


def save_model(folder: Path, network: nn.Module, files: ModelFiles, *, replace: bool = False) -> None:
    """Write a model directory under a temporary name, then rename it.

    Raises ScfmError where the folder holds anything, unless `replace` is set and it is a model directory.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_model(folder, weights, files, replace=replace)


def write_model(folder: Path, weights: dict[str, Tensor], files: ModelFiles, *, replace: bool = False) -> None:
    """Write a model directory from its tensors by name; as `save_model` in all else."""
    from safetensors.torch import save_file

    if folder.exists() and any(folder.iterdir()):
        if not replace:
            raise ScfmError(f"{folder}: is not empty; choose another directory for the model")
        if not (folder / "config.json").exists():
            raise ScfmError(f"{folder}: holds something that is not a model directory and is left as it is")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, content in as_plain(files).items():
        (partial / f"{name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    files.vocabulary.save(partial / "vocab.json")
    if files.cell_hashes is not None:
        save_hashes(partial / "cells.hash", files.cell_hashes)
    (partial / "README.md").write_text(files.card, encoding="utf-8")
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    former = folder.with_name(f".{folder.name}.former")
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        folder.rename(former)
    partial.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


def as_plain(files: ModelFiles) -> dict[str, Any]:
    """Return what config.json, conditions.json and training_data.json say, by these names."""
    config = {
        "format_version": FORMAT_VERSION,
        # the kernels that it was trained with may not run where it is used, or in that precision
        "model": asdict(replace(files.model, backend="auto")),
        "tokens": asdict(files.tokens),
        "value_kind": files.value_kind,
        "vocabulary_hash": files.vocabulary.hash,
        "heads": [asdict(head) for head in files.heads],
        "genes_read": files.genes_read,
    }
    conditions = {"cell": files.cell_conditions, "gene": files.gene_conditions, "gene_tables": files.gene_tables}
    return {"config": config, "conditions": conditions, "training_data": files.training_data}


def from_plain(plain: dict[str, Any], vocabulary: Vocabulary, source: str) -> ModelFiles:
    """Return the model that `as_plain` described, without card and hashes. Raises ScfmError naming the source."""
    config, conditions = plain["config"], plain["conditions"]
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise ScfmError(f"{source}: format version {version}; this scfm reads {FORMAT_VERSION}")
    return ModelFiles(
        model=of_type(ModelConfig, config["model"], source),
        tokens=of_type(TokenConfig, config["tokens"], source),
        value_kind=config["value_kind"],
        vocabulary=vocabulary,
        heads=[of_type(HeadSpec, head, source) for head in config["heads"]],
        cell_conditions=conditions["cell"],
        gene_conditions=conditions["gene"],
        gene_tables=conditions.get("gene_tables", {}),  # directories of before there were such have none
        genes_read=config.get("genes_read"),  # models of before it was written read all
        training_data=plain["training_data"],
    )


def read_model(folder: Path | str) -> ModelFiles:
    """Return what a model directory, or a model on the Hub, says of itself, without the weights.

    Raises ScfmError where it is not one.
    """
    folder = model_folder(folder)
    if not (folder / "config.json").is_file():
        raise ScfmError(f"{folder}: is not a model directory (no config.json); give the `model` folder of a run")
    names = ("config", "conditions", "training_data")
    plain = {name: read_json(folder / f"{name}.json") for name in names}
    vocabulary = Vocabulary.load(folder / "vocab.json")
    files = from_plain(plain, vocabulary, f"{folder}/config.json")
    if vocabulary.hash != plain["config"]["vocabulary_hash"]:
        raise ScfmError(f"{folder}/vocab.json: is not the vocabulary that the model was trained with (hash differs)")
    hashes, card = folder / "cells.hash", folder / "README.md"
    files.cell_hashes = load_hashes(hashes) if hashes.exists() else None
    files.card = card.read_text(encoding="utf-8") if card.exists() else ""
    return files


def read_weights(folder: Path | str) -> dict[str, Tensor]:
    """Return the tensors of a model directory by name."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = model_folder(folder) / "model.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ScfmError(f"{path}: cannot be read as safetensors ({error}); the file is missing or damaged") from error


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], source: str, *, prefix: str = "") -> None:
    """Copy weights into a network, strictly.

    Args:
        network: receives the weights.
        weights: tensors by name.
        source: named in the error.
        prefix: only names that start with it are expected and copied, e.g. `backbone.` to leave the heads fresh.

    Raises:
        ScfmError: lists every missing, unexpected and mis-shaped tensor.
    """
    own = {name: tensor for name, tensor in network.state_dict().items() if name.startswith(prefix)}
    given = {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    check_weights(own, given, source)
    network.load_state_dict(given, strict=False)


def check_weights(own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Raise ScfmError that lists every tensor that a model misses, does not know, or has in another shape."""
    wrong = [f"missing: {name}" for name in own.keys() - given.keys()]
    wrong += [f"unexpected: {name}" for name in given.keys() - own.keys()]
    wrong += [
        f"shape: {name} is {tuple(given[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in own.keys() & given.keys()
        if given[name].shape != own[name].shape
    ]
    if wrong:
        raise ScfmError(f"{source}: the weights do not fit the model:\n  " + "\n  ".join(sorted(wrong)))


def load_model(folder: Path | str) -> tuple[nn.Module, ModelFiles]:
    """Return the network, weights in place, and its files; of a directory, or of a model on the Hub."""
    folder = model_folder(folder)
    files = read_model(folder)
    network = files.build()
    load_weights(network, read_weights(folder), str(folder))
    return network, files


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # no file, no text, or no JSON
        raise ScfmError(f"{path}: cannot be read ({error}); the model directory is incomplete or damaged") from error


def of_type(kind: type, values: dict[str, Any], source: str) -> Any:
    """Build a dataclass from stored values; a key that this version does not know is an error, not ignored."""
    types = get_type_hints(kind)
    unknown = values.keys() - types.keys()
    if unknown:
        raise ScfmError(f"{source}: unknown keys {sorted(unknown)}; was it written by a newer scfm?")
    inner = {name: of_type(types[name], value, source) for name, value in values.items() if is_dataclass(types[name])}
    return kind(**values | inner)
