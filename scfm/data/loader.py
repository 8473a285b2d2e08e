"""From a store to packed batches: prepared ahead on threads, delivered in order, alike at any number of threads."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from scfm.data.ahead import Stages, groups_of, made_ahead
from scfm.data.batch import PackedBatch, Sizes
from scfm.data.log_binning import check_logarithms
from scfm.data.order import Order
from scfm.data.packing import deal, filled_length, positions_of
from scfm.data.reading import Reader
from scfm.data.store import CellStore, Codes
from scfm.data.tokens import Tokeniser
from scfm.errors import ScfmError


class PackLoader:
    """Delivers this rank's packs of one global batch after another.

    Global batch k of an epoch is a pure function of (order, tokeniser, epoch, k): cells, tokens and denominators are
    the same at any world size, the ranks only share the packs.

    Args:
        store: where the cells lie.
        order: which cells make a global batch.
        tokeniser: how cells become tokens.
        tokens_per_pack: most tokens in a pack.
        fill_packs: fill all packs of a global batch to one length, on every rank, with pseudo-cells.
        cell_conditions: name -> (N,) code of every store row.
        keys: (N,) uint64 key of every store row, on which its random draws depend; None takes what the order says.
        rank, world_size: this process, and how many share a global batch.
        reader: how cells that lie in files come into memory; None reads the store where it is.
        threads: threads that prepare batches.
        prefetch: global batches prepared ahead; small ones are prepared in groups, one for each thread at least.
        pin_memory: put batches into page-locked memory.

    Raises ScfmError for normalised cells that are none of the logarithms that `data.values: log2` reads.

    Attributes:
        wait_seconds: time that the consumer waited for a batch, so far.
    """

    def __init__(
        self,
        store: CellStore,
        order: Order,
        tokeniser: Tokeniser,
        *,
        tokens_per_pack: int,
        fill_packs: bool = False,
        cell_conditions: Mapping[str, Codes] | None = None,
        keys: NDArray[np.uint64] | None = None,
        rank: int = 0,
        world_size: int = 1,
        reader: Reader | None = None,
        threads: int = 1,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        self.store, self.order, self.tokeniser = store, order, tokeniser
        self.tokens_per_pack, self.fill_packs = tokens_per_pack, fill_packs
        self.cell_conditions = dict(cell_conditions or {})
        self.keys = keys
        self.rank, self.world_size = rank, world_size
        self.reader = reader
        self.threads, self.prefetch, self.pin_memory = threads, prefetch, pin_memory
        self.wait_seconds = 0.0
        if tokeniser.config.values == "log2":
            check_logarithms(store)
        for key, number in (("data.threads", threads), ("data.prefetch", prefetch)):
            if number < 1:
                raise ScfmError(f"{key}: {number} must be at least 1")

    def __len__(self) -> int:
        """Return the global batches of an epoch, the same for every rank."""
        return len(self.order)

    def batches(self, epoch: int, start: int = 0) -> Generator[list[PackedBatch], None, None]:
        """Yield this rank's packs of global batch `start`, `start + 1`, ... of an epoch.

        Closing the iterator ends its threads; an error in a thread is raised here.
        """
        stages = None if self.reader is None else Stages(self.order, epoch, self.reader)
        groups, threads = groups_of(self.order, start), self.threads
        made = made_ahead(groups, lambda ks: self._prepare(epoch, ks, stages), threads, self.prefetch)
        try:
            before = time.perf_counter()
            for ks, batches in made:
                self.wait_seconds += time.perf_counter() - before
                if stages is not None:
                    stages.delivered(ks[-1])
                yield from batches
                before = time.perf_counter()
        finally:
            made.close()
            if stages is not None:
                stages.close()

    def prepare(self, epoch: int, k: int) -> list[PackedBatch]:
        """Return this rank's packs of global batch k of an epoch."""
        return self._prepare(epoch, range(k, k + 1), None)[0]

    def _prepare(self, epoch: int, ks: range, stages: Stages | None) -> list[list[PackedBatch]]:
        """Return this rank's packs of some global batches, whose cells all come from the same stages."""
        store = self.store if stages is None else stages.of(ks.start)
        rows, keys = self.order.drawn(epoch, ks)
        if self.keys is not None:
            keys = self.keys[rows]
        each = self.order.cells_per_batch
        rows_of = [rows[first : first + each] for first in range(0, len(rows), each)]
        lengths, n_unknown = self.tokeniser.plan(store, rows, keys, epoch)

        # The cells of all packs in a row, -1 for a pseudo-cell; every pack is a slice of the arrays over them.
        seats: list[NDArray[np.int64]] = []
        pseudo_sizes: list[int] = []
        batch_of: list[int] = []  # of each pack
        first = 0
        for i, batch_rows in enumerate(rows_of):
            of_batch = lengths[first : first + len(batch_rows)]
            plan = deal(of_batch, self.world_size, self.tokens_per_pack)
            size = filled_length(of_batch, plan, self.tokens_per_pack) if self.fill_packs else 0
            for pack in plan[self.rank]:
                room = self._rooms(int(of_batch[pack].sum()), size)
                seats.append(np.append(pack + first, np.full(len(room), -1)))
                pseudo_sizes += room
                batch_of.append(i)
            first += len(batch_rows)
        cells = np.concatenate(seats)
        real = cells >= 0
        sizes = lengths[cells].astype(np.int64)
        sizes[~real] = pseudo_sizes
        ends = np.cumsum(sizes)
        starts = ends - sizes

        hides = self.tokeniser.config.hides
        # one piece of memory: numpy asks for huge pages from 4 MB on, and page faults would cost a tenth of the time
        memory = np.empty((3 if hides else 2, ends[-1]), np.int32)
        genes, values, targets = memory[0], memory[1].view(np.float32), memory[-1].view(np.float32)
        for pseudo in np.flatnonzero(~real):
            tokens = slice(starts[pseudo], ends[pseudo])
            genes[tokens], values[tokens], targets[tokens] = self.tokeniser.vocabulary.pad, 0, 0
        levels = self.tokeniser.levels
        own = cells[real]
        self.tokeniser.fill(
            store, rows[own], keys[own], epoch, starts[real], lengths[own], n_unknown[own], genes, values, targets
        )

        n_known = np.where(real, (lengths - n_unknown)[cells], np.int32(1))
        cell_id = np.where(real, rows[cells], -1)
        conditions = {
            name: np.where(real, codes[rows[cells]], 0).astype(np.int64) for name, codes in self.cell_conditions.items()
        }
        unknown_of = np.add.reduceat(n_unknown, np.cumsum([0, *map(len, rows_of[:-1])]), dtype=np.int64)
        bounds = np.cumsum([0, *map(len, seats)]).tolist()
        length, hidden = np.where(real, sizes, 0), np.where(real, n_unknown[cells], 0)
        counted = np.stack([length, real, hidden, length * (length - hidden) + hidden, np.square(length)])
        sizes_of = np.add.reduceat(counted, bounds[:-1], axis=1).T.tolist()
        ends = np.append(0, ends)
        prepared: list[list[PackedBatch]] = [[] for _ in ks]
        for i, (first, last), sizes_of_pack in zip(batch_of, pairwise(bounds), sizes_of, strict=True):
            inside, tokens = slice(first, last), slice(ends[first], ends[last])
            cu_seqlens = (ends[first : last + 1] - tokens.start).astype(np.int32)
            batch = PackedBatch(
                genes=torch.from_numpy(genes[tokens]),
                values=torch.from_numpy(values[tokens]),
                targets=torch.from_numpy(targets[tokens]) if hides else None,
                cu_seqlens=torch.from_numpy(cu_seqlens),
                n_known=torch.from_numpy(n_known[inside]),
                cell_id=torch.from_numpy(cell_id[inside]),
                gene_conditions=_as_tensors(self.tokeniser.conditions_of(genes[tokens])),
                cell_conditions=_as_tensors({name: codes[inside] for name, codes in conditions.items()}),
                total_cells=len(rows_of[i]),
                total_unknown=int(unknown_of[i]),
                longest=self.tokeniser.longest,
                levels=None if levels is None else torch.from_numpy(levels),
            )
            batch.predicted = torch.from_numpy(positions_of(cu_seqlens, n_known[inside], real[inside]))
            batch.real_positions = torch.from_numpy(np.flatnonzero(real[inside]))
            batch.sizes = Sizes(*sizes_of_pack)
            prepared[i].append(batch.pin_memory() if self.pin_memory else batch)
        return prepared

    def _rooms(self, tokens: int, size: int) -> list[int]:
        """Return the tokens of a pack's pseudo-cells: what is left, or one where the pack would be empty.

        None is longer than a cell may be, for attention costs the square of it.
        """
        room = max(size - tokens, 0 if tokens else 1)
        longest = self.tokeniser.longest
        return [longest] * (room // longest) + ([room % longest] if room % longest else [])


def _as_tensors(arrays: Mapping[str, NDArray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
