"""From the tokens of a cell to its embedding."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from scfm.data.batch import PackedBatch


def pool(
    kind: Literal["cls", "mean", "weighted"], tokens: Tensor, batch: PackedBatch, counted: Tensor | None = None
) -> Tensor:
    """Return the cell embeddings, (T, D) -> (N, D): of the known tokens, or of all positions where padding counts.

    Args:
        kind: the first token of a cell, the mean of its tokens, or their value-weighted sum, L2-normalised.
        tokens: (T, D).
        batch: the pack.
        counted: (T,) how many padded positions each token stands for; None where only known tokens count.
    """
    if kind == "cls":
        return tokens.index_select(0, batch.cu_seqlens[:-1].long())
    weighted = kind == "weighted"
    counted = (~batch.unknown_mask if counted is None else counted).to(tokens.dtype)  # (T,)
    weights = counted * batch.values.to(tokens.dtype) if weighted else counted

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(batch.n_cells, *x.shape[1:]).index_add(0, batch.cell_of_token, x)

    sums = total(tokens * weights[:, None])  # (N, D)
    return F.normalize(sums, dim=-1) if weighted else sums / total(counted)[:, None]
