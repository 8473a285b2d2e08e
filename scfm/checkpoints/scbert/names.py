"""What scBERT calls scfm's tensors, and the form in which it keeps them.

scBERT has a row of its gene table, and a column of its fine-tuning head, for every gene and last of all for the empty
token that ends each cell: here `<cls>`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scfm.checkpoints.native import ModelFiles
from scfm.data.vocabulary import Vocabulary
from scfm.errors import ScfmError

TABLE = "backbone.gene_embedding.weight"
GENES = "pos_emb.emb.weight"
VALUES = "token_emb.weight"
COUNTER = "performer.calls_since_last_redraw"
PARTS = ("token_emb", "pos_emb", "performer", "norm", "to_out")

# Our module or tensor, and scBERT's; a head stands under its kind. [a] and [f] are the branches of block i.
NAMES: tuple[tuple[str, str], ...] = (
    ("backbone.gene_embedding", "pos_emb.emb"),
    ("backbone.value_embedding", "token_emb"),
    ("backbone.since_redraw", COUNTER),
    ("backbone.blocks.[i].attention_norm.g", "[a].g"),
    ("backbone.blocks.[i].attention_norm", "[a].norm"),
    ("backbone.blocks.[i].mixer.projection", "[a].fn.fast_attention.projection_matrix"),
    ("backbone.blocks.[i].qkv", "[a].fn.to_[qkv]"),
    ("backbone.blocks.[i].out_proj", "[a].fn.to_out"),
    ("backbone.blocks.[i].feed_forward_norm.g", "[f].g"),
    ("backbone.blocks.[i].feed_forward_norm", "[f].norm"),
    ("backbone.blocks.[i].linear1", "[f].fn.fn.w1"),
    ("backbone.blocks.[i].linear2", "[f].fn.fn.w2"),
    ("backbone.norm", "norm"),
    ("heads.bins.out", "to_out"),
    ("heads.genes.token", "to_out.conv1"),
    ("heads.genes.linear1", "to_out.fc1"),
    ("heads.genes.linear2", "to_out.fc2"),
    ("heads.genes.out", "to_out.fc3"),
)
BRANCHES = {
    "layers": {"[a]": "performer.net.layers.[i].0", "[f]": "performer.net.layers.[i].1"},
    "reversible": {"[a]": "performer.net.blocks.[i].f.net", "[f]": "performer.net.blocks.[i].g.net"},
}
PATTERNS = [
    (re.compile(re.escape(native).replace(r"\[i\]", r"(?P<i>\d+)") + r"(?P<leaf>|\.weight|\.bias)"), theirs)
    for native, theirs in NAMES
]

How = Literal["same", "genes", "columns", "qkv", "shape"]


@dataclass(frozen=True)
class Genes:
    """scBERT's order of genes beside scfm's vocabulary.

    Attributes:
        vocabulary: scfm's.
        native_of: for every gene of scBERT, by row, the vocabulary's index.
    """

    vocabulary: Vocabulary
    native_of: Sequence[int]

    @property
    def entries(self) -> Tensor:
        """Return the vocabulary's indices of scBERT's rows, (genes + 1,), that of `<cls>` last."""
        return torch.tensor([*self.native_of, self.vocabulary.cls])

    @property
    def columns(self) -> Tensor:
        """Return the positions of our fine-tuning head that are scBERT's columns, (genes + 1,)."""
        return torch.tensor([*self.native_of, self.vocabulary.n_genes])


@dataclass(frozen=True)
class Pair:
    """A tensor of ours and what it is in a checkpoint of scBERT.

    Attributes:
        native: our name.
        theirs: scBERT's: three where ours joins queries, keys and values.
        how: `same`; `genes` (rows in another order, without a padding row); `columns` (columns in another order);
            `qkv` (ours joins scBERT's); `shape` (the same numbers in another shape).
        shape: of our tensor.
        their_shape: of scBERT's, each.
    """

    native: str
    theirs: tuple[str, ...]
    how: How
    shape: tuple[int, ...]
    their_shape: tuple[int, ...]

    def to_native(self, state: Mapping[str, Tensor], genes: Genes) -> Tensor:
        """Return our tensor from scBERT's; rows of the gene table that scBERT lacks are zeros."""
        tensors = [state[name] for name in self.theirs]
        if self.how == "qkv":
            return torch.cat(tensors)
        (tensor,) = tensors
        if self.how == "genes":
            return tensor.new_zeros(self.shape).index_copy_(0, genes.entries, tensor)
        if self.how == "columns":
            return torch.empty_like(tensor).index_copy_(1, genes.columns, tensor)
        return tensor.reshape(self.shape)

    def to_theirs(self, tensor: Tensor, genes: Genes) -> dict[str, Tensor]:
        """Return scBERT's tensors, by name, from ours."""
        if self.how == "qkv":
            return dict(zip(self.theirs, tensor.chunk(3), strict=True))
        if self.how == "genes":
            tensor = tensor.index_select(0, genes.entries)
        if self.how == "columns":
            tensor = tensor.index_select(1, genes.columns)
        return {self.theirs[0]: tensor.reshape(self.their_shape)}


def pairs_of(files: ModelFiles) -> list[Pair]:
    """Return all tensors of a model, and what they are called by scBERT.

    Raises ScfmError for tensors that have no name there.
    """
    with torch.device("meta"):  # names and shapes only
        tensors = files.build().state_dict()
    branches = BRANCHES[layout_of(files)]
    kinds = {head.task: head.kind for head in files.heads}
    nameless, pairs = [], []
    for native, tensor in tensors.items():
        name = their_name(role_name(native, kinds), branches)
        if name is None:
            nameless.append(native)
        else:
            pairs.append(pair_of(native, name, tuple(tensor.shape), files))
    if nameless:
        raise ScfmError("scBERT has no tensors for " + ", ".join(nameless))
    return pairs


def role_name(native: str, kinds: Mapping[str, str]) -> str:
    """Return our name of a tensor, a head under its kind."""
    place, _, rest = native.partition(".")
    task, _, leaf = rest.partition(".")
    return f"heads.{kinds[task]}.{leaf}" if place == "heads" else native


def layout_of(files: ModelFiles) -> str:
    """Return how scBERT names the branches of a block: in a sequence of layers, or in reversible pairs."""
    return "reversible" if files.model.performer.reversible else "layers"


def pair_of(native: str, name: str, shape: tuple[int, ...], files: ModelFiles) -> Pair:
    if "[qkv]" in name:
        thirds = tuple(name.replace("[qkv]", third) for third in "qkv")
        return Pair(native, thirds, "qkv", shape, (shape[0] // 3, *shape[1:]))
    if name == GENES:
        return Pair(native, (name,), "genes", shape, (files.vocabulary.n_genes + 1, *shape[1:]))
    if name == "to_out.fc1.weight":
        return Pair(native, (name,), "columns", shape, shape)
    if name == "to_out.conv1.weight":
        return Pair(native, (name,), "shape", shape, (1, 1, *shape))
    if name.endswith(".g") and files.model.performer.norm == "rezero":
        return Pair(native, (name,), "shape", shape, ())
    return Pair(native, (name,), "same", shape, shape)


def their_name(role: str, branches: Mapping[str, str]) -> str | None:
    """Translate our name, a head under its kind, into scBERT's; [qkv] stays where it stands for three."""
    for pattern, name in PATTERNS:
        if found := pattern.fullmatch(role):
            for branch, place in branches.items():
                name = name.replace(branch, place)
            return name.replace("[i]", found.groupdict().get("i") or "") + found["leaf"]
    return None


def part_of(name: str) -> str | None:
    """Return the part that a tensor belongs to, None for one that scBERT does not have."""
    return next((part for part in PARTS if name.startswith(f"{part}.")), None)
