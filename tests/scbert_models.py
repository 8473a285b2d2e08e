"""Native models of every form that scBERT can hold, with random weights; its stored cases as its files have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scbert_cases import pack
from torch import Tensor

from scfm.checkpoints.native import ModelFiles
from scfm.data.batch import PackedBatch
from scfm.data.tokens import TokenConfig
from scfm.data.vocabulary import SPECIALS, Gene, Vocabulary
from scfm.model.heads import HeadSpec
from scfm.recipe import ModelConfig, PerformerConfig

BINS = HeadSpec("masked_bin", "bins", 7)
CLASSES = HeadSpec("annotation", "genes", 3, ["B cell", "NK cell", "T cell"])
NAMES = [f"G{i:03}" for i in range(127)]  # of the stored cases, which have 127 genes and their last token

# name -> performer section, head
FORMS: dict[str, tuple[dict[str, Any], HeadSpec]] = {
    "correct": ({}, BINS),
    "compat": ({"mode": "compat", "scaling": "norms"}, BINS),
    "classes": ({"mode": "compat"}, CLASSES),
    "relu": ({"kernel": "relu", "norm": "scale"}, BINS),
    "gelu": ({"kernel": "gelu", "norm": "rezero", "qkv_bias": True}, CLASSES),
    "none": ({"kernel": "none", "glu": True}, BINS),
    "reversible": ({"reversible": True}, BINS),
    "tied": ({"tied": True}, BINS),
}


def vocabulary_of(names: Sequence[str] = NAMES) -> Vocabulary:
    return Vocabulary([Gene.of(None, name) for name in names] + [Gene(special) for special in SPECIALS])


def a_model(form: str, heads: list[HeadSpec] | None = None, **model: Any) -> tuple[ModelFiles, dict[str, Tensor]]:
    """Return a model and its weights; no weight is 0 or 1 as it is at the start of a training."""
    performer, head = FORMS[form]
    named = [Gene.of(f"ENSG{i:011d}", f"G{i:02}") for i in range(18)] + [Gene.of(None, "G18"), Gene.of(None, "TP53")]
    sizes: dict[str, Any] = {"width": 12, "heads": 2, "layers": 2, "hidden": 20, "cell_embedding": "mean"}
    files = ModelFiles(
        model=ModelConfig(
            name="scbert",
            attention="full",
            performer=PerformerConfig(**{"head_width": 8, "features": 10, **performer}),
            **(sizes | model),
        ),
        tokens=TokenConfig(
            genes="all",
            max_genes=500,
            values="log2",
            n_bins=6,
            mask_ratios=(0.15,),
            mask_candidates="expressed",
            mask_kept=0.1,
            cls_value=0.0,
            mask_value=6.0,
        ),
        value_kind="counts",
        vocabulary=Vocabulary([*named, Gene("<pad>"), Gene("<cls>"), Gene("<eoc>")]),
        heads=[head] if heads is None else heads,
        training_data={"stage": "pretraining"},
        card="# a card",
    )
    torch.manual_seed(0)
    weights = files.build().state_dict()
    for tensor in weights.values():
        if tensor.is_floating_point():
            tensor.copy_(0.3 * torch.randn_like(tensor))
        else:
            tensor += 7
    return files, weights


def pack_of(ids: Tensor, vocabulary: Vocabulary) -> PackedBatch:
    """Return scBERT's ids (N, L) as our pack: their last token is `<cls>`, and comes first."""
    n_cells, length = ids.shape
    genes = torch.cat([torch.tensor([vocabulary.cls]), torch.arange(length - 1)]).repeat(n_cells)
    return replace(pack(ids.roll(1, 1)), genes=genes.int())


def write_checkpoint(path: Path, state: Mapping[str, Tensor], names: Sequence[str] = NAMES) -> tuple[Path, Path]:
    """Write tensors as scBERT's training does, and the names of the genes; return both files."""
    content = {"epoch": 4, "model_state_dict": dict(state), "optimizer_state_dict": {}, "losses": 0.25}
    torch.save(content, path)
    listed = path.with_suffix(".txt")
    listed.write_text("".join(f"{name}\n" for name in names))
    return path, listed
