"""Unknown genes drawn from the expressed ones, and those whose value is shown all the same."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import numpy as np
import pytest
from tokenised import N_GENES, VOCABULARY, store_of, tokens_of

from scfm.data.tokens import TokenConfig, Tokeniser

SCBERT = TokenConfig(
    genes="all", max_genes=N_GENES, values="log2", n_bins=6, mask_ratios=(0.15,), mask_candidates="expressed",
    mask_kept=0.1, cls_value=0.0, mask_value=6.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def cells() -> np.ndarray:
    """(30, 300) counts; cell 3 is empty, cell 4 has one gene, cell 5 one so abundant that the others are in bin 0."""
    generator = np.random.default_rng(0)
    dense = (generator.geometric(0.6, (30, N_GENES)) * (generator.random((30, N_GENES)) < 0.3)).astype(np.uint16)
    dense[3:5] = 0
    dense[4, 7] = 3
    dense[5, 0] = 60_000
    return dense


def log2_bins(row: np.ndarray) -> np.ndarray:
    return np.minimum(np.log2(1 + 1e4 * row / max(row.sum(dtype=np.float64), 1)), 5).astype(int)


@pytest.mark.parametrize("genes", ["all", "expressed"])
@pytest.mark.parametrize("max_genes", [N_GENES, 40])
def test_only_genes_with_a_bin_are_hidden(cells: np.ndarray, genes: str, max_genes: int) -> None:
    config = replace(SCBERT, genes=genes, max_genes=max_genes)
    for row, tokens in enumerate(tokens_of(config, store_of(cells), list(range(len(cells))))):
        bins = log2_bins(cells[row])
        assert (tokens.genes[0], tokens.values[0], tokens.targets[0]) == (VOCABULARY.cls, 0, 0)
        assert tokens.targets[1:].tolist() == bins[tokens.genes[1:]].tolist()
        assert tokens.n_unknown == ceil(0.15 * (bins[tokens.genes[1:]] > 0).sum())
        known = len(tokens.genes) - tokens.n_unknown
        assert (tokens.targets[known:] > 0).all()
        assert (tokens.values[:known] == tokens.targets[:known]).all()
        shown = tokens.values[known:] != 6
        assert (tokens.values[known:] == tokens.targets[known:])[shown].all()
        assert (np.diff(tokens.genes[1:known]) > 0).all()
        assert (np.diff(tokens.genes[known:]) > 0).all()
    assert (cells[5] > 0).sum() > 1 == (log2_bins(cells[5]) > 0).sum()


def test_hidden_and_shown_genes_are_those_of_a_cells_own_draws(cells: np.ndarray) -> None:
    """The same in other blocks, another order and with other neighbours; others in another epoch or of another seed."""
    config = replace(SCBERT, mask_kept=0.5)
    rows = list(range(len(cells)))
    together = tokens_of(config, store_of(cells), rows)
    scattered = tokens_of(config, store_of(cells, blocks=7), rows[::-1])[::-1]
    for row in rows:
        (alone,) = tokens_of(config, store_of(cells), [row])
        for other in (together[row], scattered[row]):
            assert alone.genes.tolist() == other.genes.tolist()
            assert alone.values.tolist() == other.values.tolist()
    for changed in (
        tokens_of(config, store_of(cells), [0], epoch=1)[0],
        tokens_of(replace(config, seed=1), store_of(cells), [0])[0],
    ):
        assert together[0].genes.tolist() != changed.genes.tolist()


def test_every_candidate_is_hidden_and_shown_equally_often_and_independently(cells: np.ndarray) -> None:
    epochs = 3000
    config = replace(SCBERT, mask_ratios=(0.5,), mask_kept=0.25)
    hidden, shown = np.zeros((epochs, N_GENES)), np.zeros((epochs, N_GENES))
    store = store_of(cells[:1])
    for epoch in range(epochs):
        (tokens,) = tokens_of(config, store, [0], epoch)
        unknown, values = tokens.genes[-tokens.n_unknown :], tokens.values[-tokens.n_unknown :]
        hidden[epoch, unknown] = 1
        shown[epoch, unknown[values != 6]] = 1
    candidates = log2_bins(cells[0]) > 0
    n, drawn = candidates.sum(), ceil(0.5 * candidates.sum())
    assert hidden[:, ~candidates].sum() == 0
    for seen, chance in ((hidden, drawn / n), (shown, 0.25 * drawn / n)):
        deviation = (seen.sum(0)[candidates] - epochs * chance) / np.sqrt(epochs * chance * (1 - chance))
        assert np.abs(deviation).max() < 4.5
        assert abs(np.square(deviation).mean() - 1) < 0.5
        correlation = np.corrcoef(seen[:, candidates].T)
        assert abs(np.diagonal(correlation, 1).mean() + (1 / (n - 1) if seen is hidden else 0)) < 0.01


def test_masking_of_all_genes_can_show_some_too(cells: np.ndarray) -> None:
    config = replace(SCBERT, values="binned", mask_candidates="all", mask_ratios=(0.4,), mask_kept=0.3)
    plain = tokens_of(replace(config, mask_kept=0.0), store_of(cells), [0])[0]
    tokens = tokens_of(config, store_of(cells), [0])[0]
    assert plain.genes.tolist() == tokens.genes.tolist()
    assert tokens.n_unknown == int(N_GENES * 0.4)
    shown = (tokens.values != 6)[-tokens.n_unknown :]
    assert abs(shown.mean() - 0.3) < 0.17
    assert (tokens.values == tokens.targets)[-tokens.n_unknown :][shown].all()


def test_a_log2_token_has_one_of_few_values() -> None:
    levels = Tokeniser(SCBERT, VOCABULARY, "counts").levels
    assert levels is not None
    assert levels.tolist() == [0, 1, 2, 3, 4, 5, 6]
