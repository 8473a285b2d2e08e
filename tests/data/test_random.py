"""Draws depend on what they are for, and a permutation needs no table."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest

from scfm.data.random import CHOICE, TIES, below, draw32, mix64, permuted, stream

WORD = 2**64 - 1


def reference_mix64(x: int) -> int:
    """The finaliser of splitmix64 in Python's exact integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


@pytest.mark.parametrize("word", [0, 1, 2**63, WORD, 0x123456789ABCDEF])
def test_mix64_is_the_finaliser_of_splitmix64(word: int) -> None:
    assert mix64(np.uint64(word)) == reference_mix64(word)


def test_splitmix64_gives_its_published_first_numbers() -> None:
    golden = 0x9E3779B97F4A7C15
    numbers = [mix64(np.uint64((1234567 + (i + 1) * golden) & WORD)) for i in range(3)]
    assert numbers == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_two_draws_share_a_word_low_half_first() -> None:
    start, golden = 12345, 0x9E3779B97F4A7C15
    words = [reference_mix64((start + i * golden) & WORD) for i in range(2)]
    draws = [draw32(np.uint64(start), i) for i in range(4)]
    assert draws == [words[0] & 0xFFFFFFFF, words[0] >> 32, words[1] & 0xFFFFFFFF, words[1] >> 32]


def test_streams_differ_in_seed_epoch_key_and_purpose() -> None:
    starts = {stream(*parts) for parts in product((0, 1, 2), (0, 1, 2), (0, 1, 2, 10**12), (CHOICE, TIES))}
    assert len(starts) == 3 * 3 * 4 * 2


def test_a_key_may_be_any_64_bit_word() -> None:
    """Profile hashes use all 64 bits; rows and hashes of the same number must agree."""
    keys = np.array([0, 5, 2**63 + 5, WORD], np.uint64)
    assert len({stream(0, 0, key, CHOICE) for key in keys}) == 4
    assert stream(0, 0, np.uint64(5), CHOICE) == stream(0, 0, 5, CHOICE)


@pytest.mark.parametrize("n", [2, 3, 51, 1000])
def test_draws_below_n_are_uniform(n: int) -> None:
    start = np.uint64(stream(3, 0, n, CHOICE))
    seen = np.bincount([below(draw32(start, i), n) for i in range(200 * n)], minlength=n)
    chi_square = ((seen - 200) ** 2 / 200).sum()
    assert len(seen) == n
    assert abs(chi_square - (n - 1)) < 5 * np.sqrt(2 * n)


def test_below_reaches_both_ends() -> None:
    assert below(0, 7) == 0
    assert below(2**32 - 1, 7) == 6


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 63, 64, 65, 1000, 4097])
def test_a_permutation_reaches_everything_once(n: int) -> None:
    images = permuted(np.arange(n), n, np.uint64(stream(0, 0, n, CHOICE)))
    assert sorted(images) == list(range(n))


def test_a_permutation_can_be_read_at_any_place() -> None:
    key = np.uint64(99)
    whole = permuted(np.arange(5000), 5000, key)
    places = np.array([4999, 17, 0])
    assert permuted(places, 5000, key).tolist() == whole[places].tolist()


def test_every_permutation_of_four_is_about_as_likely() -> None:
    trials = 24 * 200
    seen = Counter(tuple(permuted(np.arange(4), 4, np.uint64(stream(0, 0, key, CHOICE)))) for key in range(trials))
    chi_square = sum((seen[p] - 200) ** 2 / 200 for p in seen) + 200 * (24 - len(seen))
    assert chi_square < 23 + 5 * np.sqrt(2 * 23)


def test_neighbours_are_torn_apart() -> None:
    images = permuted(np.arange(20_000), 20_000, np.uint64(7)).astype(float)
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(images, np.arange(20_000))[0, 1]) < 0.03
