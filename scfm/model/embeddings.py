"""What goes into a token: which gene it is, its value, and the conditions of the gene and of its cell."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfm.data.batch import PackedBatch
from scfm.model.layers import Dropout, Linear


class GeneEmbedding(nn.Module):
    """A layer-normed vector per gene of the vocabulary: (T,) ids -> (T, D)."""

    def __init__(self, n_tokens: int, width: int, pad: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, width, padding_idx=pad)
        self.norm = nn.LayerNorm(width)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)

    def forward(self, genes: Tensor) -> Tensor:
        return self.norm(self.embedding(genes))


class ContinuousValue(nn.Module):
    """Adds an MLP of the value to the gene's vector: (T, D) -> (T, D)."""

    largest = 512.0  # values above it are read as it; negative ones (<cls>, hidden) pass

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = Linear(1, width)
        self.linear2 = Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = Dropout(dropout)

    def forward(self, genes: Tensor, batch: PackedBatch) -> Tensor:
        if batch.levels is None:
            return self.dropout(self.encode(batch.values.to(genes.dtype)), residual=genes)
        # bins are few: encode each once, and look it up; summed over tokens, its gradient needs the full precision
        table = self.encode(batch.levels.to(genes.dtype)).to(genes.dtype)  # (V, D)
        values = F.embedding(torch.searchsorted(batch.levels, batch.values), table)
        return self.dropout(values, residual=genes)

    def encode(self, values: Tensor) -> Tensor:
        """Return a vector per value, (V,) -> (V, D)."""
        return self.norm(self.linear2(F.relu(self.linear1(values.clamp(max=self.largest)[:, None]))))


class CategoryValue(nn.Module):
    """Adds a vector per bin, or that of `<cls>`, or that of a hidden value, to the gene's vector: (T, D) -> (T, D).

    Rows of the table: bins 0 to n_bins - 1, `<cls>`, hidden.
    """

    def __init__(self, n_bins: int, width: int) -> None:
        super().__init__()
        self.n_bins = n_bins
        self.embedding = nn.Embedding(n_bins + 2, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, genes: Tensor, batch: PackedBatch) -> Tensor:
        bins = batch.values.long().masked_fill(batch.unknown_mask, self.n_bins + 1)
        bins = bins.index_fill(0, batch.cu_seqlens[:-1].long(), self.n_bins)
        return genes + self.norm(self.embedding(bins))


class ScalingValue(nn.Module):
    """Multiplies the gene's vector by the value: (T, D) -> (T, D)."""

    def forward(self, genes: Tensor, batch: PackedBatch) -> Tensor:
        return genes * batch.values.to(genes.dtype)[:, None]


def value_encoder(kind: str, width: int, n_bins: int, dropout: float) -> nn.Module:
    """Build the value encoder that the recipe names: continuous, category or scaling."""
    if kind == "continuous":
        return ContinuousValue(width, dropout)
    return CategoryValue(n_bins, width) if kind == "category" else ScalingValue()


class GeneCondition(nn.Module):
    """A vector per condition of a gene (perturbation flag, pathway), added to its token; condition 0 adds nothing."""

    def __init__(self, n_conditions: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_conditions, width, padding_idx=0)

    def forward(self, conditions: Tensor) -> Tensor:
        return self.embedding(conditions)


class Modality(nn.Module):
    """A layer-normed vector per modality, for the decoders to read: (T,) -> (T, D)."""

    def __init__(self, n_modalities: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_modalities, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, modalities: Tensor) -> Tensor:
        return self.norm(self.embedding(modalities))


class CellCondition(nn.Module):
    """A layer-normed vector per condition of a cell (batch, modality), for the decoders to read: (N,) -> (N, D).

    A cell of an unknown condition (-1) gets the mean of all, the vector that favours none.
    """

    def __init__(self, n_conditions: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_conditions, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, conditions: Tensor) -> Tensor:
        vectors = self.norm(self.embedding.weight)  # (K, D)
        # -1 becomes K, the row of the mean
        return F.embedding(conditions % (len(vectors) + 1), torch.cat([vectors, vectors.mean(0, keepdim=True)]))
