"""The encoder on padded cells, in plain torch operations alone: what is exported to other runtimes.

Cells of N by M tokens, the padding at the end of each, told by a mask. It reads the weights of a network that is made
for packed cells and gives the same cell embeddings; nothing is hidden, so all real tokens are keys in either attention.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfm.data.batch import PackedBatch
from scfm.errors import ScfmError
from scfm.model.features import EPS, KERNEL_EPS
from scfm.model.performer import FeatureMixer, Softmax
from scfm.recipe import ModelConfig


class PaddedEncoder(nn.Module):
    """Genes and values of padded cells to their embeddings, L2-normalised as `embed` gives them.

    Args:
        network: a model with its weights; stays as it is.
        config: its shape.
        gene_tables: gene condition -> index of every vocabulary entry.

    Raises ScfmError for a form in which batch mates change a cell's embedding.
    """

    def __init__(self, network: nn.Module, config: ModelConfig, gene_tables: dict[str, list[int]]) -> None:
        super().__init__()
        check_form(config)
        self.config = config
        twin: Any = deepcopy(network).eval()
        self.backbone = twin.backbone
        self.reads_domain = config.input_norm == "domain"
        if config.name == "scbert":
            for block in self.backbone.blocks:
                mixer = block.mixer
                block.mixer = PaddedSoftmax() if isinstance(mixer, Softmax) else PaddedFeatures(mixer)
            return
        self.tables = nn.ParameterDict(
            {
                name: nn.Parameter(torch.tensor(gene_tables[name]), requires_grad=False)
                for name in self.backbone.gene_conditions
            }
        )

    def forward(self, genes: Tensor, values: Tensor, mask: Tensor, domain: Tensor | None = None) -> Tensor:
        """Return the cell embeddings, (N, D).

        Args:
            genes: (N, M) int64 vocabulary ids, `<cls>` first.
            values: (N, M) float32 values as the model sees them (bins).
            mask: (N, M) bool, False for padding, which may hold any gene of the vocabulary and any value.
            domain: (N,) int64 index of the domain (batch ...), -1 for an unknown one; of models that norm by it.
        """
        batch = self.as_pack(genes, values, mask, domain)
        if self.config.name == "scbert":
            tokens = self.scbert_tokens(batch, mask)
        else:
            x = self.backbone.embed(self.backbone.gene_embedding(batch.genes), batch, None, None)
            for block in self.backbone.blocks:
                x = block(x, lambda qkv: attend(qkv, mask), batch.unknown_mask)
            tokens = x
        return F.normalize(self.pooled(tokens.unflatten(0, mask.shape), values, mask), dim=-1)

    def scbert_tokens(self, batch: PackedBatch, mask: Tensor) -> Tensor:
        backbone, reversible = self.backbone, self.config.performer.reversible
        x = backbone.embed(batch)
        x = torch.stack([x, x]) if reversible else x
        for block in backbone.blocks:
            x = block(x, mask)
        return backbone.norm(x.sum(0) if reversible else x)

    def as_pack(self, genes: Tensor, values: Tensor, mask: Tensor, domain: Tensor | None) -> PackedBatch:
        """Return the cells as a pack in which all have M tokens, none of them unknown."""
        cells, length = mask.shape
        starts = torch.arange(cells + 1, device=genes.device) * length
        flat = genes.flatten()
        batch = PackedBatch(
            genes=flat,
            values=values.flatten(),
            targets=None,
            cu_seqlens=starts,
            n_known=starts.diff(),
            cell_id=starts[:-1],
            gene_conditions={} if self.config.name == "scbert" else {n: t[flat] for n, t in self.tables.items()},
            cell_conditions={} if domain is None or self.config.domain is None else {self.config.domain: domain},
            longest=-1,  # nothing here asks
        )
        batch.unknown_mask = torch.zeros_like(flat, dtype=torch.bool)
        batch.cell_of_token = torch.arange(cells, device=genes.device)[:, None].expand(cells, length).flatten()
        return batch

    def pooled(self, tokens: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Return the cell embeddings of tokens (N, M, D) as `scfm.model.pooling` does of packed ones."""
        if self.config.cell_embedding == "cls":
            return tokens[:, 0]
        weights = mask.to(tokens.dtype)
        weights = weights * values if self.config.cell_embedding == "weighted" else weights
        sums = (tokens * weights[..., None]).sum(1)
        return sums if self.config.cell_embedding == "weighted" else sums / weights.sum(1, keepdim=True)


def heads_first(qkv: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values (N, H, M, d) of packed ones (N M, 3, H, d)."""
    q, k, v = qkv.unflatten(0, mask.shape).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def packed(out: Tensor) -> Tensor:
    """Return (N, H, M, d) as (N M, H, d)."""
    return out.transpose(1, 2).flatten(0, 1)


def attend(qkv: Tensor, mask: Tensor) -> Tensor:
    """Exact attention to the real tokens of a cell: (N M, 3, H, d) -> (N M, H, d)."""
    return packed(F.scaled_dot_product_attention(*heads_first(qkv, mask), attn_mask=mask[:, None, None, :]))


class PaddedSoftmax(nn.Module):
    """`scfm.model.performer.Softmax` on padded cells; the mask stands where the segments of a pack do."""

    def forward(self, qkv: Tensor, mask: Tensor, key_mask: None = None) -> Tensor:
        return attend(qkv, mask)


class PaddedFeatures(nn.Module):
    """`scfm.model.performer.FeatureMixer` on padded cells, in its correct mode: stabilised by cell and head."""

    weight: Tensor

    def __init__(self, mixer: FeatureMixer) -> None:
        super().__init__()
        self.kernel = mixer.kernel
        self.register_buffer("weight", mixer.projection.t() * mixer.projection.shape[1] ** -0.25)  # (d, m)

    def forward(self, qkv: Tensor, mask: Tensor, key_mask: None = None) -> Tensor:
        q, k, v = heads_first(qkv, mask)
        real = mask[:, None, :, None]
        phi_q, phi_k = self.features(q, k, real)
        phi_k = torch.where(real, phi_k, 0.0)
        return packed(phi_q @ (phi_k.mT @ v) / (phi_q @ phi_k.sum(-2).unsqueeze(-1)))

    def features(self, q: Tensor, k: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Return phi of queries and keys, (N, H, M, m) each; real (N, 1, M, 1) marks what is no padding."""
        if self.kernel == "none":
            return q.softmax(-1), k.masked_fill(~real, -torch.inf).softmax(-2)
        if self.kernel == "elu":
            return F.elu(q) + 1 + EPS, F.elu(k) + 1 + EPS
        p_q, p_k = q @ self.weight, k @ self.weight
        if self.kernel in ("relu", "gelu"):
            activation = F.relu if self.kernel == "relu" else F.gelu
            return activation(p_q) + KERNEL_EPS, activation(p_k) + KERNEL_EPS
        p_k = p_k - k.square().sum(-1, keepdim=True) * (0.5 * k.shape[-1] ** -0.5)
        peak = p_k.masked_fill(~real, -torch.inf).amax((-2, -1), keepdim=True)
        return (p_q - p_q.amax(-1, keepdim=True)).exp(), (p_k - peak).exp() + EPS


def check_form(config: ModelConfig) -> None:
    """Refuse forms in which a cell's embedding depends on its batch mates, or on padding. Raises ScfmError."""
    if config.padded_batches:
        raise ScfmError(
            "model.padded_batches: padding and batch mates change the embeddings of this model, so no padded encoder "
            "equals it; convert the scGPT checkpoint without it"
        )
    if config.name == "scbert" and config.mixer == "favor" and config.performer.mode == "compat":
        raise ScfmError(
            "model.performer.mode: compat computes as scBERT's release does, where batch mates change the embeddings; "
            "no padded encoder equals it. Set mode to correct in the model's config.json, and check the scores"
        )
