"""Sampling by group: each group's share, no cell too often, and an order as pure as the plain one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scfm.data import ahead
from scfm.data.groups import NO_VALUE, Groups, shares_of
from scfm.data.rows import AllBut, SomeRows
from scfm.data.sampling import SampledOrder, Sampling, _draws_of_groups
from scfm.data.store import CellBlock, CellStore, ManyCodes, ObsColumn
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.errors import ScfmError

VOCABULARY = Vocabulary.from_genes([Gene.of(None, "G")])


def store_of(codes: NDArray, names: list[str], parts: int = 1) -> CellStore:
    """Cells without genes, of groups."""
    n = len(codes)
    block = CellBlock(np.zeros(n + 1, np.int32), np.empty(0, np.uint16), np.empty(0, np.uint16))
    held = ManyCodes(np.array_split(codes, parts)) if parts > 1 else codes
    return CellStore(VOCABULARY, "counts", [block], {"tissue": ObsColumn(held, names)})


def mixed_codes(sizes: list[int], seed: int = 0) -> NDArray[np.int16]:
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int16)


def groups_of(sizes: list[int], rows: SomeRows | None = None, seed: int = 0) -> Groups:
    store = store_of(mixed_codes(sizes, seed), [f"t{i}" for i in range(len(sizes))])
    return Groups(store, "tissue", range(sum(sizes)) if rows is None else rows)


def order_of(sizes: list[int], power: float = 0.5, **how: Any) -> SampledOrder:
    groups = groups_of(sizes)
    settings = {"cells_per_batch": 40, "seed": 3, "block": 4, "window": 50} | how
    return SampledOrder(groups, shares_of(groups, power, {}, settings.pop("most", 10.0)), **settings)


@pytest.mark.parametrize("parts", [1, 7])
@pytest.mark.parametrize(
    "rows", [range(150_000), range(1000, 140_001), range(5, 150_000, 7), AllBut(150_000, np.arange(3, 90_000, 11))]
)
def test_a_cell_is_found_by_its_number_in_its_group(rows: SomeRows, parts: int) -> None:
    """Chunks, shards, cells without a value, and categories that nobody has."""
    rng = np.random.default_rng(1)
    codes = rng.choice(6, 150_000, p=[0.6, 0.2, 0.15, 0.0, 0.0498, 0.0002]).astype(np.int16) - 1
    groups = Groups(store_of(codes, [*"abcdef"], parts), "tissue", rows)
    assert groups.names == [NO_VALUE, "a", "b", "d", "e"]
    assert len(groups) == len(rows) == groups.sizes.sum()
    for group, code in enumerate([-1, 0, 1, 3, 4]):
        there = np.asarray(rows)[codes[np.asarray(rows)] == code]
        assert groups.sizes[group] == len(there)
        numbers = rng.permutation(len(there))[:500]
        np.testing.assert_array_equal(groups.find(np.full(len(numbers), group), numbers), there[numbers])


def test_a_column_that_is_not_there_is_named() -> None:
    with pytest.raises(ScfmError, match=r"data\.sample_by: .* no obs column 'organ', but \['tissue'\]"):
        Groups(store_of(mixed_codes([5]), ["t0"]), "organ", range(5))


def test_shares_follow_power_weights_and_the_cap() -> None:
    groups = groups_of([900, 90, 10])
    np.testing.assert_allclose(shares_of(groups, 1, {}, 1), [0.9, 0.09, 0.01])
    np.testing.assert_allclose(shares_of(groups, 0, {}, 100), [1 / 3, 1 / 3, 1 / 3])
    root = np.sqrt([900, 90, 10])
    np.testing.assert_allclose(shares_of(groups, 0.5, {}, 100), root / root.sum())
    np.testing.assert_allclose(shares_of(groups, 1, {"t1": 2.0}, 100), np.array([900, 180, 10]) / 1090)
    # 10 cells of 1,000 may be 5 % of what is read, 90 may be 45 %; the rest is the first group's
    np.testing.assert_allclose(shares_of(groups, 0, {}, 5), [0.5, 0.45, 0.05])
    np.testing.assert_allclose(shares_of(groups, 0, {}, 1), [0.9, 0.09, 0.01])
    with pytest.raises(ScfmError, match=r"data\.sample_weights: no training cells are of group 'eye'; .* t0, t1, t2"):
        shares_of(groups, 1, {"eye": 2.0}, 10)


sizes_strategy = st.lists(st.integers(1, 400), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(
    sizes=sizes_strategy,
    power=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    most=st.floats(1, 20),
    size=st.integers(1, 30),
)
def test_an_order_for_any_groups(sizes: list[int], power: float, seed: int, most: float, size: int) -> None:
    """Every cell of a group has been read as often as any other, or once more; batches are full; shares are met."""
    n = sum(sizes)
    size = min(size, n)
    order = order_of(sizes, power, seed=seed, cells_per_batch=size, most=most, block=3, window=20)
    assert len(order) == n // size
    code = mixed_codes(sizes)
    read = np.zeros(n, np.int64)
    epochs = 2
    for epoch in range(epochs):
        before = read.copy()
        for k in range(len(order)):
            rows, keys = order.drawn(epoch, range(k, k + 1))
            assert len(rows) == len(keys) == size
            np.add.at(read, rows, 1)
        for group, members in enumerate(sizes):
            times, in_epoch = read[code == group], (read - before)[code == group]
            assert times.max() - times.min() <= 1
            assert in_epoch.max() <= -(-in_epoch.sum() // members) + 1
    drawn = np.bincount(code, weights=read, minlength=len(sizes))
    assert np.abs(drawn - order.shares * read.sum()).max() <= len(sizes)


def test_no_cell_is_read_more_often_than_the_cap_says() -> None:
    sizes = [5000, 400, 20, 3]
    order = order_of(sizes, power=0, most=4.0)
    epochs = 5
    rows = np.concatenate([order.batch(epoch, k) for epoch in range(epochs) for k in range(len(order))])
    times = np.bincount(rows, minlength=sum(sizes))
    code = mixed_codes(sizes)
    for group in (1, 2, 3):
        assert times[code == group].max() <= 4 * epochs
        assert times[code == group].min() >= 4 * epochs * len(rows) / (epochs * sum(sizes)) - 1
    assert times[code == 0].max() <= 4


def test_a_group_that_is_read_less_than_once_an_epoch_comes_whole_in_the_end() -> None:
    order = order_of([4000, 500], power=0, most=10.0, window=10)  # the first group at 0.56 of its cells an epoch
    code = mixed_codes([4000, 500])
    rows = np.concatenate([order.batch(epoch, k) for epoch in range(2) for k in range(len(order))])
    times = np.bincount(rows[code[rows] == 0], minlength=4500)[code == 0]
    assert set(times.tolist()) == {1, 2}


def test_a_batch_is_nearer_to_the_shares_than_chance() -> None:
    """The variance of a group's cells in a batch, against that of independent draws."""
    sizes = [20_000, 4000, 900, 100]
    order = order_of(sizes, cells_per_batch=100)
    code = mixed_codes(sizes)
    counts = np.array([np.bincount(code[order.batch(0, k)], minlength=4) for k in range(len(order))])
    by_chance = 100 * order.shares * (1 - order.shares)
    assert (counts.var(0) < by_chance / 3).all()


def test_a_cell_that_comes_again_has_other_draws() -> None:
    order = order_of([600, 30], power=0, most=10.0)
    keys = np.concatenate([order.drawn(0, range(k, k + 1))[1] for k in range(len(order))])
    rows = np.concatenate([order.batch(0, k) for k in range(len(order))])
    assert len(np.unique(rows)) < len(rows)
    assert len(np.unique(keys)) == len(keys)
    first = keys < 2**40
    np.testing.assert_array_equal(keys[first], rows[first])


def test_batches_drawn_together_are_those_drawn_apart() -> None:
    order = order_of([1500, 600, 55], block=4, window=60)
    for ks in ahead.groups_of(order, 1):
        apart = [order.drawn(2, range(k, k + 1)) for k in ks]
        for together, alone in zip(order.drawn(2, ks), zip(*apart, strict=True), strict=True):
            np.testing.assert_array_equal(together, np.concatenate(alone))


def test_a_batch_depends_on_nothing_but_seed_epoch_and_number() -> None:
    order = order_of([600, 300, 30])
    expected = [order.batch(2, k).tolist() for k in range(len(order))]
    for k in (20, 3, 11):
        assert order_of([600, 300, 30]).batch(2, k).tolist() == expected[k]
    assert order_of([600, 300, 30], seed=4).batch(2, 0).tolist() != expected[0]
    assert order.batch(0, 0).tolist() != order.batch(1, 0).tolist()
    with pytest.raises(IndexError, match="batch 23 of an epoch of 23"):
        order.batch(0, 23)


def test_stages_hold_their_batches_and_nothing_else() -> None:
    order = order_of([1500, 600, 55], block=4, window=60)
    stages = {k: order.stages_of(k) for k in range(len(order))}
    assert len({stage for held in stages.values() for stage in held}) > 5
    for epoch in (0, 3):
        for stage in {stage for held in stages.values() for stage in held}:
            batches = [order.batch(epoch, k) for k in stages if stage in stages[k]]
            np.testing.assert_array_equal(order.rows_of_stage(epoch, stage), np.unique(np.concatenate(batches)))


def test_cells_of_a_group_are_read_in_blocks() -> None:
    """Neighbours in a group come in one stage, so that a run of rows is read once: but for the ends of stages."""
    store = store_of(np.repeat([0, 1], [8000, 2000]).astype(np.int16), ["a", "b"])
    groups = Groups(store, "tissue", range(10_000))
    order = SampledOrder(groups, np.array([0.5, 0.5]), 50, seed=0, block=50, window=20)
    runs = [1 + (np.diff(order.rows_of_stage(0, stage)) > 1).sum() for stage in range(10)]
    assert max(runs) <= 1000 / 50 + 4


def test_draws_add_up_at_every_moment_and_never_go_back() -> None:
    """Also where groups are due at the same time: equal shares and delays."""
    for shares, delays in (([0.25] * 4, [0.5] * 4), ([0.6, 0.3, 0.0999, 0.0001], [0.1, 0.9, 0.0, 0.7])):
        counts = [_draws_of_groups(t, np.array(shares), np.array(delays)) for t in range(2000)]
        assert [int(held.sum()) for held in counts] == list(range(2000))
        steps = np.diff(counts, axis=0)
        assert steps.min() == 0
        assert steps.max() == 1
    far = _draws_of_groups(10**12, np.array([0.6, 0.4]), np.array([0.2, 0.3]))
    assert far.sum() == 10**12
    assert abs(far[0] - 6 * 10**11) <= 2


def test_what_the_log_says() -> None:
    store = store_of(mixed_codes([900, 90, 10]), ["blood", "lung", "eye"])
    sampling = Sampling.of(store, range(1000), "tissue", 0.0, {}, 5.0, region=0)
    assert sampling.said == (
        "cells are sampled by tissue, 3 groups: blood is 90.0% of the cells and 50.0% of what is read; "
        "the 90 cells of lung come most often, 5 times an epoch"
    )


def test_shards_that_do_not_fit_into_the_cache_are_refused() -> None:
    store = store_of(mixed_codes([900, 90, 10]), ["blood", "lung", "eye"])
    with pytest.raises(ScfmError, match=r"data\.sample_by: .* data\.cache_gb"):
        Sampling.of(store, range(1000), "tissue", 0.5, {}, 5.0, region=300)


def test_fewer_cells_than_a_batch_name_the_key() -> None:
    with pytest.raises(ScfmError, match=r"data\.cells_per_batch: 512 .* only 30 cells"):
        order_of([20, 10], cells_per_batch=512)
