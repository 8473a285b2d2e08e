"""The scBERT model (Yang et al., Nature Machine Intelligence 2022) on packed cells.

A token is the sum of a gene's vector and its bin's; blocks of the Performer (Choromanski et al., ICLR 2021) read all
tokens of a cell. The original appends an empty token to every cell: tokens are a set here, where it is `<cls>`.
"""

from __future__ import annotations

from dataclasses import fields
from hashlib import blake2b
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfm.data.batch import PackedBatch
from scfm.errors import ScfmError
from scfm.model.heads import HeadSpec, build_head
from scfm.model.layers import Dropout
from scfm.model.mixer_block import MixerBlock
from scfm.model.output import ModelOutput
from scfm.model.performer import Favor, Segments
from scfm.model.pooling import pool
from scfm.model.transformer import run_blocks
from scfm.recipe import ModelConfig

READ = (
    "name",
    "width",
    "heads",
    "layers",
    "hidden",
    "dropout",
    "attention",
    "cell_embedding",
    "mixer",
    "performer",
    "gene_table",
)
HEADS = ("bins", "genes", "cls", "neighbours", "domain")


class FrozenEmbedding(nn.Module):
    """A given vector per gene that never trains: (T,) ids -> (T, D). Zeros until a table or weights are loaded."""

    weight: Tensor

    def __init__(self, n_tokens: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(n_tokens, width))

    def forward(self, genes: Tensor) -> Tensor:
        return F.embedding(genes, self.weight)


class Backbone(nn.Module):
    """All of the model but its heads.

    Attributes:
        recompute: whether the backward computes each block again rather than keeping what it needs.
        since_redraw: () int64 buffer; in compat mode, forward passes in training since features were last drawn.
    """

    since_redraw: Tensor

    def __init__(self, config: ModelConfig, n_tokens: int, n_bins: int) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.gene_embedding = FrozenEmbedding(n_tokens, width) if config.gene_table else nn.Embedding(n_tokens, width)
        self.value_embedding = nn.Embedding(n_bins + 1, width)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(MixerBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("since_redraw", torch.zeros((), dtype=torch.int64))
        self.recompute = False

    def forward(self, batch: PackedBatch, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the tokens (T, D) and the cell embeddings (N, D).

        Args:
            batch: the pack.
            key_mask: (T,) bool, False for padding, of which there is none in packs.
        """
        if self.training and self.config.performer.mode == "compat":
            self.count_redraw()
        x = self.embed(batch)
        x = torch.stack([x, x]) if self.config.performer.reversible else x
        x = run_blocks(self.blocks, x, Segments.of(batch), key_mask, recompute=self.recompute)
        tokens = self.norm(x.sum(0) if self.config.performer.reversible else x)
        return tokens, pool(self.config.cell_embedding, tokens, batch)

    def embed(self, batch: PackedBatch) -> Tensor:
        """Return the input of the first block, (T, D)."""
        return self.dropout(self.value_embedding(batch.values.long()) + self.gene_embedding(batch.genes))

    def random_features(self) -> list[Favor]:
        """Return the mixers whose features are random, by layer."""
        mixers: list[Any] = [block.mixer for block in self.blocks]
        return [mixer for mixer in mixers if isinstance(mixer, Favor) and mixer.config.kernel != "none"]

    def count_redraw(self) -> None:
        """Count a forward pass as scBERT does: one that finds the interval over draws new features and is not counted.

        New features are keyed by those they replace: no other draw moves, and a resumed run, like every process of a
        run, draws the same.
        """
        interval = self.config.performer.redraw_every
        if interval == 0:
            return
        if int(self.since_redraw) < interval:
            self.since_redraw += 1
            return
        self.since_redraw.zero_()
        for mixer in self.random_features():
            before = mixer.projection.detach().float().cpu().numpy().tobytes()
            seed = int.from_bytes(blake2b(before, digest_size=7).digest(), "little")
            mixer.redraw(torch.Generator().manual_seed(seed))


class ScBERT(nn.Module):
    """scBERT: all genes of a cell through Performer blocks, read by heads.

    Args:
        config: shape of the model.
        n_tokens: length of the vocabulary, special tokens included.
        pad: vocabulary index of `<pad>`, the first special token: as many are the genes.
        n_bins: value bins; `n_bins` itself is the value of a hidden gene.
        cell_conditions: obs column -> number of categories; scBERT reads none of them.
        gene_conditions: must be empty.
        heads: what it predicts.

    Raises ScfmError for settings and heads that scBERT does not have.
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
        check_form(config, gene_conditions, heads)
        self.specs = {spec.task: spec for spec in heads}
        self.backbone = Backbone(config, n_tokens, n_bins)
        self.heads = nn.ModuleDict(
            {
                spec.task: build_head(spec, config.width, config.width, n_bins, pad + 1)
                for spec in heads
                if not (spec.kind == "bins" and config.performer.tied)
            }
        )

    def forward(self, batch: PackedBatch) -> ModelOutput:
        """Encode a pack and predict."""
        tokens, cells = self.backbone(batch)
        output = ModelOutput(tokens, cells, {})
        for task, spec in self.specs.items():
            if spec.kind == "bins":
                output.predictions[task] = self.read_bins(task, tokens.index_select(0, batch.predicted))
            elif spec.kind == "genes":
                output.predictions[task] = self.heads[task](tokens, batch)
            else:
                output.predictions[task] = self.heads[task](cells)
        return output

    def read_bins(self, task: str, tokens: Tensor) -> Tensor:
        """Return the logits of bins and mask, (U, D) -> (U, n_bins + 1)."""
        if task in self.heads:
            return self.heads[task](tokens)
        return F.linear(tokens, self.backbone.value_embedding.weight)


def check_form(config: ModelConfig, gene_conditions: dict[str, int], heads: list[HeadSpec]) -> None:
    """Refuse what scBERT does not have, naming the keys. Raises ScfmError."""
    wrong = []
    if config.attention != "full":
        wrong.append(
            f"model.attention: {config.attention}; scBERT reads all genes of a cell, hidden ones too: set full"
        )
    wrong += [
        f"model.{field.name}: is a setting of scGPT, which scBERT does not read; leave it out"
        for field in fields(ModelConfig)
        if field.name not in READ and getattr(config, field.name) != getattr(ModelConfig(), field.name)
    ]
    if config.mixer != "favor" and config.performer.mode == "compat":
        wrong.append(f"model.performer.mode: compat is of the mixer favor; {config.mixer} has no such mode")
    if gene_conditions:
        wrong.append(f"data.gene_conditions: scBERT reads none, here {', '.join(gene_conditions)}")
    wrong += [
        f"objectives: {spec.task} needs a head of scGPT; scBERT learns expression by masked_bin"
        for spec in heads
        if spec.kind not in HEADS
    ]
    if wrong:
        raise ScfmError("model.name scbert:\n  " + "\n  ".join(wrong))
