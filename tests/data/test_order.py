"""Which cells make a global batch: each at most once per epoch, any batch found at once, well mixed."""

from __future__ import annotations

import time

import numpy as np
import pytest

from scfm.data.order import CellOrder
from scfm.errors import ScfmError


def epoch_rows(order: CellOrder, epoch: int) -> np.ndarray:
    return np.concatenate([order.batch(epoch, k) for k in range(len(order))])


@pytest.mark.parametrize("n", [8, 9, 63, 64, 65, 1000, 5003])
@pytest.mark.parametrize("block", [1, 4, 64])
@pytest.mark.parametrize("window", [1, 8])
def test_no_cell_comes_twice_and_only_the_last_few_wait(n: int, block: int, window: int) -> None:
    order = CellOrder(range(n), 8, seed=1, block=block, window=window)
    rows = epoch_rows(order, 0)
    assert len(rows) == n // 8 * 8 == 8 * len(order)
    assert len(set(rows.tolist())) == len(rows)
    assert rows.min() >= 0
    assert rows.max() < n


def test_a_batch_may_span_windows() -> None:
    order = CellOrder(range(1000), 500, seed=1, block=4, window=8)
    assert len(set(epoch_rows(order, 0).tolist())) == 1000


def test_a_batch_depends_on_nothing_but_seed_epoch_and_number() -> None:
    forward = CellOrder(range(1000), 32, seed=5, block=4, window=8)
    expected = [forward.batch(2, k) for k in range(len(forward))]
    for k in (30, 3, 17):
        assert CellOrder(range(1000), 32, seed=5, block=4, window=8).batch(2, k).tolist() == expected[k].tolist()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("ks", [range(3), range(1), range(5, 40), range(28, 40)])
def test_batches_drawn_together_are_those_drawn_apart(shuffle: bool, ks: range) -> None:
    order = CellOrder(range(990), 32, seed=5, block=4, window=20, shuffle=shuffle)
    ks = range(ks.start, min(ks.stop, len(order)))
    rows, keys = order.drawn(2, ks)
    assert rows.tolist() == np.concatenate([order.batch(2, k) for k in ks]).tolist() == keys.tolist()


def test_epochs_and_seeds_differ() -> None:
    order = CellOrder(range(1000), 100, seed=0)
    first = order.batch(0, 0).tolist()
    assert first != order.batch(1, 0).tolist()
    assert first != CellOrder(range(1000), 100, seed=1).batch(0, 0).tolist()


def test_the_cells_that_wait_change_with_the_epoch() -> None:
    order = CellOrder(range(103), 10, seed=0, block=4, window=4)
    waiting = [set(range(103)) - set(epoch_rows(order, epoch).tolist()) for epoch in range(200)]
    assert all(len(cells) == 3 for cells in waiting)
    times = np.bincount([cell for cells in waiting for cell in cells], minlength=103)
    assert times.min() > 0, "some cell was read in every epoch"
    assert times.max() < 20, "some cell waits far too often"


def test_unshuffled_rows_come_as_given_and_the_last_batch_is_kept() -> None:
    order = CellOrder(range(10), 4, seed=0, shuffle=False)
    assert [order.batch(7, k).tolist() for k in range(len(order))] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_unshuffled_nothing_is_no_batch() -> None:
    assert len(CellOrder(range(0), 4, seed=0, shuffle=False)) == 0


def test_rows_may_be_a_selection_of_the_store() -> None:
    chosen = np.array([3, 50, 51, 900, 12, 7], np.int64)
    assert sorted(epoch_rows(CellOrder(chosen, 2, seed=0), 0).tolist()) == sorted(chosen.tolist())
    stepped = CellOrder(range(10, 30, 5), 2, seed=0)
    assert sorted(epoch_rows(stepped, 0).tolist()) == [10, 15, 20, 25]


def test_rows_are_int64() -> None:
    assert CellOrder(range(10), 4, seed=0).batch(0, 0).dtype == np.int64


def test_fewer_cells_than_a_batch_name_the_key() -> None:
    with pytest.raises(ScfmError, match=r"data\.cells_per_batch: 512 .* only 100 cells"):
        CellOrder(range(100), 512, seed=0)


def test_past_the_end_is_an_index_error() -> None:
    with pytest.raises(IndexError, match="batch 10 of an epoch of 10"):
        CellOrder(range(100), 10, seed=0).batch(0, 10)


def test_batches_of_a_sorted_corpus_are_nearly_as_mixed_as_by_chance() -> None:
    """20 sources one after another: the entropy of the sources in a batch against that of truly random batches."""
    n, batch = 400_000, 512
    order = CellOrder(range(n), batch, seed=0)

    def entropy(rows: np.ndarray) -> float:
        share = np.bincount(rows * 20 // n, minlength=20) / len(rows)
        return float(-(share[share > 0] * np.log(share[share > 0])).sum())

    generator = np.random.default_rng(0)
    by_chance = np.mean([entropy(generator.integers(0, n, batch)) for _ in range(50)])
    ours = np.mean([entropy(order.batch(0, k)) for k in range(0, len(order), 16)])
    assert ours > 0.97 * by_chance


@pytest.mark.parametrize("region", [1, 30, 128, 300, 5000])
def test_regions_are_an_order_like_any_other(region: int) -> None:
    order = CellOrder(range(1003), 17, seed=1, block=4, window=8, region=region)
    assert len(set(epoch_rows(order, 0).tolist())) == 1003 // 17 * 17
    assert epoch_rows(order, 0).tolist() != epoch_rows(order, 1).tolist()


def test_seeking_in_a_hundred_million_cells_costs_nothing() -> None:
    order = CellOrder(range(100_000_000), 512, seed=1)
    order.batch(0, 0)
    started = time.perf_counter()
    for k in (0, 77_777, len(order) - 1):
        held = np.concatenate([order.rows_of_stage(3, stage) for stage in order.stages_of(k)])
        assert np.isin(order.batch(3, k), held).all()
    assert time.perf_counter() - started < 1
