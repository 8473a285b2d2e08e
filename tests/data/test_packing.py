"""Cells into packs: all placed, none too full, ranks alike."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.data.packing import deal
from scfm.errors import ScfmError


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60),
    world_size=st.integers(1, 5),
    spare=st.integers(0, 300),
)
def test_every_cell_has_one_place_and_no_pack_is_too_full(lengths: list[int], world_size: int, spare: int) -> None:
    sizes, capacity = np.array(lengths, np.int32), max(lengths) + spare
    ranks = deal(sizes, world_size, capacity)
    assert len(ranks) == world_size
    assert len({len(packs) for packs in ranks}) == 1, "ranks take different numbers of steps"
    placed = [cell for packs in ranks for pack in packs for cell in pack]
    assert sorted(placed) == list(range(len(lengths)))
    assert all(sizes[pack].sum() <= capacity for packs in ranks for pack in packs)
    assert all((np.diff(pack) > 0).all() for packs in ranks for pack in packs)


def test_the_fewest_packs_that_can_hold_the_cells() -> None:
    even = np.full(512, 1200, np.int32)
    assert [len(packs) for packs in deal(even, 1, 65536)] == [10]  # 54 cells fit a pack
    assert [len(packs) for packs in deal(even, 4, 65536)] == [3] * 4


def test_packs_are_even() -> None:
    lengths = np.random.default_rng(0).integers(200, 1200, 512).astype(np.int32)
    sizes = [lengths[pack].sum() for packs in deal(lengths, 4, 65536) for pack in packs]
    assert max(sizes) - min(sizes) < 1000


def test_tight_packs_where_even_ones_would_need_more() -> None:
    """5 + 5 and 4 + 3 + 3 fill two packs of ten; dealing to the emptiest pack leaves no room for the last cell."""
    (packs,) = deal(np.array([5, 5, 4, 3, 3], np.int32), 1, 10)
    assert sorted(pack.tolist() for pack in packs) == [[0, 1], [2, 3, 4]]


def test_more_ranks_than_cells_leave_empty_packs() -> None:
    ranks = deal(np.array([5, 7], np.int32), 4, 100)
    assert sorted(len(packs[0]) for packs in ranks) == [0, 0, 1, 1]


def test_ranks_get_packs_of_similar_size_in_the_same_step() -> None:
    lengths = np.array([10, 10, 10, 10, 3, 3, 3, 3], np.int32)
    ranks = deal(lengths, 2, 13)
    for step in zip(*ranks, strict=True):
        assert len({lengths[pack].sum() for pack in step}) == 1


def test_the_same_lengths_give_the_same_plan() -> None:
    lengths = np.random.default_rng(1).integers(1, 50, 300).astype(np.int32)
    plans = [[[pack.tolist() for pack in packs] for packs in deal(lengths.copy(), 3, 400)] for _ in range(2)]
    assert plans[0] == plans[1]


def test_a_cell_longer_than_a_pack_names_the_key() -> None:
    with pytest.raises(ScfmError, match=r"data\.tokens_per_pack: 100 tokens cannot hold a cell of 101"):
        deal(np.array([5, 101], np.int32), 1, 100)
