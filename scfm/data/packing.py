"""Dealing the cells of a global batch into packs: no padding, the same number of packs for every rank."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scfm.compiled import compiled
from scfm.errors import ScfmError


def deal(lengths: NDArray[np.int32], world_size: int, tokens_per_pack: int) -> list[list[NDArray[np.int64]]]:
    """Return, for every rank, its packs: the cells of each, as ascending positions in `lengths`; a pack may be empty.

    Every rank computes the same plan. All ranks get the same number of packs, the smallest that either of two greedy
    rules finds: each cell, longest first, to the emptiest pack (even packs), or to the first that has room (tight
    packs). The packs that ranks take in the same step are of similar size.

    Args:
        lengths: (n,) tokens of each cell.
        world_size: number of ranks.
        tokens_per_pack: most tokens in a pack.

    Raises ScfmError where a cell alone is longer than a pack.
    """
    longest = int(lengths.max(initial=0))
    if longest > tokens_per_pack:
        raise ScfmError(
            f"data.tokens_per_pack: {tokens_per_pack} tokens cannot hold a cell of {longest} tokens; "
            f"raise data.tokens_per_pack, or lower data.max_genes"
        )
    rounds = max(-(-int(lengths.sum(dtype=np.int64)) // (tokens_per_pack * world_size)), 1)
    if rounds * world_size == 1:
        return [[np.arange(len(lengths))]]
    longest_first = np.argsort(-lengths, kind="stable")
    pack_of, fits = _deal_greedily(lengths, longest_first, rounds * world_size, tokens_per_pack)
    while not fits:
        rounds += 1
        pack_of, fits = _deal_greedily(lengths, longest_first, rounds * world_size, tokens_per_pack)

    n_packs = rounds * world_size
    sizes = np.bincount(pack_of, weights=lengths, minlength=n_packs)
    cells = np.split(np.argsort(pack_of, kind="stable"), np.cumsum(np.bincount(pack_of, minlength=n_packs))[:-1])
    largest_first = np.argsort(-sizes, kind="stable").reshape(rounds, world_size)
    return [[cells[pack] for pack in largest_first[:, rank]] for rank in range(world_size)]


def filled_length(lengths: NDArray[np.int32], plan: list[list[NDArray[np.int64]]], tokens_per_pack: int) -> int:
    """Return the tokens that every pack of a global batch, on every rank, is filled to.

    Enough for the largest, and rounded up to 1/64 of the budget: over a run there are few lengths.
    """
    largest = max(int(lengths[pack].sum()) for packs in plan for pack in packs)
    step = max(tokens_per_pack // 64, 1)
    return min(-(-max(largest, 1) // step) * step, tokens_per_pack)


@compiled
def _deal_greedily(
    lengths: NDArray[np.int32], longest_first: NDArray[np.int64], n_packs: int, tokens_per_pack: int
) -> tuple[NDArray[np.int64], bool]:
    """Return the pack of each cell, and whether all cells found room."""
    pack_of = np.empty(len(lengths), np.int64)
    for tight in (False, True):
        room = np.full(n_packs, tokens_per_pack, np.int64)
        fits = True
        for cell in longest_first:
            if tight:
                pack = 0
                while pack < n_packs - 1 and room[pack] < lengths[cell]:
                    pack += 1
            else:
                pack = int(room.argmax())
            pack_of[cell] = pack
            room[pack] -= lengths[cell]
            fits = fits and room[pack] >= 0
        if fits:
            return pack_of, True
    return pack_of, False


@compiled
def positions_of(
    cu_seqlens: NDArray[np.int32], n_known: NDArray[np.int32], real: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Return where the unknown genes of the real cells of a pack stand, in order."""
    total = 0
    for cell in range(len(real)):
        if real[cell]:
            total += cu_seqlens[cell + 1] - cu_seqlens[cell] - n_known[cell]
    positions = np.empty(total, np.int64)
    written = 0
    for cell in range(len(real)):
        if real[cell]:
            first = np.int64(cu_seqlens[cell] + n_known[cell])
            mine = positions[written : written + cu_seqlens[cell + 1] - first]
            for i in range(len(mine)):
                mine[i] = first + i
            written += len(mine)
    return positions
