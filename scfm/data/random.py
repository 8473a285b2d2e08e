"""Random numbers that depend on what they are for, not on when they are drawn.

Every draw is a pure function of (seed, epoch, key, purpose, index), so tokens and order are the same whatever the
batch, the number of threads or the number of processes. The mixing function is the finaliser of splitmix64
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

import numpy as np
from numba import uint64
from numpy.typing import NDArray

from scfm.compiled import compiled

RATIO, CHOICE, TIES, ROTATION, BLOCKS, WINDOWS, HIDDEN, SHOWN = range(8)
"""What a stream of draws is for: two purposes never share draws."""

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
LOW_HALF = np.uint64(0xFFFFFFFF)
FEISTEL_ROUNDS = 8


@compiled
def mix64(x: int) -> int:
    """Map a 64-bit word to another, one to one, so that close inputs give unrelated outputs."""
    x = uint64(x)
    x = (x ^ (x >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> uint64(27))) * uint64(0x94D049BB133111EB)
    return x ^ (x >> uint64(31))


@compiled
def stream(seed: int, epoch: int, key: int, purpose: int) -> int:
    """Return the start of a stream of draws: a 64-bit word that differs with any of the four."""
    word = mix64(uint64(seed) + GOLDEN)
    word = mix64(word + uint64(epoch) * GOLDEN + uint64(1))
    word = mix64(word + uint64(purpose) * GOLDEN + uint64(2))
    return mix64(word ^ mix64(uint64(key) + GOLDEN))


@compiled
def draw32(start: int, index: int) -> int:
    """Return draw number `index` of a stream, uniform over 32-bit words."""
    word = mix64(uint64(start) + (uint64(index) >> uint64(1)) * GOLDEN)
    return (word >> ((uint64(index) & uint64(1)) << uint64(5))) & LOW_HALF


@compiled
def below(word: int, n: int) -> int:
    """Map a 32-bit draw to range(n), n below 2**31; no value is likelier than another by more than n / 2**32."""
    return int((uint64(word) * uint64(n)) >> uint64(32))


@compiled
def feistel(x: int, n: int, key: int) -> int:
    """Return where a keyed permutation of range(n) sends x: a Feistel network that is walked until it falls below n."""
    bits = 2
    while (1 << bits) < n:
        bits += 1
    word = uint64(x)
    while True:
        low_bits, high_bits = uint64(bits // 2), uint64(bits - bits // 2)
        for turn in range(FEISTEL_ROUNDS):
            low = word & ((uint64(1) << low_bits) - uint64(1))
            noise = mix64(uint64(key) + (low * uint64(FEISTEL_ROUNDS) + uint64(turn)) * GOLDEN)
            high = (word >> low_bits) ^ (noise & ((uint64(1) << high_bits) - uint64(1)))
            # the halves trade places; an even number of rounds restores their widths
            word = (low << high_bits) | high
            low_bits, high_bits = high_bits, low_bits
        if word < uint64(n):
            return int(word)


@compiled
def permuted(positions: NDArray[np.int64], n: int, key: int) -> NDArray[np.int64]:
    """Return where a keyed permutation of range(n) sends each position, (m,) int64, without storing the permutation.

    Method: a Feistel network with cycle walking (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    images = np.empty(len(positions), np.int64)
    for i in range(len(positions)):
        images[i] = feistel(positions[i], n, key)
    return images
