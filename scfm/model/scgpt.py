"""The scGPT model (Cui et al., Nature Methods 2024) on packed cells."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfm.data.batch import PackedBatch
from scfm.model.attention import AttentionLayout
from scfm.model.embeddings import CellCondition, GeneCondition, GeneEmbedding, value_encoder
from scfm.model.heads import HeadSpec, build_head
from scfm.model.transformer import Block
from scfm.recipe import ModelConfig


@dataclass
class ModelOutput:
    """What a model returns for a pack.

    Attributes:
        tokens: (T, D) the transformer's output.
        cell: (N, D) cell embeddings.
        predictions: by head; `gep` and `gepc` heads predict at `batch.predicted` only, (U,) values or (U, n_bins)
            logits, `cls` heads (N, n_classes) logits.
    """

    tokens: Tensor
    cell: Tensor
    predictions: dict[str, Tensor]


class Backbone(nn.Module):
    """All of the model but its heads."""

    def __init__(
        self,
        config: ModelConfig,
        n_tokens: int,
        pad: int,
        n_bins: int,
        cell_conditions: dict[str, int],
        gene_conditions: dict[str, int],
    ) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.gene_embedding = GeneEmbedding(n_tokens, width, pad)
        self.value_encoder = value_encoder(config.value_encoder, width, n_bins, config.dropout)
        if config.attention == "generative":
            self.unknown_flag = nn.Parameter(torch.randn(width))
        self.gene_conditions = nn.ModuleDict({name: GeneCondition(n, width) for name, n in gene_conditions.items()})
        self.cell_conditions = nn.ModuleDict({name: CellCondition(n, width) for name, n in cell_conditions.items()})
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))

    def embed(self, genes: Tensor, batch: PackedBatch, cell_prompt: Tensor | None) -> Tensor:
        """Return the input of the first block, (T, D), from the gene embeddings (T, D)."""
        x = self.value_encoder(genes, batch)
        if self.config.attention == "generative":
            x = torch.where(batch.unknown_mask[:, None], genes + self.unknown_flag, x)
        for name, condition in self.gene_conditions.items():
            x = x + condition(batch.gene_conditions[name])
        if cell_prompt is not None:
            x = x.index_copy(0, batch.cu_seqlens[:-1].long(), cell_prompt.to(x.dtype))
        return x

    def encode(self, x: Tensor, batch: PackedBatch) -> Tensor:
        """Pass the tokens through all blocks, (T, D) -> (T, D)."""
        layout = AttentionLayout.of(batch, self.config.attention)
        for block in self.blocks:
            x = block(x, layout, batch.unknown_mask)
        return x

    def pool(self, tokens: Tensor, batch: PackedBatch) -> Tensor:
        """Return the cell embeddings, (T, D) -> (N, D)."""
        if self.config.cell_embedding == "cls":
            return tokens.index_select(0, batch.cu_seqlens[:-1].long())
        weighted = self.config.cell_embedding == "weighted"
        weights = batch.values.to(tokens.dtype) if weighted else torch.ones_like(batch.values, dtype=tokens.dtype)
        weights = weights.masked_fill(batch.unknown_mask, 0)  # (T,)
        sums = tokens.new_zeros(batch.n_cells, tokens.shape[1])
        sums = sums.index_add(0, batch.cell_of_token, tokens * weights[:, None])  # (N, D)
        return F.normalize(sums, dim=-1) if weighted else sums / batch.n_known[:, None]

    def condition(self, batch: PackedBatch) -> Tensor | None:
        """Return the sum of each cell's condition embeddings, (N, D), or None without conditions."""
        parts = [embedding(batch.cell_conditions[name]) for name, embedding in self.cell_conditions.items()]
        return torch.stack(parts).sum(0) if parts else None


class ScGPT(nn.Module):
    """scGPT: known and unknown genes of a cell through one encoder, read by heads.

    Args:
        config: shape of the model.
        n_tokens: length of the vocabulary, special tokens included.
        pad: vocabulary index of `<pad>`.
        n_bins: value bins.
        cell_conditions: obs column -> number of categories, embedded and joined to what the value decoders read.
        gene_conditions: name -> number of conditions (0 means none), embedded and added to the input.
        heads: what it predicts.
    """

    def __init__(
        self,
        config: ModelConfig,
        n_tokens: int,
        pad: int,
        n_bins: int,
        cell_conditions: dict[str, int],
        gene_conditions: dict[str, int],
        heads: list[HeadSpec],
    ) -> None:
        super().__init__()
        self.specs = {spec.task: spec for spec in heads}
        self.backbone = Backbone(config, n_tokens, pad, n_bins, cell_conditions, gene_conditions)
        in_width = 2 * config.width if cell_conditions else config.width
        self.heads = nn.ModuleDict({spec.task: build_head(spec, config.width, in_width, n_bins) for spec in heads})

    def forward(self, batch: PackedBatch, cell_prompt: Tensor | None = None) -> ModelOutput:
        """Encode a pack and predict.

        Args:
            batch: the pack.
            cell_prompt: (N, D) replaces the input embedding of each cell's first token; then only `gep` heads predict,
                from what the cell embedding alone adds.
        """
        genes = self.backbone.gene_embedding(batch.genes)  # (T, D)
        tokens = self.backbone.encode(self.backbone.embed(genes, batch, cell_prompt), batch)
        cells = self.backbone.pool(tokens, batch)
        output = ModelOutput(tokens, cells, {})
        where, cell_of_gene = batch.predicted, batch.cell_of_token[batch.predicted]  # (U,), (U,)
        condition = self.backbone.condition(batch)  # (N, D)
        for task, head in self.heads.items():
            kind = self.specs[task].kind
            if kind == "gep":
                read = tokens.index_select(0, where)  # (U, D)
                if condition is not None:
                    read = torch.cat([read, condition.index_select(0, cell_of_gene)], -1)
                output.predictions[task] = head(read)
            elif kind == "gepc" and cell_prompt is None:
                joined = cells if condition is None else torch.cat([cells, condition], -1)
                output.predictions[task] = head(genes.index_select(0, where), joined, cell_of_gene)
            elif kind == "cls" and cell_prompt is None:
                output.predictions[task] = head(cells)
        return output
