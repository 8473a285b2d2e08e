"""Raw cells come in the order of training, whatever the codec and however they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scfm.bench.cells import synthetic_block, synthetic_vocabulary
from scfm.data.order import CellOrder
from scfm.data.raw import raw_batches
from scfm.data.reading import MapReader, RunReader
from scfm.data.shards import ShardWriter, open_shards
from scfm.data.store import CellBlock, CellStore

GENES = 300


def cell(block: CellBlock, i: int) -> tuple[list[int], list[int]]:
    span = slice(block.offsets[i], block.offsets[i + 1])
    return block.genes[span].tolist(), block.values[span].tolist()


@pytest.mark.parametrize("codec", ["list", "packed"])
@pytest.mark.parametrize("reader", [None, MapReader, RunReader])
@pytest.mark.parametrize(("start", "threads"), [(0, 1), (7, 1), (0, 3)])
def test_all_cells_come_in_the_order_of_the_batches(
    tmp_path: Path, codec: Any, reader: Any, start: int, threads: int
) -> None:
    rng = np.random.default_rng(0)
    blocks = [synthetic_block(rng, n, 30, GENES) for n in (400, 260, 500)]
    blocks[1].values[0] = 70_000  # the others' types do not hold it
    writer = ShardWriter(tmp_path, synthetic_vocabulary(GENES), "counts", codec=codec)
    for block in blocks:
        writer.write(block, {})
    writer.finish()
    written = [cell(block, i) for block in blocks for i in range(block.n_cells)]
    store: CellStore = open_shards(tmp_path)
    order = CellOrder(range(store.n_cells), 24, seed=3, block=8, window=40)
    found = list(raw_batches(store, order, 1, None if reader is None else reader(store), start, threads))
    assert len(found) == len(order) - start
    for k, (rows, cells) in enumerate(found, start):
        assert rows.tolist() == order.batch(1, k).tolist()
        assert [cell(cells, i) for i in range(cells.n_cells)] == [written[row] for row in rows]


def test_batches_that_are_kept_stay_as_they_were(tmp_path: Path) -> None:
    """A reader uses its memory again, in the next epoch at the latest."""
    writer = ShardWriter(tmp_path, synthetic_vocabulary(GENES), "counts", codec="list")
    writer.write(synthetic_block(np.random.default_rng(0), 200, 30, GENES), {})
    writer.write(synthetic_block(np.random.default_rng(1), 200, 30, GENES), {})
    writer.finish()
    store = open_shards(tmp_path)
    reader, halves = RunReader(store), [range(200), range(200, 400)]
    orders = [CellOrder(rows, 100, seed=0, shuffle=False) for rows in halves]
    kept = [batch for order in orders for batch in raw_batches(store, order, 0, reader)]
    assert [rows.tolist() for rows, _ in kept] == [list(range(at, at + 100)) for at in range(0, 400, 100)]
    for rows, cells in kept:
        expected = [cell(block, place) for block, _, places in store.parts(rows) for place in places]
        assert [cell(cells, i) for i in range(cells.n_cells)] == expected
