"""Packed batches: the same global content at any world size and any number of threads."""

from __future__ import annotations

import gc
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scfm.data.batch import PackedBatch
from scfm.data.loader import PackLoader
from scfm.data.order import CellOrder
from scfm.data.packing import deal, filled_length
from scfm.data.store import CellBlock, CellStore
from scfm.data.tokens import TokenConfig, Tokeniser
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.errors import ScfmError

N_GENES, N_CELLS = 200, 150
VOCABULARY = Vocabulary.from_genes(Gene.of(None, f"G{i:03d}") for i in range(N_GENES))


@pytest.fixture(scope="module")
def store() -> CellStore:
    """150 cells of about 60 genes in three blocks; the last cell is empty."""
    generator = np.random.default_rng(0)
    blocks = []
    for n in (70, 50, 30):
        dense = generator.geometric(0.6, (n, N_GENES)) * (generator.random((n, N_GENES)) < 0.3)
        dense[-1] *= n != 30
        rows, genes = dense.nonzero()
        offsets = np.searchsorted(rows, np.arange(n + 1)).astype(np.int32)
        blocks.append(CellBlock(offsets, genes.astype(np.uint16), dense[rows, genes].astype(np.uint16)))
    return CellStore(VOCABULARY, "counts", blocks)


def loader_of(store: CellStore, tokens: TokenConfig | None = None, **settings: Any) -> PackLoader:
    order = settings.pop("order", CellOrder(range(N_CELLS), 32, seed=0))
    table = np.arange(len(VOCABULARY), dtype=np.int64) % 5
    tokeniser = Tokeniser(tokens or TokenConfig(max_genes=50), VOCABULARY, "counts", {"pathway": table})
    batch = np.arange(N_CELLS) % 3 + 1
    return PackLoader(
        store, order, tokeniser, **{"tokens_per_pack": 400, "cell_conditions": {"batch": batch}, **settings}
    )


def cells_of(batches: list[PackedBatch]) -> dict[int, tuple]:
    """What each real cell of some packs holds, by its store row."""
    held = {}
    for batch in batches:
        bounds = batch.cu_seqlens.tolist()
        for i, row in enumerate(batch.cell_id.tolist()):
            if row >= 0:
                tokens = slice(bounds[i], bounds[i + 1])
                assert row not in held, "a cell stands in two packs"
                assert batch.targets is not None
                held[row] = (
                    batch.genes[tokens].tolist(),
                    batch.values[tokens].tolist(),
                    batch.targets[tokens].tolist(),
                    batch.gene_conditions["pathway"][tokens].tolist(),
                    batch.n_known[i].item(),
                    batch.cell_conditions["batch"][i].item(),
                )
    return held


def test_packs_hold_the_cells_of_the_global_batch(store: CellStore) -> None:
    loader = loader_of(store)
    packs = loader.prepare(0, 1)
    assert sorted(cells_of(packs)) == sorted(loader.order.batch(0, 1).tolist())
    assert len(packs) > 1
    for pack in packs:
        assert pack.n_tokens <= 400
        assert pack.cu_seqlens[-1] == pack.n_tokens == len(pack.values)
        assert (pack.genes[pack.cu_seqlens[:-1].long()] == VOCABULARY.cls).all()
        assert (pack.n_known >= 1).all()
        assert (pack.values[pack.unknown_mask] == -1).all()
        assert (pack.values[~pack.unknown_mask] != -1).all()


def test_tensors_have_the_types_of_a_packed_batch(store: CellStore) -> None:
    pack = loader_of(store).prepare(0, 0)[0]
    assert pack.targets is not None
    names = ("genes", "values", "targets", "cu_seqlens", "n_known", "cell_id")
    types = {name: getattr(pack, name).dtype for name in names}
    assert types == {
        "genes": torch.int32,
        "values": torch.float32,
        "targets": torch.float32,
        "cu_seqlens": torch.int32,
        "n_known": torch.int32,
        "cell_id": torch.int64,
    }
    assert pack.gene_conditions["pathway"].dtype == pack.cell_conditions["batch"].dtype == torch.int64


def test_conditions_belong_to_their_cell_and_gene(store: CellStore) -> None:
    for row, (genes, _, _, pathways, _, batch) in cells_of(loader_of(store).prepare(0, 0)).items():
        assert batch == row % 3 + 1
        assert pathways == [gene % 5 for gene in genes]


def test_totals_are_those_of_the_global_batch(store: CellStore) -> None:
    packs = [pack for rank in range(3) for pack in loader_of(store, rank=rank, world_size=3).prepare(0, 2)]
    assert {pack.total_cells for pack in packs} == {32} == {sum(int(pack.real_cells.sum()) for pack in packs)}
    assert {pack.total_unknown for pack in packs} == {sum(len(pack.predicted) for pack in packs)}


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_any_world_size_sees_the_same_global_batches(store: CellStore, world_size: int) -> None:
    alone = loader_of(store)
    ranks = [loader_of(store, rank=rank, world_size=world_size) for rank in range(world_size)]
    for k in range(len(alone)):
        shares = [rank.prepare(3, k) for rank in ranks]
        assert len({len(share) for share in shares}) == 1, "ranks take different numbers of steps"
        assert cells_of([pack for share in shares for pack in share]) == cells_of(alone.prepare(3, k))


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (3, 2), (4, 9)])
def test_any_number_of_threads_delivers_the_same_in_order(store: CellStore, threads: int, prefetch: int) -> None:
    expected = loader_of(store)
    delivered = list(loader_of(store, threads=threads, prefetch=prefetch).batches(0))
    assert len(delivered) == len(expected) == 4
    for k, packs in enumerate(delivered):
        assert cells_of(packs) == cells_of(expected.prepare(0, k))


def test_an_epoch_can_be_entered_anywhere(store: CellStore) -> None:
    whole = [cells_of(packs) for packs in loader_of(store).batches(1)]
    assert [cells_of(packs) for packs in loader_of(store).batches(1, start=2)] == whole[2:]


def test_validation_reads_every_cell_in_order(store: CellStore) -> None:
    loader = loader_of(store, order=CellOrder(range(N_CELLS), 32, seed=0, shuffle=False))
    seen = [sorted(cells_of(packs)) for packs in loader.batches(0)]
    assert seen == [list(range(k, min(k + 32, N_CELLS))) for k in range(0, N_CELLS, 32)]


def test_keys_decide_the_draws_not_rows(store: CellStore) -> None:
    """Inference keys cells by their profile, so that the same cell in another file has the same tokens."""
    order, keys = CellOrder(range(N_CELLS), N_CELLS, seed=0, shuffle=False), np.arange(N_CELLS, dtype=np.uint64)
    by_row = cells_of(loader_of(store, order=order).prepare(0, 0))
    assert cells_of(loader_of(store, order=order, keys=keys).prepare(0, 0)) == by_row
    assert cells_of(loader_of(store, order=order, keys=keys + np.uint64(2**63)).prepare(0, 0)) != by_row


def test_where_nothing_is_hidden_there_are_no_targets(store: CellStore) -> None:
    packs = loader_of(store, TokenConfig(mask_ratios=(0,))).prepare(0, 0)
    assert all(pack.targets is None and pack.total_unknown == 0 for pack in packs)
    assert all((pack.n_known == pack.lengths).all() for pack in packs)


def test_a_rank_without_cells_gets_one_pseudo_cell(store: CellStore) -> None:
    order = CellOrder(range(2), 2, seed=0)
    shares = [loader_of(store, order=order, rank=rank, world_size=4).prepare(0, 0) for rank in range(4)]
    empty = [share[0] for share in shares if not share[0].real_cells.any()]
    assert len(empty) == 2
    for pack in empty:
        assert pack.genes.tolist() == [VOCABULARY.pad]
        assert pack.values.tolist() == [0]
        assert pack.cell_id.tolist() == [-1]
        assert pack.n_known.tolist() == [1]
        assert pack.cell_conditions["batch"].tolist() == [0]
        assert len(pack.predicted) == 0
        assert pack.total_cells == 2


def test_filled_packs_all_have_the_same_size(store: CellStore) -> None:
    """On every rank: the smallest multiple of 1/64 of the budget that holds the largest pack."""
    plain = [loader_of(store, rank=rank, world_size=2) for rank in range(2)]
    filled = [loader_of(store, rank=rank, world_size=2, fill_packs=True) for rank in range(2)]
    packs = [pack for loader in filled for pack in loader.prepare(0, 0)]
    bare = [pack for loader in plain for pack in loader.prepare(0, 0)]
    assert len({pack.n_tokens for pack in packs}) == 1
    largest = max(pack.n_tokens for pack in bare)
    assert largest <= packs[0].n_tokens < largest + 400 // 64
    assert cells_of(packs) == cells_of(bare)
    for pack in packs:
        for cell in (~pack.real_cells).nonzero()[:, 0].tolist():
            tokens = slice(int(pack.cu_seqlens[cell]), int(pack.cu_seqlens[cell + 1]))
            assert pack.n_known[cell] == 1
            assert (pack.genes[tokens] == VOCABULARY.pad).all()
            assert (pack.values[tokens] == 0).all()


def test_no_pseudo_cell_is_longer_than_a_cell_can_be(store: CellStore) -> None:
    """Attention costs the square of a cell's length, and kernels are compiled for the longest."""
    loader = loader_of(store, fill_packs=True)
    longest = loader.tokeniser.longest
    assert loader._rooms(10, 10 + 2 * longest + 3) == [longest, longest, 3]
    assert loader._rooms(10, 10) == []
    for pack in loader.prepare(0, 0):
        assert pack.longest == longest >= int(pack.lengths.max())


def test_less_than_two_percent_of_full_cells_packs_is_empty() -> None:
    """512 cells of 1,200 tokens, as published, at both usual budgets, on one and on eight GPUs."""
    lengths = np.full(512, 1200, np.int32)
    for budget in (65_536, 131_072):
        for world_size in (1, 8):
            plan = deal(lengths, world_size, budget)
            size = filled_length(lengths, plan, budget)
            assert 1 - lengths.sum() / (size * sum(map(len, plan))) < 0.02


def test_positions_travel_with_the_pack(store: CellStore) -> None:
    """Counting them on a GPU would make the host wait; the loader knows them."""
    for pack in loader_of(store, fill_packs=True).prepare(0, 0):
        again = replace(pack)  # without what the loader knows
        assert torch.equal(pack.predicted, again.predicted)
        assert torch.equal(pack.real_positions, again.real_positions)
        moved = pack.to("meta")
        assert moved.predicted.shape == pack.predicted.shape


def test_levels_are_all_that_a_value_can_be(store: CellStore) -> None:
    for pack in loader_of(store, fill_packs=True).prepare(0, 0):
        assert pack.levels is not None
        assert torch.isin(pack.values, pack.levels).all()


def test_an_error_in_a_thread_reaches_the_consumer(store: CellStore) -> None:
    batches = loader_of(store, tokens_per_pack=20).batches(0)
    with pytest.raises(ScfmError, match=r"data\.tokens_per_pack: 20 tokens cannot hold a cell"):
        next(batches)


@pytest.mark.parametrize("end", ["close", "garbage"])
def test_threads_end_with_the_iterator(store: CellStore, end: str) -> None:
    def running() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("scfm-loader")]

    assert not running()
    batches = loader_of(store, threads=2).batches(0)
    next(batches)
    assert running()
    if end == "close":
        batches.close()
    del batches
    gc.collect()
    assert not running()


def test_batches_are_prepared_ahead_but_not_without_bound(store: CellStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scfm.data.ahead.TOGETHER", 1)
    loader, prepared = loader_of(store, prefetch=2), []
    prepare = loader._prepare
    monkeypatch.setattr(
        loader, "_prepare", lambda epoch, ks, stages: (prepared.extend(ks), prepare(epoch, ks, stages))[1]
    )
    batches = loader.batches(0)
    next(batches)
    deadline = time.monotonic() + 10
    while len(prepared) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert prepared == [0, 1, 2]


def test_waiting_is_measured(store: CellStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scfm.data.ahead.TOGETHER", 1)
    loader = loader_of(store, prefetch=1)
    prepare = loader._prepare
    monkeypatch.setattr(loader, "_prepare", lambda *of_group: (time.sleep(0.05), prepare(*of_group))[1])
    assert loader.wait_seconds == 0
    list(loader.batches(0))
    assert 0.15 < loader.wait_seconds < 5


@pytest.mark.realdata
def test_real_cells_are_binned_like_numpy_does(shared: Path) -> None:
    import anndata

    from scfm.data.h5ad import H5adSource
    from scfm.data.sources import store_from_anndata

    path = shared / "data/pretrain/pbmc1k_v2_10x.h5ad"
    with H5adSource(path) as source:
        vocabulary = Vocabulary.from_genes(source.gene_list())
    adata = anndata.read_h5ad(path)[:150].copy()
    store = store_from_anndata(adata, vocabulary)
    assert store.value_kind == "counts"
    tokeniser = Tokeniser(TokenConfig(max_genes=20_000, mask_ratios=(0.5,)), vocabulary, store.value_kind)
    order = CellOrder(range(150), 64, seed=0, shuffle=False)
    seen = 0
    for packs in PackLoader(store, order, tokeniser, tokens_per_pack=20_001, threads=2).batches(0):
        for pack in packs:
            assert pack.targets is not None
            for row, targets in zip(pack.cell_id.tolist(), pack.targets.split(pack.lengths.tolist()), strict=True):
                counts = adata.X[row].toarray()[0]
                counts = counts[counts > 0]
                bins = np.digitize(counts, np.quantile(counts.astype(float), np.linspace(0, 1, 50)))
                assert sorted(targets[1:].tolist()) == sorted(bins.tolist())
                seen += 1
    assert seen == 150


@pytest.mark.parametrize("key", ["threads", "prefetch"])
def test_no_threads_or_no_prefetch_names_the_key(store: CellStore, key: str) -> None:
    with pytest.raises(ScfmError, match=rf"data\.{key}: 0"):
        loader_of(store, **{key: 0})
