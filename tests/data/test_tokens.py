"""Cells become tokens: <cls>, known genes, unknown genes; the same whatever else is in the batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tokenised import N_GENES, VOCABULARY, store_of, tokens_of

from scfm.data.store import CellBlock, CellStore
from scfm.data.tokens import TokenConfig, Tokeniser
from scfm.errors import ScfmError

PLAIN = TokenConfig(mask_ratios=(0,))


def bins_by_numpy(row: np.ndarray, n_bins: int = 51) -> np.ndarray:
    bins = np.zeros(len(row), int)
    expressed = row[row > 0]
    if expressed.size:
        bins[row > 0] = np.digitize(expressed, np.quantile(expressed.astype(float), np.linspace(0, 1, n_bins - 1)))
    return bins


@pytest.fixture(scope="module")
def cells() -> np.ndarray:
    """(40, 300) counts; cell 3 is empty, cell 5 expresses every gene."""
    generator = np.random.default_rng(0)
    dense = (generator.geometric(0.6, (40, N_GENES)) * (generator.random((40, N_GENES)) < 0.5)).astype(np.uint16)
    dense[3] = 0
    dense[5] += 1
    dense[6, dense[6].argmax()] = 5000
    return dense


def test_without_sampling_or_masking_the_genes_come_in_order_with_their_bins(cells: np.ndarray) -> None:
    for row, tokens in enumerate(tokens_of(PLAIN, store_of(cells), list(range(40)))):
        expressed = np.flatnonzero(cells[row])
        assert tokens.genes.tolist() == [VOCABULARY.cls, *expressed]
        assert tokens.values.tolist() == [-2.0, *bins_by_numpy(cells[row])[expressed]]
        assert tokens.targets.tolist() == tokens.values.tolist()


def test_an_empty_cell_is_just_cls(cells: np.ndarray) -> None:
    (tokens,) = tokens_of(TokenConfig(mask_ratios=(0.5,)), store_of(cells), [3])
    assert tokens.genes.tolist() == [VOCABULARY.cls]
    assert tokens.n_unknown == 0


@pytest.mark.parametrize("max_genes", [20, 1199])
@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.9])
def test_known_genes_come_first_and_unknown_ones_hide_their_value(
    cells: np.ndarray, max_genes: int, ratio: float
) -> None:
    config = TokenConfig(max_genes=max_genes, mask_ratios=(ratio,), cls_value=-7, mask_value=-5)
    for row, tokens in enumerate(tokens_of(config, store_of(cells), list(range(40)))):
        expressed = np.flatnonzero(cells[row])
        kept = min(len(expressed), max_genes)
        assert tokens.n_unknown == int(kept * ratio)
        assert tokens.genes[0] == VOCABULARY.cls
        assert tokens.values[0] == tokens.targets[0] == -7
        known, unknown = np.split(tokens.genes[1:], [kept - tokens.n_unknown])
        assert (np.diff(known) > 0).all()
        assert (np.diff(unknown) > 0).all()
        chosen = {*known, *unknown}
        assert len(chosen) == kept
        assert chosen <= set(expressed)
        assert tokens.targets[1:].tolist() == bins_by_numpy(cells[row])[tokens.genes[1:]].tolist()
        assert tokens.values[1:][: len(known)].tolist() == tokens.targets[1:][: len(known)].tolist()
        assert (tokens.values[1:][len(known) :] == -5).all()


def test_a_cell_has_the_same_tokens_alone_among_others_and_in_any_blocks(cells: np.ndarray) -> None:
    config = TokenConfig(max_genes=100, tie_policy="random")
    together = tokens_of(config, store_of(cells), list(range(40)))
    scattered = tokens_of(config, store_of(cells, blocks=7), list(range(39, -1, -1)))[::-1]
    for row in range(40):
        (alone,) = tokens_of(config, store_of(cells), [row])
        for other in (together[row], scattered[row]):
            assert alone.genes.tolist() == other.genes.tolist()
            assert alone.values.tolist() == other.values.tolist()
            assert alone.targets.tolist() == other.targets.tolist()


def test_blocks_may_store_different_types(cells: np.ndarray) -> None:
    small = np.minimum(cells, 200)
    block = store_of(small[:20]).blocks[0]
    narrow = CellBlock(block.offsets, block.genes.astype(np.uint32), block.values.astype(np.uint8))
    mixed = CellStore(VOCABULARY, "counts", [narrow, store_of(small[20:]).blocks[0]])
    config = TokenConfig(max_genes=100)
    for one, other in zip(
        tokens_of(config, store_of(small), [19, 25, 2]), tokens_of(config, mixed, [19, 25, 2]), strict=True
    ):
        assert one.genes.tolist() == other.genes.tolist()
        assert one.targets.tolist() == other.targets.tolist()


@pytest.mark.parametrize("what", [{"epoch": 1}, {"seed": 1}])
def test_another_epoch_or_seed_draws_anew(cells: np.ndarray, what: dict[str, int]) -> None:
    config = TokenConfig(max_genes=100, seed=what.get("seed", 0))
    (before,) = tokens_of(TokenConfig(max_genes=100), store_of(cells), [5])
    (after,) = tokens_of(config, store_of(cells), [5], epoch=what.get("epoch", 0))
    assert before.genes.tolist() != after.genes.tolist()


def test_every_gene_is_kept_and_hidden_equally_often(cells: np.ndarray) -> None:
    config, epochs = TokenConfig(max_genes=120, mask_ratios=(0.5,)), 2000
    known, unknown = np.zeros(N_GENES), np.zeros(N_GENES)
    for epoch in range(epochs):
        (tokens,) = tokens_of(config, store_of(cells[5:6]), [0], epoch)
        known[tokens.genes[1:61]] += 1
        unknown[tokens.genes[61:]] += 1
    expected = epochs * 60 / N_GENES
    for seen in (known, unknown):
        deviation = (seen - expected) / np.sqrt(expected * (1 - 60 / N_GENES))
        assert np.abs(deviation).max() < 4.5
        assert abs(np.square(deviation).mean() - 1) < 0.3


def test_neighbouring_genes_are_hidden_independently(cells: np.ndarray) -> None:
    """Two draws come from one word; the second must not follow the first."""
    config, epochs = TokenConfig(mask_ratios=(0.5,)), 2000
    hidden = np.zeros((epochs, N_GENES))
    for epoch in range(epochs):
        (tokens,) = tokens_of(config, store_of(cells[5:6]), [0], epoch)
        hidden[epoch, tokens.genes[1 + N_GENES - tokens.n_unknown :]] = 1
    correlation = np.corrcoef(hidden.T)
    pairs = np.array([correlation[t, t + 1] for t in range(N_GENES - 1)])
    assert abs(pairs[::2].mean()) < 0.02
    assert abs(pairs[1::2].mean()) < 0.02


def test_mask_ratios_are_drawn_per_cell_equally_often(cells: np.ndarray) -> None:
    ratios = (0.0, 0.25, 0.5)
    counts = [tokens_of(TokenConfig(mask_ratios=ratios), store_of(cells), [5], epoch)[0] for epoch in range(600)]
    seen = [sum(tokens.n_unknown == int(N_GENES * ratio) for tokens in counts) for ratio in ratios]
    assert sum(seen) == 600
    assert min(seen) > 150
    several = tokens_of(TokenConfig(mask_ratios=ratios), store_of(cells), list(range(40)))
    assert len({tokens.n_unknown / max(len(tokens.genes) - 1, 1) > 0.4 for tokens in several}) == 2


def test_bins_refer_to_the_whole_cell_not_to_the_sampled_genes(cells: np.ndarray) -> None:
    (tokens,) = tokens_of(replace(PLAIN, max_genes=10), store_of(cells), [6])
    assert len(tokens.genes) == 11
    assert tokens.values[1:].tolist() == bins_by_numpy(cells[6])[tokens.genes[1:]].tolist()


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_all_genes_read_the_unexpressed_ones_as_bin_zero(cells: np.ndarray, dtype: type) -> None:
    store = store_of(cells.astype(dtype))
    for row, tokens in zip((0, 3, 5), tokens_of(replace(PLAIN, genes="all"), store, [0, 3, 5]), strict=True):
        assert tokens.genes.tolist() == [VOCABULARY.cls, *range(N_GENES)]
        assert tokens.values[1:].tolist() == bins_by_numpy(cells[row]).tolist()


def test_all_genes_can_be_sampled_and_hidden(cells: np.ndarray) -> None:
    config = TokenConfig(genes="all", max_genes=50, mask_ratios=(0.5,))
    (tokens,) = tokens_of(config, store_of(cells), [0])
    assert len(set(tokens.genes[1:])) == 50
    assert tokens.n_unknown == 25
    assert tokens.targets[1:].tolist() == bins_by_numpy(cells[0])[tokens.genes[1:]].tolist()


@pytest.mark.parametrize("tie_policy", ["left", "random"])
def test_normalised_values_are_binned_like_the_counts_they_came_from(cells: np.ndarray, tie_policy: str) -> None:
    config = replace(PLAIN, tie_policy=tie_policy)
    doubled = store_of(cells.astype(np.float32) * 2)
    rows = list(range(40))
    for counts, reals in zip(tokens_of(config, store_of(cells), rows), tokens_of(config, doubled, rows), strict=True):
        assert counts.values.tolist() == reals.values.tolist()


def test_random_ties_come_from_the_key(cells: np.ndarray) -> None:
    config = replace(PLAIN, tie_policy="random")
    twice = [tokens_of(config, store_of(cells), [0])[0].values.tolist() for _ in range(2)]
    assert twice[0] == twice[1]
    assert twice[0] != tokens_of(config, store_of(cells), [0], epoch=1)[0].values.tolist()
    assert max(twice[0]) <= 50
    assert min(twice[0][1:]) >= 1


def test_gene_conditions_follow_the_genes() -> None:
    table = np.arange(len(VOCABULARY)) % 3
    tokeniser = Tokeniser(PLAIN, VOCABULARY, "counts", {"pathway": table})
    assert tokeniser.conditions_of(np.array([4, 5, 300], np.int32))["pathway"].tolist() == [1, 2, 0]
    with pytest.raises(ScfmError, match="pathway: 300 entries for a vocabulary of 302"):
        Tokeniser(PLAIN, VOCABULARY, "counts", {"pathway": table[:-2]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_bins": 2}, r"data\.n_bins: 2"),
        ({"n_bins": 70000}, r"data\.n_bins: 70000"),
        ({"mask_kept": 1.0}, r"data\.mask_kept: 1\.0"),
        ({"mask_ratios": ()}, r"data\.mask_ratios"),
        ({"mask_ratios": (0.5, 1.0)}, r"data\.mask_ratios: \[0\.5, 1\.0\]"),
    ],
)
def test_settings_that_cannot_work_name_their_key(change: dict, message: str) -> None:
    with pytest.raises(ScfmError, match=message):
        TokenConfig(**change)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_raw_values_pass_as_they_are(cells: np.ndarray, dtype: type) -> None:
    """Also where a gene is hidden, sampled or not expressed; no bin is computed."""
    values = cells.astype(dtype) if dtype is np.uint8 else (cells * 0.37).astype(dtype)
    store = store_of(values, blocks=2)
    for genes in ("expressed", "all"):
        config = TokenConfig(values="raw", genes=genes, mask_ratios=(0.5,), max_genes=250)  # type: ignore[arg-type]
        for row, tokens in enumerate(tokens_of(config, store, list(range(len(cells))))):
            assert tokens.targets[1:].tolist() == values[row][tokens.genes[1:]].astype(np.float32).tolist()
            known = len(tokens.genes) - tokens.n_unknown
            assert (tokens.values[:known] == tokens.targets[:known]).all()
            assert (tokens.values[known:] == config.mask_value).all()
