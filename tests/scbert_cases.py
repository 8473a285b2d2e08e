"""Stored cases of scBERT: a model with their weights, their inputs as packs, and outputs in their layout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from scfm.data.batch import PackedBatch
from scfm.model import ScBERT
from scfm.model.heads import HeadSpec
from scfm.recipe import ModelConfig, PerformerConfig

N_BINS, MASK = 6, 6
ATOL, RTOL = 2e-5, 1e-4  # of the README of the cases, for other machines
GRADIENT_RTOL = 2e-3
BINS = HeadSpec("masked_bin", "bins", N_BINS + 1)
LAST = {
    "fn.fast_attention.projection_matrix": "mixer.projection",
    "fn.to_out.weight": "out_proj.weight",
    "fn.to_out.bias": "out_proj.bias",
    "fn.fn.w1.weight": "linear1.weight",
    "fn.fn.w1.bias": "linear1.bias",
    "fn.fn.w2.weight": "linear2.weight",
    "fn.fn.w2.bias": "linear2.bias",
}
OUTSIDE = {
    "token_emb.weight": "backbone.value_embedding.weight",
    "norm.weight": "backbone.norm.weight",
    "norm.bias": "backbone.norm.bias",
    "performer.calls_since_last_redraw": "backbone.since_redraw",
    "to_out.weight": "heads.masked_bin.out.weight",
    "to_out.bias": "heads.masked_bin.out.bias",
    "to_out.conv1.weight": "heads.annotation.token.weight",
    "to_out.conv1.bias": "heads.annotation.token.bias",
    "to_out.fc1.weight": "heads.annotation.linear1.weight",
    "to_out.fc1.bias": "heads.annotation.linear1.bias",
    "to_out.fc2.weight": "heads.annotation.linear2.weight",
    "to_out.fc2.bias": "heads.annotation.linear2.bias",
    "to_out.fc3.weight": "heads.annotation.out.weight",
    "to_out.fc3.bias": "heads.annotation.out.bias",
}


def our_name(name: str) -> str:
    """Return our name of a tensor of theirs; `...qkv.weight.q` for a third of a joint one."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    block = re.fullmatch(r"performer\.net\.(?:layers\.(\d+)\.([01])|blocks\.(\d+)\.([fg])\.net)\.(.+)", name)
    assert block is not None, name
    layer, place, pair, stream, rest = block.groups()
    prefix = f"backbone.blocks.{layer or pair}."
    attends = "0" in (place or "") or stream == "f"
    if rest in LAST:
        return prefix + LAST[rest]
    if third := re.fullmatch(r"fn\.to_([qkv])\.(weight|bias)", rest):
        return f"{prefix}qkv.{third[2]}.{third[1]}"
    norm = "attention_norm" if attends else "feed_forward_norm"
    return prefix + {"norm.weight": f"{norm}.weight", "norm.bias": f"{norm}.bias", "g": f"{norm}.g"}[rest]


def our_tensors(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return their tensors (weights or gradients) under our names, the gene table aside."""
    named = {our_name(name): tensor for name, tensor in theirs.items() if name != "pos_emb.emb.weight"}
    joint = {name.removesuffix(".q") for name in named if re.search(r"qkv\.(weight|bias)\.q$", name)}
    result = {name: tensor for name, tensor in named.items() if not re.search(r"qkv\.(weight|bias)\.[qkv]$", name)}
    result |= {name: torch.cat([named[f"{name}.{third}"] for third in "qkv"]) for name in joint}
    for name, tensor in result.items():
        if name.endswith("_norm.g"):
            result[name] = tensor.reshape(1)
        elif name == "heads.annotation.token.weight":
            result[name] = tensor.reshape(1, -1)
    return result


class Case:
    """A stored case and our model with its weights; token n of a cell is the gene n of a vocabulary of positions.

    Their last token, which has no gene, stands last here too: packs do not care.
    """

    def __init__(self, folder: Path, heads: list[HeadSpec] | None = None) -> None:
        self.meta: dict[str, Any] = json.loads((folder / "case.json").read_text())["meta"]
        self.tensors = load_file(folder / "tensors.safetensors")
        self.theirs = load_file(folder / "state_dict.safetensors")
        form = self.meta["config"]
        n_tokens = form["max_seq_len"]
        self.config = ModelConfig(
            name="scbert",
            width=form["dim"],
            heads=form["heads"],
            layers=form["depth"],
            hidden=4 * form["dim"],
            dropout=0.0,
            attention="full",
            cell_embedding="mean",
            gene_table="theirs" if form["g2v_position_emb"] else None,
            performer=PerformerConfig(
                mode="compat",
                head_width=form.get("dim_head", 64),
                features=form.get("nb_features"),
                kernel=kernel_of(form),
                scaling="norms",
                redraw_every=form.get("feature_redraw_interval", 1000),
                norm="scale" if form.get("use_scalenorm") else "rezero" if form.get("use_rezero") else "layer",
                glu=form.get("ff_glu", False),
                reversible=form.get("reversible", False),
                tied=form.get("tie_embed", False),
                qkv_bias=form.get("qkv_bias", False),
            ),
        )
        # as many genes as positions but one, `<pad>`, which stands for their last token
        self.model = ScBERT(self.config, n_tokens, n_tokens - 1, N_BINS, {}, {}, [BINS] if heads is None else heads)
        table = self.theirs.get("pos_emb.emb.weight", torch.zeros(n_tokens, form["dim"]))
        weights = our_tensors(self.theirs) | {"backbone.gene_embedding.weight": table.float()}
        self.model.load_state_dict(weights)
        self.model.eval()


def kernel_of(form: dict[str, Any]) -> Any:
    if form.get("no_projection"):
        return "none"
    if not form.get("generalized_attention"):
        return "exp"
    return "gelu" if "GELU" in form.get("kernel_fn", "ReLU") else "relu"


def pack(ids: Tensor, labels: Tensor | None = None) -> PackedBatch:
    """Return (N, L) ids as a pack; tokens whose label is not the mask's are predicted."""
    n_cells, length = ids.shape
    genes = torch.arange(length).repeat(n_cells)
    batch = PackedBatch(
        genes=genes.int(),
        values=ids.flatten().float(),
        targets=None if labels is None else labels.flatten().float(),
        cu_seqlens=torch.arange(0, n_cells * length + 1, length, dtype=torch.int32),
        n_known=torch.full((n_cells,), length, dtype=torch.int32),
        cell_id=torch.arange(n_cells),
        total_cells=n_cells,
    )
    if labels is not None:  # theirs are anywhere in a cell
        batch.__dict__["predicted"] = (labels.flatten() != MASK).nonzero()[:, 0]
        batch.total_unknown = len(batch.predicted)
    return batch


def close(ours: Tensor, theirs: Tensor) -> None:
    """Compare a forward output, whatever the layout of tokens."""
    torch.testing.assert_close(ours.reshape(theirs.shape), theirs, atol=ATOL, rtol=RTOL)


def close_gradient(ours: Tensor | None, theirs: Tensor, name: str) -> None:
    """Compare a gradient by its largest difference, relative to the largest entry."""
    assert ours is not None, name
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    assert difference < GRADIENT_RTOL, f"{name}: {difference:.2e}"
