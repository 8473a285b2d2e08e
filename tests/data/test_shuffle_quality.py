"""How well batches mix a corpus that was not shuffled: the entropy of their cells' sources against a true shuffle."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from scfm.bench.cells import synthetic_vocabulary
from scfm.data.order import CellOrder, mixing_of
from scfm.data.sampling import SampledOrder, Sampling
from scfm.data.shards import ShardWriter, open_shards
from scfm.data.store import CellBlock, CellStore

CELLS, SOURCES, PER_SHARD = 600_000, 24, 100_000


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> CellStore:
    """Six shards as `--keep-order` leaves them: sources of 1,000 to 90,000 cells one after another, one gene a cell."""
    folder = tmp_path_factory.mktemp("shards")
    sizes = np.random.default_rng(0).lognormal(0, 1, SOURCES)
    source = np.searchsorted(np.cumsum(sizes / sizes.sum()), np.arange(CELLS) / CELLS).astype(np.int16)
    names = [f"source {i}" for i in range(SOURCES)]
    writer = ShardWriter(folder, synthetic_vocabulary(5), "counts", {"source": names})
    ones = np.ones(PER_SHARD, np.uint16)
    for codes in np.split(source, CELLS // PER_SHARD):
        block = CellBlock(np.arange(PER_SHARD + 1, dtype=np.int32), ones, ones)
        writer.write(block, {"source": codes})
    writer.finish()
    return open_shards(folder)


def entropy(codes: NDArray) -> float:
    share = np.bincount(codes) / len(codes)
    return float(-(share[share > 0] * np.log(share[share > 0])).sum())


def quality(codes: NDArray, order: CellOrder, epoch: int = 0) -> float:
    """Return the mean entropy of batches as a share of that of true random batches of the same size."""
    generator, size = np.random.default_rng(1), order.cells_per_batch
    chance = np.mean([entropy(codes[generator.choice(CELLS, size, replace=False)]) for _ in range(150)])
    picked = np.linspace(0, len(order) - 1, 150).astype(int)  # from all windows
    return float(np.mean([entropy(codes[order.batch(epoch, k)]) for k in picked]) / chance)


@pytest.mark.parametrize("size", [64, 512, 2048])
def test_batches_of_an_unshuffled_corpus_are_as_mixed_as_a_true_shuffle(kept: CellStore, size: int) -> None:
    codes = np.asarray(kept.obs["source"].codes)
    found = quality(codes, CellOrder(range(CELLS), size, 0, True, *mixing_of(kept.shuffled)))
    print(f"batches of {size}: {found:.2%} of the entropy of a true shuffle")
    assert 0.95 <= found < 1.01


def test_the_measure_tells_a_poor_shuffle(kept: CellStore) -> None:
    """Blocks that hardly mix, and cells that do not mix at all."""
    codes = np.asarray(kept.obs["source"].codes)
    assert quality(codes, CellOrder(range(CELLS), 512, seed=0, window=8)) < 0.8
    assert quality(codes, CellOrder(range(CELLS), 512, seed=0, shuffle=False)) < 0.1


def test_sampled_batches_are_as_mixed_as_independent_draws_with_the_same_shares(kept: CellStore) -> None:
    sampling = Sampling.of(kept, range(CELLS), "source", 0.5, {}, 10.0, region=0)
    order = SampledOrder(sampling.groups, sampling.shares, 512, seed=0)
    codes = np.asarray(kept.obs["source"].codes)
    generator = np.random.default_rng(1)
    chance = np.mean([entropy(generator.choice(len(sampling.shares), 512, p=sampling.shares)) for _ in range(150)])
    ours = np.mean([entropy(codes[order.batch(0, k)]) for k in range(0, len(order), 8)])
    print(f"sampled: {ours / chance:.2%}")
    assert 0.95 <= ours / chance < 1.03
