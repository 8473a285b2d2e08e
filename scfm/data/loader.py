"""From a store to packed batches: prepared ahead on threads, delivered in order, alike at any number of threads."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from scfm.data.batch import PackedBatch
from scfm.data.order import CellOrder
from scfm.data.packing import deal
from scfm.data.store import CellStore
from scfm.data.tokens import Tokeniser


class PackLoader:
    """Delivers this rank's packs of one global batch after another.

    Global batch k of an epoch is a pure function of (order, tokeniser, epoch, k): cells, tokens and denominators are the
    same at any world size, the ranks only share the packs.

    Args:
        store: where the cells lie.
        order: which cells make a global batch.
        tokeniser: how cells become tokens.
        tokens_per_pack: most tokens in a pack.
        fill_packs: fill every pack to `tokens_per_pack` with one pseudo-cell.
        cell_conditions: name -> (N,) code of every store row.
        keys: (N,) uint64 key of every store row, on which its random draws depend; None takes the row itself.
        rank, world_size: this process, and how many share a global batch.
        threads: threads that prepare batches.
        prefetch: global batches prepared ahead, at least 1.
        pin_memory: put batches into page-locked memory.

    Attributes:
        wait_seconds: time that the consumer waited for a batch, so far.
    """

    def __init__(
        self,
        store: CellStore,
        order: CellOrder,
        tokeniser: Tokeniser,
        *,
        tokens_per_pack: int,
        fill_packs: bool = False,
        cell_conditions: Mapping[str, NDArray[np.int64]] | None = None,
        keys: NDArray[np.uint64] | None = None,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 1,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        self.store, self.order, self.tokeniser = store, order, tokeniser
        self.tokens_per_pack, self.fill_packs = tokens_per_pack, fill_packs
        self.cell_conditions = dict(cell_conditions or {})
        self.keys = keys
        self.rank, self.world_size = rank, world_size
        self.threads, self.prefetch, self.pin_memory = threads, max(prefetch, 1), pin_memory
        self.wait_seconds = 0.0

    def __len__(self) -> int:
        """Return the global batches of an epoch, the same for every rank."""
        return len(self.order)

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[PackedBatch]]:
        """Yield this rank's packs of global batch `start`, `start + 1`, ... of an epoch.

        Closing the iterator ends its threads; an error in a thread is raised here.
        """
        numbers = iter(range(start, len(self)))
        with ThreadPoolExecutor(self.threads, thread_name_prefix="scfm-loader") as pool:
            ahead: deque[Future[list[PackedBatch]]] = deque()
            try:
                ahead.extend(pool.submit(self.prepare, epoch, k) for k in islice(numbers, self.prefetch))
                while ahead:
                    before = time.perf_counter()
                    packs = ahead.popleft().result()
                    self.wait_seconds += time.perf_counter() - before
                    ahead.extend(pool.submit(self.prepare, epoch, k) for k in islice(numbers, 1))
                    yield packs
            finally:
                for unwanted in ahead:
                    unwanted.cancel()

    def prepare(self, epoch: int, k: int) -> list[PackedBatch]:
        """Return this rank's packs of global batch k of an epoch."""
        rows = self.order.batch(epoch, k)
        keys = rows.astype(np.uint64) if self.keys is None else self.keys[rows]
        lengths, n_unknown = self.tokeniser.plan(self.store, rows, keys, epoch)
        packs = deal(lengths, self.world_size, self.tokens_per_pack)[self.rank]

        # All packs of this rank are views of the same three arrays, so that one call writes them.
        sizes = [int(lengths[cells].sum()) for cells in packs]
        fillers = [self._filler(size) for size in sizes]
        pack_ends = np.cumsum(np.add(sizes, fillers))
        genes = np.empty(pack_ends[-1], np.int32)
        values = np.empty(pack_ends[-1], np.float32)
        targets = np.empty(pack_ends[-1], np.float32) if self.tokeniser.config.hides else values
        starts = [
            end - filler - size + np.cumsum(lengths[cells], dtype=np.int64) - lengths[cells]
            for end, filler, size, cells in zip(pack_ends, fillers, sizes, packs, strict=True)
        ]
        own = np.concatenate(packs)
        self.tokeniser.fill(
            self.store, rows[own], keys[own], epoch, np.concatenate(starts), lengths[own], n_unknown[own],
            genes, values, targets,
        )  # fmt: skip

        batches = []
        for cells, size, filler, end in zip(packs, sizes, fillers, pack_ends, strict=True):
            pack, pseudo = slice(end - filler - size, end), slice(end - filler, end)
            genes[pseudo], values[pseudo], targets[pseudo] = self.tokeniser.vocabulary.pad, 0, 0
            room = [filler] if filler else []
            cell_lengths = np.concatenate([[0], lengths[cells], room])
            batch = PackedBatch(
                genes=torch.from_numpy(genes[pack]),
                values=torch.from_numpy(values[pack]),
                targets=torch.from_numpy(targets[pack]) if self.tokeniser.config.hides else None,
                cu_seqlens=torch.from_numpy(np.cumsum(cell_lengths, dtype=np.int32)),
                n_known=torch.from_numpy(_with_pseudo_cell(lengths[cells] - n_unknown[cells], filler, 1)),
                cell_id=torch.from_numpy(_with_pseudo_cell(rows[cells], filler, -1)),
                gene_conditions={
                    name: torch.from_numpy(codes) for name, codes in self.tokeniser.conditions_of(genes[pack]).items()
                },
                cell_conditions={
                    name: torch.from_numpy(_with_pseudo_cell(codes[rows[cells]].astype(np.int64), filler, 0))
                    for name, codes in self.cell_conditions.items()
                },
                total_cells=len(rows),
                total_unknown=int(n_unknown.sum()),
            )
            batches.append(batch.pin_memory() if self.pin_memory else batch)
        return batches

    def _filler(self, size: int) -> int:
        """Return the tokens of the pseudo-cell that a pack of this size gets: a pack is never empty."""
        if self.fill_packs:
            return self.tokens_per_pack - size
        return 0 if size else 1


def _with_pseudo_cell(of_cells: NDArray, filler: int, of_pseudo_cell: int) -> NDArray:
    """Append the pseudo-cell's entry, where the pack has one."""
    return np.append(of_cells, of_cells.dtype.type(of_pseudo_cell)) if filler else of_cells
