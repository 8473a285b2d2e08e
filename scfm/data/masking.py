"""Which genes of a cell become tokens, and which of them are unknown: exact numbers, drawn by the cell's key."""

from __future__ import annotations

from math import ceil

import numpy as np
from numba import uint64
from numpy.typing import NDArray

from scfm.compiled import compiled
from scfm.data.random import GOLDEN, LOW_HALF, RATIO, below, draw32, mix64, stream

Scratch = tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32]]


@compiled
def streams_of(keys: NDArray[np.uint64], seed: int, epoch: int, purpose: int) -> NDArray[np.uint64]:
    """Return the stream of draws of each cell, (n,), for a purpose."""
    streams = np.empty(len(keys), np.uint64)
    for i in range(len(keys)):
        streams[i] = stream(seed, epoch, keys[i], purpose)
    return streams


@compiled
def count_unknown(
    candidates: NDArray[np.int32],
    ratios: NDArray[np.float64],
    round_up: bool,
    keys: NDArray[np.uint64],
    seed: int,
    epoch: int,
) -> NDArray[np.int32]:
    """Return candidates * ratio of each cell as a whole number, its ratio drawn from the given ones."""
    unknown = np.empty(len(candidates), np.int32)
    for i in range(len(candidates)):
        drawn = below(draw32(stream(seed, epoch, keys[i], RATIO), 0), len(ratios))
        share = candidates[i] * ratios[drawn]
        unknown[i] = ceil(share) if round_up else int(share)
    return unknown


@compiled
def scratch_of(most_genes: int, most_tokens: int) -> Scratch:
    """Return what the functions below work in: the chances of the genes of a cell, and the lists of its tokens."""
    lists = np.empty((2, most_tokens), np.uint32)
    return np.empty(most_genes + 1, np.uint32), lists[0], lists[1]


@compiled
def _draw(n: int, choice_stream: int, chances: NDArray[np.uint32]) -> None:
    """Write a draw from range(n - t) at place t, two from each word of the stream, as `draw32` numbers them."""
    # counted on, and the halves said to be halves, or the loop multiplies three times as often once it is vectorised
    state, left = uint64(choice_stream), uint64(n)
    for pair in range((n + 1) // 2):
        word = mix64(state)
        chances[2 * pair] = ((word & LOW_HALF) * (left & LOW_HALF)) >> uint64(32)
        chances[2 * pair + 1] = ((word >> uint64(32)) * ((left - uint64(1)) & LOW_HALF)) >> uint64(32)
        state += GOLDEN
        left -= uint64(2)


@compiled
def split(n: int, known: int, unknown: int, choice_stream: int, scratch: Scratch) -> None:
    """Draw which of n genes are known and which unknown, and list their places, ascending, in the last two of scratch.

    One pass decides each gene by the room that is left, so that the numbers come out exactly (selection sampling:
    Knuth, The Art of Computer Programming, 3.4.2, algorithm S). The draws come first, in a loop that vectorises. Every
    gene is written to both lists and stays only where its list moves on, because a branch would be mispredicted half
    the time; so a list needs one element of slack.
    """
    chances, first, second = scratch
    _draw(n, choice_stream, chances)
    # unsigned, or numba takes every index for one that may be negative
    room_known, room = uint64(known), uint64(known + unknown)
    at_known, at_unknown = uint64(0), uint64(0)
    for t in range(n):
        chance = uint64(chances[t])
        is_known, is_kept = uint64(chance < room_known), uint64(chance < room)
        first[at_known], second[at_unknown] = t, t
        room_known -= is_known
        room -= is_kept
        at_known += is_known
        at_unknown += is_kept - is_known


@compiled
def keep(read: NDArray, kept: int, choice_stream: int, scratch: Scratch) -> int:
    """List the places of the genes that are kept, and return how many of them are expressed (their value is not 0)."""
    first = scratch[1]
    if kept < len(read):
        split(len(read), kept, 0, choice_stream, scratch)
    else:
        for t in range(kept):
            first[t] = t
    expressed = 0
    for j in range(kept):
        expressed += int(read[first[j]] != 0)
    return expressed


@compiled
def split_expressed(
    read: NDArray, known: int, unknown: int, choice_stream: int, hidden_stream: int, scratch: Scratch
) -> None:
    """As `split` of all genes read, but draw first which are kept, then the unknown ones among those expressed."""
    chances, first, second = scratch
    candidates = keep(read, known + unknown, choice_stream, scratch)
    for c in range(candidates):
        chances[c] = below(draw32(hidden_stream, c), candidates - c)
    room, seen, at_known, at_unknown = unknown, 0, 0, 0
    for j in range(known + unknown):
        t = first[j]
        is_candidate = int(read[t] != 0)
        # behind the last candidate some draw is read, and does not count
        is_unknown = is_candidate & int(int(chances[seen]) < room)
        first[at_known], second[at_unknown] = t, t
        seen += is_candidate
        room -= is_unknown
        at_known += 1 - is_unknown
        at_unknown += is_unknown


@compiled
def show(values: NDArray, targets: NDArray, places: NDArray, shown: int, shown_stream: int) -> None:
    """Write the true value of some unknown genes, each drawn by its place in the cell, `shown` times in 2**32."""
    for j in range(len(values)):
        if draw32(shown_stream, places[j]) < shown:
            values[j] = targets[j]
