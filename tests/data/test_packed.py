"""The packed codec: every cell comes back, takes few bytes, and is not read past its end where it is damaged."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.data.packed import BYTE, WORD, PackedBlock, pack
from scfm.data.store import CellBlock
from scfm.errors import ScfmError

N_GENES = 2**22
EDGES = [BYTE - 1, BYTE, BYTE + 1, WORD, BYTE + WORD - 1, BYTE + WORD, BYTE + WORD + 1]
counts = st.one_of(st.integers(1, 3), st.sampled_from([edge + 1 for edge in EDGES]), st.integers(1, 2**32 - 1))
gaps = st.one_of(st.integers(0, 3), st.sampled_from(EDGES))
cells = st.lists(st.lists(st.tuples(gaps, counts), max_size=40), max_size=12)


def block_of(rows: list[list[tuple[int, int]]]) -> CellBlock:
    """Cells from the gaps before their genes and their counts."""
    lengths = [len(row) for row in rows]
    genes = [np.cumsum([gap + 1 for gap, _ in row], dtype=np.int64) - 1 for row in rows]
    values = [count for row in rows for _, count in row]
    ids = np.concatenate([np.empty(0, np.int64), *genes]).astype(np.uint32)
    return CellBlock(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), ids, np.array(values, np.uint32))


def packed(block: CellBlock, n_genes: int = N_GENES) -> PackedBlock:
    starts, data = pack(block)
    kinds = np.dtype(np.uint32), np.dtype(np.uint32)
    return PackedBlock(starts, np.diff(block.offsets).astype(np.int32), data, *kinds, n_genes, lambda at: f"cell {at}")


def rows_of(block: CellBlock, places: np.ndarray) -> list[tuple[list[int], list[int]]]:
    spans = [slice(block.offsets[place], block.offsets[place + 1]) for place in places]
    return [(block.genes[span].tolist(), block.values[span].tolist()) for span in spans]


@given(cells, st.data())
@settings(deadline=None, max_examples=200)
def test_any_cells_come_back_in_any_order(rows: list[list[tuple[int, int]]], data: st.DataObject) -> None:
    block = block_of(rows)
    places = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=20)) if rows else [], np.int64)
    there = packed(block)
    back, inside = there.gather(places)
    assert rows_of(back, inside) == rows_of(block, places)
    assert there.lengths(places).tolist() == np.diff(block.offsets)[places].tolist()


@given(cells, st.integers(0, 12))
@settings(deadline=None)
def test_bytes_of_a_cell_do_not_depend_on_the_block(rows: list[list[tuple[int, int]]], at: int) -> None:
    whole, parts = pack(block_of(rows))[1], [pack(block_of(part))[1] for part in (rows[:at], rows[at:])]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_the_largest_counts_and_ids_fit() -> None:
    block = CellBlock(np.array([0, 2]), np.array([0, 2**22 - 1], np.uint32), np.array([2**32 - 1, 1], np.uint32))
    assert rows_of(*packed(block).gather(np.array([0]))) == [([0, 2**22 - 1], [2**32 - 1, 1])]


def test_a_typical_gene_takes_two_bytes() -> None:
    assert len(pack(block_of([[(12, 1)] * 1500]))[1]) == 3000


@pytest.mark.parametrize(("genes", "values"), [([3, 3], [1, 1]), ([3, 2], [1, 1]), ([2, 3], [1, 0])])
def test_what_cannot_be_packed_is_refused(genes: list[int], values: list[int]) -> None:
    wrong = CellBlock(np.array([0, 0, 2]), np.array(genes, np.uint16), np.array(values, np.uint16))
    with pytest.raises(ScfmError, match="cell 1: its gene ids do not ascend, or one of its counts is 0"):
        pack(wrong)


@given(st.lists(st.tuples(gaps, counts), min_size=1, max_size=20), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_damage_is_an_error_or_another_cell_but_never_an_id_out_of_range(
    row: list[tuple[int, int]], random: object
) -> None:
    block = block_of([row, row, row])
    there = packed(block, n_genes=int(block.genes.max()) + 1)
    at = random.randrange(len(there.data))  # type: ignore[attr-defined]
    there.data[at] ^= 1 << random.randrange(8)  # type: ignore[attr-defined]
    with contextlib.suppress(ScfmError):
        back, _ = there.gather(np.arange(3))
        assert back.genes.max() < there.n_genes


def test_a_cell_that_is_cut_off_is_named() -> None:
    there = packed(block_of([[(0, 1)], [(1, 700)], [(0, 1)]]))
    for lost in (1, 2, 3):
        cut = PackedBlock(
            there.starts - lost, there.sizes, there.data, there.genes, there.values, N_GENES, there.name_of
        )
        with pytest.raises(ScfmError, match="cell 0 is damaged"):
            cut.gather(np.array([0]))
    short = PackedBlock(there.starts, there.sizes, there.data[:4], there.genes, there.values, N_GENES, there.name_of)
    with pytest.raises(ScfmError, match="cell 1 is damaged"):
        short.gather(np.array([0, 1]))
