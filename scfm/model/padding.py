"""scGPT's treatment of padding, for comparisons with it: padded positions count in norm statistics and in pooling."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scfm.data.batch import PackedBatch

PAD_VALUE = -2.0


@dataclass
class Padded:
    """A pack whose cells end with one `<pad>` token, which stands for all padding that scGPT would give the cell.

    All padded positions of a cell hold the same token and see the same keys, so they are one token that counts as
    often as there are positions up to the length of the longest cell.

    Attributes:
        batch: the pack with the added tokens.
        counted: (T + N,) how many positions each token stands for.
        own: (T,) where the tokens of the original pack stand.
    """

    batch: PackedBatch
    counted: Tensor
    own: Tensor

    @classmethod
    def of(cls, batch: PackedBatch, pad: int) -> Padded:
        """Add the padding of a pack."""
        own = torch.arange(batch.n_tokens, device=batch.genes.device) + batch.cell_of_token
        ends = batch.cu_seqlens[1:].long() + torch.arange(batch.n_cells, device=batch.genes.device)

        def extended(tokens: Tensor, padding: Tensor | float) -> Tensor:
            longer = tokens.new_empty(batch.n_tokens + batch.n_cells).index_copy(0, own, tokens)
            if isinstance(padding, Tensor):
                return longer.index_copy(0, ends, padding.to(tokens.dtype))
            return longer.index_fill(0, ends, padding)

        longer = replace(
            batch,
            genes=extended(batch.genes, pad),
            values=extended(batch.values, PAD_VALUE),
            targets=None,
            longest=batch.longest + 1,
            levels=None,
            cu_seqlens=batch.cu_seqlens + torch.arange(batch.n_cells + 1, device=own.device, dtype=torch.int32),
            gene_conditions={name: extended(index, 0) for name, index in batch.gene_conditions.items()},
        )
        n_padding = batch.lengths.max() - batch.lengths  # (N,)
        counted = extended(torch.ones_like(batch.values), n_padding)
        return cls(longer, counted, own)
