"""The scGPT model (Cui et al., Nature Methods 2024) on packed cells."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from scfm.data.batch import PackedBatch
from scfm.errors import ScfmError
from scfm.model.attention import Attention, AttentionLayout, pick_backend, prepare
from scfm.model.embeddings import CellCondition, GeneCondition, GeneEmbedding, Modality, value_encoder
from scfm.model.heads import HeadSpec, Values, build_head
from scfm.model.input_norm import InputNorm
from scfm.model.output import ModelOutput
from scfm.model.padding import Padded
from scfm.model.pooling import pool
from scfm.model.transformer import Block, run_blocks
from scfm.recipe import ModelConfig


class Backbone(nn.Module):
    """All of the model but its heads.

    Attributes:
        recompute: whether the backward computes each block again rather than keeping what it needs.
    """

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
        check_conditions(config, cell_conditions, gene_conditions)
        self.config = config
        self.pad = pad
        width = config.width
        self.gene_embedding = GeneEmbedding(n_tokens, width, pad)
        self.value_encoder = value_encoder(config.value_encoder, width, n_bins, config.dropout)
        if config.attention == "generative":
            self.unknown_flag = nn.Parameter(torch.randn(width))
        added = {name: n for name, n in gene_conditions.items() if name != config.modality}
        self.gene_conditions = nn.ModuleDict({name: GeneCondition(n, width) for name, n in added.items()})
        read = {name: cell_conditions[name] for name in config.cell_conditions}
        self.cell_conditions = nn.ModuleDict({name: CellCondition(n, width) for name, n in read.items()})
        self.modality = Modality(gene_conditions[config.modality], width) if config.modality else None
        n_domains = cell_conditions[config.domain] if config.domain else 1
        self.input_norm = (
            InputNorm(width, n_domains, config.input_norm == "batch") if config.input_norm != "none" else None
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.recompute = False

    def forward(self, batch: PackedBatch, cell_prompt: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gene embeddings (T, D), the transformer's output (T, D) and the cell embeddings (N, D)."""
        if self.config.padded_batches:
            padded = Padded.of(batch, self.pad)
            genes, tokens, cells = self.encode(padded.batch, padded.counted, cell_prompt)
            return genes[padded.own], tokens[padded.own], cells
        return self.encode(batch, None, cell_prompt)

    def encode(
        self, batch: PackedBatch, counted: Tensor | None, cell_prompt: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As forward; `counted` (T,) says how many padded positions each token stands for where padding counts."""
        genes = self.gene_embedding(batch.genes)  # (T, D)
        x = self.embed(genes, batch, counted, cell_prompt)
        attention = self.attention(batch, padded=counted is not None)
        x = run_blocks(self.blocks, x, attention, batch.unknown_mask, recompute=self.recompute)
        return genes, x, pool(self.config.cell_embedding, x, batch, counted)

    def attention(self, batch: PackedBatch, padded: bool) -> Attention:
        """Return the attention of a pack; of a padded one the last token of each cell is a query, but no key."""
        layout = AttentionLayout.of(batch, self.config.attention)
        if padded:
            layout = replace(layout, n_keys=layout.n_keys - 1, self_key=False)
        blocks: Any = self.blocks
        weight: Tensor = blocks[0].qkv.weight  # in bf16 inference of another type than the embeddings
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        head_width = self.config.width // self.config.heads
        dropout = self.config.attention_dropout if self.training else 0.0
        return prepare(layout, pick_backend(weight.device, dtype, head_width, self.config.backend, dropout)[0], dropout)

    def embed(self, genes: Tensor, batch: PackedBatch, counted: Tensor | None, cell_prompt: Tensor | None) -> Tensor:
        """Return the input of the first block, (T, D), from the gene embeddings (T, D)."""
        x = self.joined(genes, batch)
        if self.input_norm is not None:
            x = self.input_norm(x, *self.domains(batch, counted))
        if cell_prompt is not None:
            x = x.index_copy(0, batch.cu_seqlens[:-1].long(), cell_prompt.to(x.dtype))
        return x

    def before_norm(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the input norm takes: tokens (T, D), their domains (T,), and (T,) bool which of them count."""
        return self.joined(self.gene_embedding(batch.genes), batch), *self.domains(batch, None)

    def domains(self, batch: PackedBatch, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the domain of each token, (T,), and how often it counts, (T,): once, but for pseudo-cells."""
        domain = torch.zeros_like(batch.cell_id)  # (N,)
        if self.config.domain:
            domain = batch.cell_conditions[self.config.domain]
            domain = domain[:1].expand_as(domain) if self.config.padded_batches else domain
        real = batch.real_cells[batch.cell_of_token]
        return domain[batch.cell_of_token], real if counted is None else counted

    def joined(self, genes: Tensor, batch: PackedBatch) -> Tensor:
        """Return genes, values and conditions in one, (T, D), from the gene embeddings (T, D)."""
        x = self.value_encoder(genes, batch)
        if self.config.attention == "generative":
            x = torch.where(batch.unknown_mask[:, None], genes + self.unknown_flag, x)
        for name, condition in self.gene_conditions.items():
            x = x + condition(batch.gene_conditions[name])
        return x

    def conditions(self, batch: PackedBatch, where: Tensor) -> Tensor | None:
        """Return what decoders read of the conditions at some tokens, (U,) -> (U, D), or None without any.

        At the first tokens of the cells these are the conditions of the cells.
        """
        cell = batch.cell_of_token[where]
        parts = [
            embedding(batch.cell_conditions[name]).index_select(0, cell)
            for name, embedding in self.cell_conditions.items()
        ]
        if self.config.modality and self.modality is not None:
            parts.append(self.modality(batch.gene_conditions[self.config.modality][where]))
        return torch.stack(parts).sum(0) if parts else None


def check_form(config: ModelConfig, heads: list[HeadSpec]) -> None:
    """Refuse what only scBERT has, naming the keys. Raises ScfmError."""
    wrong = [
        f"model.{key}: is a setting of scBERT; leave it out, or set model.name scbert"
        for key in ("mixer", "performer", "gene_table")
        if getattr(config, key) != getattr(ModelConfig(), key)
    ]
    wrong += [f"objectives: {spec.task} needs a head of scBERT" for spec in heads if spec.kind in ("bins", "genes")]
    if wrong:
        raise ScfmError("model.name scgpt:\n  " + "\n  ".join(wrong))


def check_conditions(config: ModelConfig, cell_conditions: dict[str, int], gene_conditions: dict[str, int]) -> None:
    """Refuse a form that names conditions which the data do not have, or that cannot be computed. Raises ScfmError."""
    if (config.input_norm == "domain") != (config.domain is not None):
        raise ScfmError("model.domain: names the obs column of model.input_norm domain; set both or neither")
    for name in [*config.cell_conditions, *([config.domain] if config.domain else [])]:
        if name not in cell_conditions:
            raise ScfmError(
                f"model: the cell condition {name!r} is not among those of the data: {sorted(cell_conditions)}"
            )
    if config.modality and config.modality not in gene_conditions:
        raise ScfmError(
            f"model.modality: {config.modality!r} is not among the gene conditions {sorted(gene_conditions)}; "
            "name its table in data.gene_conditions"
        )
    if config.padded_batches and (config.attention != "full" or config.value_encoder == "category"):
        raise ScfmError("model.padded_batches: needs attention full, and a continuous or scaling value encoder")


class ScGPT(nn.Module):
    """scGPT: known and unknown genes of a cell through one encoder, read by heads.

    Args:
        config: shape of the model.
        n_tokens: length of the vocabulary, special tokens included.
        pad: vocabulary index of `<pad>`.
        n_bins: value bins.
        cell_conditions: obs column -> number of categories; those that the config names are embedded and joined to what
            the value decoders read, or tell the domains of the input norm.
        gene_conditions: name -> number of conditions (0 means none), embedded and added to the input; the one that the
            config names as modality joins what the value decoders read instead.
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
        check_form(config, heads)
        self.specs = {spec.task: spec for spec in heads}
        self.backbone = Backbone(config, n_tokens, pad, n_bins, cell_conditions, gene_conditions)
        in_width = 2 * config.width if config.cell_conditions or config.modality else config.width
        self.heads = nn.ModuleDict({spec.task: build_head(spec, config.width, in_width, n_bins) for spec in heads})

    def forward(self, batch: PackedBatch, cell_prompt: Tensor | None = None) -> ModelOutput:
        """Encode a pack and predict.

        Args:
            batch: the pack.
            cell_prompt: (N, D) replaces the input embedding of each cell's first token; then only `gep` heads predict,
                from what the cell embedding alone adds.
        """
        genes, tokens, cells = self.backbone(batch, cell_prompt)
        output = ModelOutput(tokens, cells, {})
        for task, head in self.heads.items():
            spec = self.specs[task]
            if spec.kind == "gep":
                output.add_values(task, self.read_tokens(spec, head, tokens, batch))
            elif cell_prompt is None and spec.kind == "gepc":
                output.add_values(task, self.read_cells(spec, head, genes, cells, batch))
            elif cell_prompt is None:
                output.predictions[task] = head(cells)
        return output

    def read_tokens(self, spec: HeadSpec, head: nn.Module, tokens: Tensor, batch: PackedBatch) -> Values:
        """Predict the values of the unknown genes from their tokens."""
        where = batch.predicted  # (U,)
        read = with_condition(tokens.index_select(0, where), self.backbone.conditions(batch, where))  # (U, in)
        if not spec.affine:
            return head(read)
        inputs = batch.values.to(read.dtype)
        sums = inputs.new_zeros(2, batch.n_cells).index_add(
            1, batch.cell_of_token, torch.stack([inputs, (inputs != 0).to(inputs)])
        )
        mean = sums[0] / sums[1].clamp(min=1)  # (N,)
        return head(read, inputs[where], mean[batch.cell_of_token[where]])

    def read_cells(self, spec: HeadSpec, head: nn.Module, genes: Tensor, cells: Tensor, batch: PackedBatch) -> Values:
        """Predict the values of the unknown genes from the embeddings of their cells."""
        where = batch.predicted  # (U,)
        query = genes.index_select(0, where)
        if spec.query_reads_conditions:
            query = with_condition(query, self.backbone.conditions(batch, where))
        of_cells = self.backbone.conditions(batch, batch.cu_seqlens[:-1].long())  # (N, D)
        return head(query, with_condition(cells, of_cells), batch.cell_of_token[where])


def with_condition(x: Tensor, condition: Tensor | None) -> Tensor:
    return x if condition is None else torch.cat([x, condition], -1)
