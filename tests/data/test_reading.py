"""Maps and reads deliver the same cells; what is read ahead is what the order asks for, and no more is held."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest

from scfm.bench.cells import synthetic_block, synthetic_vocabulary
from scfm.data import access
from scfm.data.access import choose
from scfm.data.ahead import Stages
from scfm.data.loader import PackLoader
from scfm.data.order import CellOrder, mixing_of
from scfm.data.reading import Loaded, MapReader, RunReader, _runs
from scfm.data.shards import Codec, ShardWriter, open_shards
from scfm.data.store import CellStore, Rows
from scfm.data.tokens import TokenConfig, Tokeniser
from scfm.errors import ScfmError

GENES = 400
SIZES = (310, 290, 400)


@pytest.fixture(params=["list", "packed"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> CellStore:
    """Three shards, the last with counts that the others' types do not hold."""
    return open_shards(written(tmp_path, request.param))


def written(folder: Path, codec: Codec) -> Path:
    rng = np.random.default_rng(0)
    writer = ShardWriter(folder, synthetic_vocabulary(GENES), "counts", codec=codec)
    for i, size in enumerate(SIZES):
        block = synthetic_block(rng, size, 40, GENES)
        block.values[0] = 3 if i < 2 else 70_000
        writer.write(block, {})
    writer.finish()
    return folder


def cells_of(rows_in: Rows, rows: np.ndarray) -> list[tuple[list[int], list[int]]]:
    found: list[Any] = [None] * len(rows)
    for block, cells, places in rows_in.parts(rows):
        for cell, place in zip(cells, places, strict=True):
            span = slice(block.offsets[place], block.offsets[place + 1])
            found[cell] = (block.genes[span].tolist(), block.values[span].tolist())
    return found


def small_order(n: int, **how: Any) -> CellOrder:
    return CellOrder(range(n), 24, seed=3, block=8, window=10, **how)


def loader_of(store: CellStore, **how: Any) -> PackLoader:
    tokeniser = Tokeniser(TokenConfig(max_genes=30), store.vocabulary, store.value_kind)
    return PackLoader(store, small_order(store.n_cells), tokeniser, tokens_per_pack=400, **how)


@pytest.mark.parametrize("picked", [[0], [0, 1, 2], [5, 30, 31, 309, 310, 311, 700, 999], range(1000)])
def test_rows_that_are_read_are_those_that_are_mapped(store: CellStore, picked: Any) -> None:
    rows = np.array(picked, np.int64)
    loaded = RunReader(store).load(rows)
    mixed = np.random.default_rng(1).permutation(rows)
    assert cells_of(loaded, mixed) == cells_of(store, mixed)
    assert loaded.n_genes(mixed).tolist() == store.n_genes(mixed).tolist()


def test_shuffled_shards_are_read_in_fewer_and_larger_runs(tmp_path: Path) -> None:
    """Their neighbours are a fair sample; as many cells are held at a time."""
    runs: dict[bool, int] = {}
    for shuffled in (False, True):
        (tmp_path / str(shuffled)).mkdir()
        writer = ShardWriter(tmp_path / str(shuffled), synthetic_vocabulary(100), "counts")
        writer.write(synthetic_block(np.random.default_rng(0), 60_000, 3, 100), {})
        writer.finish(shuffled=shuffled)
        store = open_shards(tmp_path / str(shuffled))
        order = CellOrder(range(store.n_cells), 64, 0, True, *mixing_of(store.shuffled))
        assert order.cells_per_stage == 16_384
        runs[shuffled] = len(_runs(store, order.rows_of_stage(0, 1)))
    assert runs[True] <= 65
    assert runs[False] > 300


def test_a_row_that_was_not_loaded_is_an_error(store: CellStore) -> None:
    loaded = RunReader(store).load(np.array([5, 6]))
    with pytest.raises(KeyError):
        loaded.n_genes(np.array([200]))


def test_memory_that_was_given_back_is_used_again(store: CellStore) -> None:
    reader = RunReader(store)
    first = reader.load(np.arange(400))
    memory = {id(array) for array in first.memory}
    reader.release(first)
    assert {id(array) for array in reader.load(np.arange(300)).memory} <= memory


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("rows", [range(1000), range(100, 1000, 2), np.arange(0, 999, 3)])
def test_stages_hold_the_rows_of_their_batches(rows: Any, shuffle: bool) -> None:
    order = CellOrder(rows, 24, seed=3, block=8, window=10, shuffle=shuffle)
    for epoch in (0, 1):
        stages = {stage for k in range(len(order)) for stage in order.stages_of(k)}
        held = {stage: order.rows_of_stage(epoch, stage) for stage in stages}
        every = np.concatenate([held[stage] for stage in sorted(stages)])
        np.testing.assert_array_equal(np.sort(every), np.asarray(rows))
        for k in range(len(order)):
            there = np.concatenate([held[stage] for stage in order.stages_of(k)])
            assert np.isin(order.batch(epoch, k), there).all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", [MapReader, RunReader])
@pytest.mark.parametrize("start", [0, 17])
def test_batches_do_not_depend_on_how_cells_are_read(store: CellStore, kind: Any, threads: int, start: int) -> None:
    plain = list(loader_of(store).batches(2, start))
    read = list(loader_of(store, reader=kind(store), threads=threads).batches(2, start))
    assert len(plain) == len(read) == 1000 // 24 - start
    for ours, theirs in zip(plain, read, strict=True):
        for pack, other in zip(ours, theirs, strict=True):
            assert pack.genes.equal(other.genes)
            assert pack.values.equal(other.values)
            assert pack.cell_id.equal(other.cell_id)


@pytest.mark.parametrize("threads", [1, 2])
def test_few_stages_are_held(store: CellStore, threads: int) -> None:
    """Two, and one more for each further thread: it may be ahead by a batch of the next stages."""
    held, most, counting = 0, 0, Lock()  # a stage is loaded in a thread of its own, and released in another

    class Counting(RunReader):
        def load(self, rows: np.ndarray) -> Loaded:
            nonlocal held, most
            with counting:
                held += 1
                most = max(most, held)
            return super().load(rows)

        def release(self, loaded: Rows) -> None:
            nonlocal held
            with counting:
                held -= 1
            super().release(loaded)

    for _ in loader_of(store, reader=Counting(store), threads=threads, prefetch=1).batches(0):
        pass
    assert held == 0
    assert 2 <= most <= 1 + threads


def test_a_stage_is_read_once(store: CellStore, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    of = CellOrder.rows_of_stage
    monkeypatch.setattr(CellOrder, "rows_of_stage", lambda self, epoch, s: (asked.append(s), of(self, epoch, s))[1])
    for _ in loader_of(store, reader=RunReader(store), threads=2).batches(0):
        pass
    assert sorted(asked) == sorted(set(asked)) == list(range(12))


@pytest.mark.parametrize("kind", [MapReader, RunReader])
def test_a_file_that_is_cut_off_after_it_was_opened_is_named(tmp_path: Path, kind: Any) -> None:
    store = open_shards(written(tmp_path, "packed"))
    path = tmp_path / "shards/00001.arrow"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ScfmError, match=r"00001\.arrow: 3,000 bytes, but [\d,]+ when it was opened"):
        list(loader_of(store, reader=kind(store)).batches(0))


def test_a_damaged_cell_is_named_in_training(tmp_path: Path) -> None:
    store = open_shards(written(tmp_path, "packed"))
    path, start = store.files[1].path, store.files[1].starts[0]
    content = bytearray(path.read_bytes())
    content[start + int(store.blocks[1].starts[7])] = 255  # type: ignore[attr-defined]
    path.write_bytes(content)
    for reader in (None, RunReader(open_shards(tmp_path))):
        with pytest.raises(ScfmError, match=r"00001\.arrow: cell 7 is damaged"):
            list(loader_of(open_shards(tmp_path), reader=reader).batches(0))


def test_maps_are_for_data_that_fit_in_half_of_the_memory(store: CellStore, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(file.path.stat().st_size for file in store.files)
    for memory, kind in ((2 * size, MapReader), (2 * size - 1, RunReader)):
        monkeypatch.setattr(access, "memory_bytes", lambda memory=memory: memory)
        assert isinstance(choose(store, "auto").reader, kind)
    assert isinstance(choose(store, "map").reader, MapReader)
    assert choose(store, "read").said == "cells are read by reads of whole runs of cells (data.read: read)"


def test_many_shards_are_read_into_one_buffer(store: CellStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "MOST_MAPPED", 2)
    assert isinstance(choose(store, "auto").reader, RunReader)


def test_memory_does_not_grow_over_an_epoch(tmp_path: Path) -> None:
    """What the process holds after the first stages is what it holds at the end, within a few buffers."""
    writer = ShardWriter(tmp_path, synthetic_vocabulary(5000), "counts", codec="packed")
    block = synthetic_block(np.random.default_rng(0), 2000, 200, 5000)
    for _ in range(8):
        writer.write(block, {})
    writer.finish()
    store = open_shards(tmp_path)
    for reader in (MapReader(store), RunReader(store)):
        tokeniser = Tokeniser(TokenConfig(max_genes=150), store.vocabulary, store.value_kind)
        order = CellOrder(range(store.n_cells), 100, seed=0, window=16)  # half a MB a stage, 16 stages
        loader = PackLoader(store, order, tokeniser, tokens_per_pack=16_384, reader=reader)
        held = [private_bytes() for k, _ in enumerate(loader.batches(0)) if k % 20 == 19]
        assert max(held[3:]) - max(held[:3]) < 2e6  # an epoch reads 7 MB, and makes 29 MB of tokens


def private_bytes() -> int:
    """What the process alone holds: not the pages of maps, which the kernel takes back as it likes."""
    said = Path("/proc/self/smaps_rollup").read_text()
    return int(said.split("Private_Dirty:")[1].split()[0]) * 1024


def test_memory_is_that_of_the_machine_at_most() -> None:
    assert 2**28 < access.memory_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_cells_in_memory_cannot_be_read_from_files() -> None:
    there = CellStore(synthetic_vocabulary(3), "counts", [])
    assert choose(there, "auto").reader is None
    with pytest.raises(ScfmError, match=r"data\.read: read needs shards on disk"):
        choose(there, "read")


def test_an_iterator_that_is_left_ends_its_reads(store: CellStore) -> None:
    stages = Stages(small_order(store.n_cells), 0, RunReader(store))
    stages.of(0)
    stages.close()
    with pytest.raises(RuntimeError):
        stages.of(30)
