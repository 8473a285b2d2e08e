"""A run that goes on with other threads, ranks or reads sees what it would have seen: no cell lost, none twice."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from scfm.bench.cells import synthetic_block, synthetic_vocabulary
from scfm.data.batch import PackedBatch
from scfm.data.order import CellOrder
from scfm.data.shards import ShardWriter, open_shards
from scfm.data.store import CellStore
from scfm.data.tokens import TokenConfig, Tokeniser
from scfm.errors import ScfmError
from scfm.recipe import DataConfig
from scfm.training.datamodule import CellDataModule

SIZES, TISSUES = (310, 290, 400), ["blood", "lung", "eye"]
N_TRAIN = 950
PLAIN = DataConfig(cells_per_batch=24, tokens_per_pack=400)
SAMPLED = replace(PLAIN, sample_by="tissue", sample_power=0.0, sample_repeats=6.0)
ORDERS = {"plain": PLAIN, "sampled": SAMPLED}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CellStore:
    """Three packed shards on disk; most cells are blood."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("shards")
    writer = ShardWriter(folder, synthetic_vocabulary(300), "counts", {"tissue": TISSUES}, codec="packed")
    for size in SIZES:
        tissue = rng.choice(3, size, p=[0.85, 0.12, 0.03]).astype(np.int16)
        writer.write(synthetic_block(rng, size, 40, 300), {"tissue": tissue})
    writer.finish()
    return open_shards(folder)


def module(store: CellStore, config: DataConfig, step: int = 0, rank: int = 0, world_size: int = 1) -> CellDataModule:
    """What one process of a run has after so many steps; the trainer is all that a loader asks of it."""
    tokeniser = Tokeniser(TokenConfig(max_genes=30), store.vocabulary, store.value_kind)
    data = CellDataModule(store, tokeniser, config, range(N_TRAIN), range(N_TRAIN, 1000), {}, seed=5)
    data.trainer = SimpleNamespace(global_step=step, global_rank=rank, world_size=world_size)  # type: ignore[assignment]
    return data


def contents(packs: list[PackedBatch]) -> Counter[tuple]:
    """Each real cell of some packs with all its tokens; a cell that is sampled may stand there twice."""
    held: Counter[tuple] = Counter()
    for pack in packs:
        assert pack.targets is not None
        bounds = pack.cu_seqlens.tolist()
        for i, row in enumerate(pack.cell_id.tolist()):
            if row >= 0:
                tokens = slice(bounds[i], bounds[i + 1])
                arrays = (pack.genes[tokens], pack.values[tokens], pack.targets[tokens])
                held[row, pack.n_known[i].item(), *(array.numpy().tobytes() for array in arrays)] += 1
    return held


def delivered(store: CellStore, config: DataConfig, begin: int, end: int, world_size: int = 1) -> list[Counter[tuple]]:
    """The global batches of some steps as a run gets them that resumes at `begin`: the packs of all ranks joined."""
    shares = []
    for rank in range(world_size):
        batches = iter(module(store, config, begin, rank, world_size).train_dataloader())
        shares.append([next(batches) for _ in range(begin, end)])
        batches.close()  # type: ignore[attr-defined]
    assert len({tuple(map(len, share)) for share in shares}) == 1, "ranks take different numbers of steps"
    return [sum(map(contents, packs), Counter()) for packs in zip(*shares, strict=True)]


@pytest.fixture(scope="module", params=["plain", "sampled"])
def unbroken(store: CellStore, request: pytest.FixtureRequest) -> tuple[DataConfig, list[Counter[tuple]]]:
    """50 steps, an epoch and a quarter, on one process and one thread by memory map."""
    config = ORDERS[request.param]
    return config, delivered(store, config, 0, 50)


@pytest.mark.parametrize("stop", [17, 39, 41])
@pytest.mark.parametrize(
    ("world_size", "change"),
    [(1, {"threads": 2}), (1, {"read": "read"}), (2, {}), (4, {"threads": 2, "read": "read", "prefetch": 1})],
)
def test_another_way_goes_on_to_the_bit(
    store: CellStore, unbroken: tuple[DataConfig, list[Counter[tuple]]], stop: int, world_size: int, change: Any
) -> None:
    """39 is the end of the first epoch."""
    config, expected = unbroken
    assert delivered(store, replace(config, **change), stop, stop + 8, world_size) == expected[stop : stop + 8]


@pytest.mark.parametrize("order", ORDERS)
def test_world_sizes_that_change_in_an_epoch_lose_no_cell_and_repeat_none(store: CellStore, order: str) -> None:
    config, read = ORDERS[order], Counter[int]()
    for begin, end, world_size in ((0, 10, 1), (10, 15, 4), (15, 16, 2), (16, 39, 3)):
        for batch in delivered(store, config, begin, end, world_size):
            read.update(Counter(row for row, *_ in batch.elements()))
    assert sum(read.values()) == 39 * 24
    assert max(read) < N_TRAIN
    if order == "plain":
        assert len(read) == 39 * 24
        return
    codes, times = store.obs["tissue"].codes[np.arange(N_TRAIN)], np.array([read[row] for row in range(N_TRAIN)])
    for group in range(3):
        assert times[codes == group].max() - times[codes == group].min() <= 1
    assert times[codes == 2].min() >= 5


def test_cells_that_come_again_in_an_epoch_are_masked_anew(
    store: CellStore, unbroken: tuple[DataConfig, list[Counter[tuple]]]
) -> None:
    config, batches = unbroken
    seen = sum(batches[:39], Counter())
    assert max(seen.values()) == 1
    rows = {row for row, *_ in seen}
    assert (len(rows) < len(seen)) == (config is SAMPLED)


def test_cells_that_were_read_in_other_blocks_cannot_resume(store: CellStore) -> None:
    """Shuffled shards are read in larger blocks: that is another order of the same cells."""
    state, shuffled = module(store, PLAIN).state_dict(), module(replace(store, shuffled=True), PLAIN)
    order = shuffled.train_dataloader().packs.order
    assert isinstance(order, CellOrder)
    assert (order.block, order.window) == (256, 64)
    with pytest.raises(ScfmError, match="trained with cells read together 32, this run has 256"):
        shuffled.load_state_dict(state)
    older = {name: value for name, value in state.items() if name != "cells read together"}
    with pytest.raises(ScfmError, match="does not say its cells read together: an earlier scfm wrote it"):
        module(store, PLAIN).load_state_dict(older)


@pytest.mark.parametrize("other", [PLAIN, replace(SAMPLED, sample_power=0.5), replace(SAMPLED, sample_repeats=2.0)])
def test_another_sampling_cannot_resume(store: CellStore, other: DataConfig) -> None:
    state = module(store, SAMPLED, step=7).state_dict()
    assert state["batches"] == 7
    module(store, replace(SAMPLED, threads=2, read="read")).load_state_dict(state)
    with pytest.raises(ScfmError, match=r"trained with sampling by tissue to the power 0, .* this run has"):
        module(store, other).load_state_dict(state)
