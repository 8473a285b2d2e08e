"""Random packs of cells for tests of models and objectives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from scfm.data.batch import PackedBatch

N_BINS, N_GENES = 11, 40
PAD, CLS = N_GENES, N_GENES + 1


def random_pack(
    lengths: Sequence[int], known: Sequence[int], seed: int = 0, **conditions: dict[str, Tensor]
) -> PackedBatch:
    """A pack of cells of these lengths with so many known tokens, `<cls>` included."""
    draw = torch.Generator().manual_seed(seed)
    genes, targets = [], []
    for length in lengths:
        genes.append(torch.cat([torch.tensor([CLS]), torch.randperm(N_GENES, generator=draw)[: length - 1]]))
        targets.append(torch.cat([torch.tensor([-2]), torch.randint(1, N_BINS, (length - 1,), generator=draw)]))
    batch = PackedBatch(
        genes=torch.cat(genes).int(),
        values=torch.cat(targets).float(),
        targets=torch.cat(targets).float(),
        cu_seqlens=pad(torch.tensor(lengths).cumsum(0), (1, 0)).int(),
        n_known=torch.tensor(known).int(),
        cell_id=torch.arange(len(lengths)),
        total_cells=len(lengths),
        total_unknown=sum(lengths) - sum(known),
        **conditions,
    )
    batch.values.masked_fill_(batch.unknown_mask, -1)
    return batch


def bin_pack(lengths: Sequence[int], known: Sequence[int], seed: int = 0) -> PackedBatch:
    """As `random_pack`, with values as scBERT has them: `<cls>` holds bin 0, hidden genes hold N_BINS."""
    batch = random_pack(lengths, known, seed)
    assert batch.targets is not None
    batch.targets.clamp_(min=0)
    batch.values.clamp_(min=0).masked_fill_(batch.unknown_mask, N_BINS)
    return batch
