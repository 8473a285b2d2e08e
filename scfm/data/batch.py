"""A pack of cells as the model sees it: tokens back to back, no padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

KNOWN_BY_THE_LOADER = ("predicted", "real_positions", "sizes")


class Sizes(NamedTuple):
    """What the real cells of a pack amount to: tokens, cells, unknown genes, and pairs of a query and a key it sees."""

    tokens: int
    cells: int
    unknown: int
    generative_pairs: int
    full_pairs: int


@dataclass
class PackedBatch:
    """Cells packed back to back; within a cell `<cls>` and the known genes come first, then the unknown genes.

    Sizes: T packed tokens, N cells. A mask is a length: `n_known` says all that attention needs.

    Attributes:
        genes: (T,) int32 vocabulary ids; the first token of a cell is `<cls>` where the tokens have one.
        values: (T,) float32 values as the model sees them (bins); unknown genes hold the mask value.
        targets: (T,) float32 true values of all tokens, or None where nothing is hidden.
        cu_seqlens: (N + 1,) int32 cell boundaries.
        n_known: (N,) int32 known tokens of each cell, `<cls>` included, at least 1.
        cell_id: (N,) int64 row of the cell in its store; -1 marks a pseudo-cell that only fills room.
        gene_conditions: name -> (T,) int64 condition index of each token (perturbation flag, pathway); 0 means none.
        cell_conditions: name -> (N,) int64 condition index of each cell (batch, modality, label ...).
        total_cells: cells in the whole global batch, over all packs and ranks: the denominator of cell losses.
        total_unknown: unknown genes in the whole global batch: the denominator of gene losses.
        longest: no cell has more tokens; the same for all packs of a run, since kernels are compiled for it. Where it
            is not given, the longest cell of the pack.
        levels: (V,) float32 all that `values` can hold, ascending, where that is few (bins); None where it is not.
    """

    genes: Tensor
    values: Tensor
    targets: Tensor | None
    cu_seqlens: Tensor
    n_known: Tensor
    cell_id: Tensor
    gene_conditions: dict[str, Tensor] = field(default_factory=dict)
    cell_conditions: dict[str, Tensor] = field(default_factory=dict)
    total_cells: int = 0
    total_unknown: int = 0
    longest: int = 0
    levels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.longest == 0:
            self.longest = int(self.cu_seqlens.diff().max())

    @property
    def n_cells(self) -> int:
        return self.n_known.shape[0]

    @property
    def n_tokens(self) -> int:
        return self.genes.shape[0]

    @cached_property
    def lengths(self) -> Tensor:
        """(N,) int64 tokens of each cell."""
        return self.cu_seqlens.diff().long()

    @cached_property
    def real_cells(self) -> Tensor:
        """(N,) bool, False for a pseudo-cell."""
        return self.cell_id >= 0

    @cached_property
    def cell_of_token(self) -> Tensor:
        """(T,) int64 index of the cell that a token belongs to."""
        cells = torch.arange(self.n_cells, device=self.genes.device)
        return torch.repeat_interleave(cells, self.lengths, output_size=self.n_tokens)

    @cached_property
    def unknown_mask(self) -> Tensor:
        """(T,) bool, True for unknown genes (those of a pseudo-cell included)."""
        position = (
            torch.arange(self.n_tokens, device=self.genes.device) - self.cu_seqlens[:-1].long()[self.cell_of_token]
        )
        return position >= self.n_known.long()[self.cell_of_token]

    @cached_property
    def predicted(self) -> Tensor:
        """(U,) int64 positions of the unknown genes of real cells, in pack order: what the gene losses look at."""
        return (self.unknown_mask & self.real_cells[self.cell_of_token]).nonzero()[:, 0]

    @cached_property
    def real_positions(self) -> Tensor:
        """(R,) int64 positions of the cells that are no pseudo-cells."""
        return self.real_cells.nonzero()[:, 0]

    @cached_property
    def sizes(self) -> Sizes:
        """Of a cell of M tokens, K of them known, M K + (M - K) pairs under the generative mask, M M under the full."""
        length, known = self.lengths[self.real_cells], self.n_known[self.real_cells].long()
        parts = (length, torch.ones_like(length), length - known, length * known + length - known, length.square())
        return Sizes(*(int(part.sum()) for part in parts))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """Return the batch on another device."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Return the batch in page-locked memory."""
        return self.each(Tensor.pin_memory)

    def each(self, move: Callable[[Tensor], Tensor]) -> PackedBatch:
        """Return the batch with each of its tensors moved, positions that are known included."""

        def moved(item: Any) -> Any:
            if isinstance(item, Tensor):
                return move(item)
            if isinstance(item, dict):
                return {name: move(value) for name, value in item.items()}
            return item

        batch = PackedBatch(**{f.name: moved(getattr(self, f.name)) for f in fields(self)})
        # counting on a GPU would make the host wait for it
        known = {name: self.__dict__[name] for name in KNOWN_BY_THE_LOADER if name in self.__dict__}
        batch.__dict__ |= {name: moved(value) for name, value in known.items()}
        return batch
