"""A peer for benchmarks: generative pretraining in scGPT's original arrangement, on padded cells and with dense masks.

The released scgpt package has no generative step, so this model stands in for it, written anew from a description of
what the original computes: known (`pcpt`) and unknown (`gen`) tokens run as two padded streams through post-norm layers
with shared weights. Known queries see the known keys; unknown queries see these and themselves, and their context skips
the output projection. Attention weights are dropped too. The decoder reads all tokens, the MVC head queries all genes,
and a second pass starts from the first one's cell embedding. With dropout 0 its predictions equal scfm's.

Sizes: B cells, K known and U unknown tokens of the longest cell, M = K + U, D width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfm.data.batch import PackedBatch
from scfm.recipe import ModelConfig

# `mask`: both streams in one scaled_dot_product_attention under an (M, M) mask, the plain way to write it today.
# `streams`: as the original calls it, known queries on known keys, then multi_head_attention_forward for unknown ones.
Arrangement = Literal["mask", "streams"]


@dataclass
class Streams:
    """The cells of a pack, known and unknown tokens padded apart.

    Attributes:
        known_genes: (B, K) int64 vocabulary ids, `<cls>` first.
        known_values: (B, K) float32.
        known_padding: (B, K) bool, True where there is no token.
        unknown_genes: (B, U) int64.
        unknown_padding: (B, U) bool.
        targets: (B, U) float32 true values of the unknown genes.
        padded: whether there is any padding; without it no mask has to be built per cell.
    """

    known_genes: Tensor
    known_values: Tensor
    known_padding: Tensor
    unknown_genes: Tensor
    unknown_padding: Tensor
    targets: Tensor
    padded: bool

    @classmethod
    def of(cls, batch: PackedBatch, pad: int) -> Streams:
        """Pad the real cells of a pack that has unknown genes."""
        assert batch.targets is not None
        real = batch.real_cells
        n_known, lengths = batch.n_known.long()[real], batch.lengths[real]
        row = (real.cumsum(0) - 1)[batch.cell_of_token]  # (T,)
        place = torch.arange(batch.n_tokens, device=row.device) - batch.cu_seqlens[:-1].long()[batch.cell_of_token]

        def stream(which: Tensor, sizes: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            which = which & real[batch.cell_of_token]
            where = row[which], place[which]
            shape = len(sizes), int(sizes.max())
            genes, values, targets = (
                torch.full(shape, fill, dtype=dtype, device=row.device).index_put(where, source[which].to(dtype))
                for source, fill, dtype in (
                    (batch.genes, pad, torch.int64),
                    (batch.values, -2, torch.float32),
                    (batch.targets, 0, torch.float32),
                )
            )
            return genes, values, targets, torch.arange(shape[1], device=row.device) >= sizes[:, None]

        unknown = batch.unknown_mask
        known_genes, known_values, _, known_padding = stream(~unknown, n_known, place)
        after_known = place - batch.n_known.long()[batch.cell_of_token]
        unknown_genes, _, targets, unknown_padding = stream(unknown, lengths - n_known, after_known)
        padded = bool(known_padding.any() | unknown_padding.any())
        return cls(known_genes, known_values, known_padding, unknown_genes, unknown_padding, targets, padded)

    def to(self, device: torch.device | str) -> Streams:
        """Return the streams on another device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "padded"}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def visible(self) -> Tensor:
        """Return which keys each query sees, (M, M), or (B, 1, M, M) where cells are padded."""
        n_known = self.known_genes.shape[1]
        place = torch.arange(n_known + self.unknown_genes.shape[1], device=self.known_genes.device)
        sees = (place < n_known) | (place == place[:, None])
        return sees & ~self.padding()[:, None, None, :] if self.padded else sees

    def padding(self) -> Tensor:
        """Return the padded keys of both streams, (B, M) bool."""
        return torch.cat([self.known_padding, self.unknown_padding], 1)


class Predictions(NamedTuple):
    """Values of the unknown genes (B, U) from their tokens, and from the cell if asked for; cell embeddings (B, D)."""

    values: Tensor
    from_cell: Tensor | None
    cell: Tensor


class GeneEmbedding(nn.Module):
    """A layer-normed vector per gene: (B, L) -> (B, L, D)."""

    def __init__(self, n_tokens: int, width: int, pad: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, width, padding_idx=pad)
        self.norm = nn.LayerNorm(width)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)

    def forward(self, genes: Tensor) -> Tensor:
        return self.norm(self.embedding(genes))


class ValueEncoder(nn.Module):
    """An MLP of a value: (B, L) -> (B, L, D)."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(1, width)
        self.linear2 = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, values: Tensor) -> Tensor:
        hidden = F.relu(self.linear1(values.clamp(max=512)[..., None]))
        return self.dropout(self.norm(self.linear2(hidden)))


class Layer(nn.Module):
    """Attention and a feed-forward layer on two streams with shared weights: (B, K, D), (B, U, D) -> the same."""

    def __init__(self, config: ModelConfig, arrangement: Arrangement, attention_dropout: float) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.arrangement = arrangement
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, config.hidden)
        self.linear2 = nn.Linear(config.hidden, width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("identity", torch.eye(width), persistent=False)

    def forward(self, known: Tensor, unknown: Tensor, streams: Streams, sees: Tensor) -> tuple[Tensor, Tensor]:
        attend = self.under_mask if self.arrangement == "mask" else self.by_stream
        of_known, of_unknown = attend(self.qkv(known), self.qkv(unknown), streams, sees)
        # only known tokens pass the output projection
        return self.rest(known, self.out_proj(of_known)), self.rest(unknown, of_unknown)

    def rest(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(context))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return self.norm2(x + self.dropout(self.linear2(hidden)))

    def under_mask(self, known: Tensor, unknown: Tensor, streams: Streams, sees: Tensor) -> tuple[Tensor, Tensor]:
        """Return the contexts (B, K, D) and (B, U, D) from both streams' projections (B, ., 3D), in one call."""
        joint = self.attention(torch.cat([known, unknown], 1), sees)
        return joint[:, : known.shape[1]], joint[:, known.shape[1] :]

    def by_stream(self, known: Tensor, unknown: Tensor, streams: Streams, sees: Tensor) -> tuple[Tensor, Tensor]:
        """As under_mask, but each stream's queries apart.

        The original hands the unknown ones, projected already, to a function that projects again, which takes identity
        matrices, and returns the attention weights, which takes memory for all of them. Both are reproduced.
        """
        of_known = self.attention(known, ~streams.known_padding[:, None, None, :] if streams.padded else None)
        query = unknown.chunk(3, -1)[0].transpose(0, 1)  # (U, B, D)
        _, key, value = torch.cat([known, unknown], 1).transpose(0, 1).chunk(3, -1)  # (M, B, D)
        hidden = ~self.unknown_rows(known, unknown)
        of_unknown, _ = F.multi_head_attention_forward(
            query, key, value, query.shape[-1], self.heads,
            in_proj_weight=self.identity.repeat(3, 1), in_proj_bias=None, bias_k=None, bias_v=None, add_zero_attn=False,
            dropout_p=self.attention_dropout, out_proj_weight=self.identity, out_proj_bias=None,
            training=self.training, need_weights=True,
            key_padding_mask=streams.padding() if streams.padded else None, attn_mask=hidden,
        )  # fmt: skip
        return of_known, of_unknown.transpose(0, 1)

    def unknown_rows(self, known: Tensor, unknown: Tensor) -> Tensor:
        """Return which keys unknown queries see, (U, M); the original builds this in every layer."""
        everything = unknown.new_ones(unknown.shape[1], known.shape[1], dtype=torch.bool)
        return torch.cat([everything, torch.eye(unknown.shape[1], dtype=torch.bool, device=unknown.device)], 1)

    def attention(self, qkv: Tensor, sees: Tensor | None) -> Tensor:
        """Return the context (B, L, D) of projections (B, L, 3D)."""
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, L, d)
        dropout = self.attention_dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, dropout_p=dropout)
        return context.transpose(1, 2).flatten(2)


class ValueDecoder(nn.Module):
    """GEP: values from tokens, (B, L, D) -> (B, L)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, width)
        self.linear2 = nn.Linear(width, width)
        self.out = nn.Linear(width, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(F.leaky_relu(self.linear2(F.leaky_relu(self.linear1(tokens))))).squeeze(-1)


class ProductDecoder(nn.Module):
    """MVC: values from the inner product of queried genes (B, L, D) and cells (B, D), -> (B, L)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.project = nn.Linear(width, width, bias=False)

    def forward(self, genes: Tensor, cells: Tensor) -> Tensor:
        return torch.bmm(self.project(torch.sigmoid(self.query(genes))), cells[:, :, None]).squeeze(-1)


class DenseMaskModel(nn.Module):
    """scGPT's generative pretraining model with dense masks; its parameters are named as scfm's are.

    Args:
        config: width, heads, layers, hidden and dropout are read.
        n_tokens: length of the vocabulary.
        pad: vocabulary index of `<pad>`.
        arrangement: how attention is computed.
        attention_dropout: dropout of the attention weights; the original takes that of everything else.
    """

    def __init__(
        self,
        config: ModelConfig,
        n_tokens: int,
        pad: int,
        arrangement: Arrangement = "mask",
        attention_dropout: float | None = None,
    ) -> None:
        super().__init__()
        width = config.width
        attention_dropout = config.dropout if attention_dropout is None else attention_dropout
        self.gene_embedding = GeneEmbedding(n_tokens, width, pad)
        self.value_encoder = ValueEncoder(width, config.dropout)
        self.unknown_flag = nn.Parameter(torch.randn(width))
        self.blocks = nn.ModuleList(Layer(config, arrangement, attention_dropout) for _ in range(config.layers))
        self.heads = nn.ModuleDict({"gep": ValueDecoder(width), "gepc": ProductDecoder(width)})

    def forward(self, streams: Streams, cell_prompt: Tensor | None = None, read_cell: bool = True) -> Predictions:
        """Predict the unknown genes; `cell_prompt` (B, D) replaces the input of each cell's first token."""
        known_genes = self.gene_embedding(streams.known_genes)
        unknown_genes = self.gene_embedding(streams.unknown_genes)
        known = known_genes + self.value_encoder(streams.known_values)
        unknown = unknown_genes + self.unknown_flag
        if cell_prompt is not None:
            known = torch.cat([cell_prompt.to(known.dtype)[:, None], known[:, 1:]], 1)
        sees = streams.visible()
        for block in self.blocks:
            known, unknown = block(known, unknown, streams, sees)
        n_known, cell = known.shape[1], known[:, 0]
        # both heads read every token, as the original's do, though no loss looks at known ones
        values = self.heads["gep"](torch.cat([known, unknown], 1))[:, n_known:]
        if not read_cell:
            return Predictions(values, None, cell)
        from_cell = self.heads["gepc"](torch.cat([known_genes, unknown_genes], 1), cell)[:, n_known:]
        return Predictions(values, from_cell, cell)

    def load_scfm(self, weights: dict[str, Tensor]) -> None:
        """Take the weights of scfm's model of the same shape."""
        self.load_state_dict({name.removeprefix("backbone."): tensor for name, tensor in weights.items()})


def pretraining_loss(model: DenseMaskModel, streams: Streams) -> Tensor:
    """Return GEP + MVC + GEP of the second pass: squared errors, each a mean over the unknown genes."""
    first = model(streams)
    second = model(streams, cell_prompt=first.cell.detach(), read_cell=False)
    assert first.from_cell is not None
    real = (~streams.unknown_padding).float()
    errors = [(values.float() - streams.targets).square() for values in (first.values, first.from_cell, second.values)]
    return torch.stack([(error * real).sum() for error in errors]).sum() / real.sum()
