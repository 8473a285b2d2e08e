"""What holds for any cells: bins are numpy's, tokens are a subset of the cell, and neighbours do not matter."""

from __future__ import annotations

from math import ceil

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.data.binning import bin_counts, bin_reals
from scfm.data.log_binning import log2_of_counts, log2_of_reals
from scfm.data.store import CellBlock, CellStore
from scfm.data.tokens import TokenConfig, Tokeniser
from scfm.data.vocabulary import Gene, Vocabulary

VOCABULARY = Vocabulary.from_genes(Gene.of(None, f"G{i:02d}") for i in range(40))

counts = st.one_of(st.integers(1, 5), st.integers(1, 300), st.integers(1, 2**32 - 1))
reals = st.floats(-1000, 1000, width=32)  # a store holds no negative ones, but their order is no other
cells = st.lists(st.dictionaries(st.integers(0, 39), counts, max_size=40), min_size=1, max_size=6)


def bins_of(row: np.ndarray, n_bins: int, spread_ties: bool, stream: int) -> np.ndarray:
    kernel = bin_reals if row.dtype.kind == "f" else bin_counts
    bins, one = np.empty(len(row), np.uint16), np.zeros(1, np.int64)
    streams = np.array([stream], np.uint64)
    kernel(np.array([0, len(row)], np.int32), row, one, np.linspace(0, 1, n_bins - 1), spread_ties, streams, one, bins)
    return bins


@settings(max_examples=300, deadline=None)
@given(
    values=st.one_of(
        st.lists(counts, min_size=1, max_size=80).map(lambda row: np.array(row, np.uint32)),
        st.lists(reals, min_size=1, max_size=80).map(lambda row: np.array(row, np.float32)),
    ),
    n_bins=st.integers(3, 60),
    stream=st.integers(0, 2**64 - 1),
)
def test_bins_are_those_of_numpy(values: np.ndarray, n_bins: int, stream: int) -> None:
    edges = np.quantile(values.astype(np.float64), np.linspace(0, 1, n_bins - 1))
    highest = np.digitize(values, edges)
    lowest = np.minimum(np.digitize(values, edges, right=True) + 1, highest)
    assert bins_of(values, n_bins, False, stream).tolist() == highest.tolist()
    spread = bins_of(values, n_bins, True, stream)
    assert (lowest <= spread).all()
    assert (spread <= highest).all()
    assert spread.min() >= 1
    assert highest.max() == n_bins - 1


def log2_bins_of(row: np.ndarray, n_bins: int) -> np.ndarray:
    kernel = log2_of_reals if row.dtype.kind == "f" else log2_of_counts
    bins, one = np.empty(len(row), np.uint16), np.zeros(1, np.int64)
    kernel(np.array([0, len(row)], np.int32), row, one, n_bins, one, bins)
    return bins


def logarithms_of(row: np.ndarray) -> np.ndarray:
    """log2(1 + counts per 10,000) as scanpy computes it from float32 counts: all in float32."""
    per_ten_thousand = row.astype(np.float32) / (row.astype(np.float32).sum(dtype=np.float64).astype(np.float32) / 1e4)
    logarithms = np.log1p(per_ten_thousand)
    return np.divide(logarithms, np.log(2), out=logarithms)


@settings(max_examples=300, deadline=None)
@given(
    row=st.lists(st.one_of(st.integers(1, 5), st.integers(1, 400)), min_size=1, max_size=300).map(
        lambda row: np.array(row, np.uint16)
    ),
    rest=st.integers(0, 60_000),
    n_bins=st.integers(3, 60),
)
def test_log2_bins_are_those_of_float32_logarithms(row: np.ndarray, rest: int, n_bins: int) -> None:
    row = np.append(row, rest).astype(np.uint16) if rest else row
    logarithms = logarithms_of(row)
    expected = np.minimum(logarithms, n_bins - 1).astype(np.int64)
    per_ten_thousand, left = np.divmod(10_000 * row.astype(np.int64), row.sum(dtype=np.int64))
    whole = (left == 0) & (per_ten_thousand & (per_ten_thousand + 1) == 0)  # see the next test
    assert log2_bins_of(row, n_bins)[~whole].tolist() == expected[~whole].tolist()
    assert log2_bins_of(logarithms, n_bins).tolist() == expected.tolist()


@settings(max_examples=300, deadline=None)
@given(k=st.integers(1, 13), parts=st.integers(1, 40))
def test_log2_bins_change_where_the_logarithm_is_whole(k: int, parts: int) -> None:
    """10,000 * count / total is 2^k - 1 exactly, and a hair less where the cell has one count more.

    Whether a float32 logarithm comes out whole there depends on the processor (numpy's with AVX-512 does; without, 13
    comes out as 12.999999).
    """
    row = np.array([(2**k - 1) * parts, 10_000 * parts - (2**k - 1) * parts], np.uint32)
    assert log2_bins_of(row, 60)[0] == k
    assert abs(logarithms_of(row)[0] - k) < 1e-6 * k
    assert log2_bins_of(row + np.array([0, 1], np.uint32), 60)[0] == k - 1
    assert log2_bins_of(row, k)[0] == k - 1, "no bin above n_bins - 1"


def store_of(rows: list[dict[int, int]]) -> CellStore:
    genes = [gene for row in rows for gene in sorted(row)]
    values = [row[gene] for row in rows for gene in sorted(row)]
    offsets = np.cumsum([0] + [len(row) for row in rows]).astype(np.int32)
    return CellStore(
        VOCABULARY, "counts", [CellBlock(offsets, np.array(genes, np.uint16), np.array(values, np.uint32))]
    )


def tokens_of(config: TokenConfig, rows: list[dict[int, int]], keys: list[int], epoch: int) -> list[tuple]:
    """(genes, values, targets, unknown) of each cell."""
    store, asked, hashed = store_of(rows), np.arange(len(rows)), np.array(keys, np.uint64)
    tokeniser = Tokeniser(config, VOCABULARY, "counts")
    lengths, n_unknown = tokeniser.plan(store, asked, hashed, epoch)
    ends = np.cumsum(lengths, dtype=np.int64)
    genes = np.empty(ends[-1], np.int32)
    values, targets = np.empty(ends[-1], np.float32), np.empty(ends[-1], np.float32)
    tokeniser.fill(store, asked, hashed, epoch, ends - lengths, lengths, n_unknown, genes, values, targets)
    spans = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    return [
        (genes[span].tolist(), values[span].tolist(), targets[span].tolist(), unknown)
        for span, unknown in zip(spans, n_unknown.tolist(), strict=True)
    ]


configs = st.builds(
    TokenConfig,
    genes=st.sampled_from(["expressed", "all"]),
    max_genes=st.integers(1, 45),
    values=st.sampled_from(["binned", "log2", "raw"]),
    n_bins=st.integers(3, 60),
    tie_policy=st.sampled_from(["left", "random"]),
    mask_ratios=st.lists(st.floats(0, 0.99), min_size=1, max_size=3),
    mask_candidates=st.sampled_from(["all", "expressed"]),
    mask_kept=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 2**31),
)


@settings(max_examples=200, deadline=None)
@given(config=configs, rows=cells, epoch=st.integers(0, 1000), data=st.data())
def test_tokens_are_a_part_of_the_cell_and_owe_nothing_to_their_neighbours(
    config: TokenConfig, rows: list[dict[int, int]], epoch: int, data: st.DataObject
) -> None:
    keys = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=len(rows), max_size=len(rows)))
    together = tokens_of(config, rows, keys, epoch)
    for row, key, tokens in zip(rows, keys, together, strict=True):
        genes, values, targets, unknown = tokens
        available = range(40) if config.genes == "all" else row.keys()
        kept = min(len(available), config.max_genes)
        assert genes[0] == VOCABULARY.cls
        assert len(genes) == len(set(genes)) == kept + 1
        assert set(genes[1:]) <= set(available)
        hidden, truth = values[1 + kept - unknown :], targets[1 + kept - unknown :]
        if config.mask_candidates == "all":
            assert unknown in {int(kept * ratio) for ratio in config.mask_ratios}
        else:
            candidates = sum(target > 0 for target in targets[1:])
            assert unknown in {ceil(candidates * ratio) for ratio in config.mask_ratios}
            assert all(target > 0 for target in truth)
        assert values[: 1 + kept - unknown] == targets[: 1 + kept - unknown]
        assert all(
            value == config.mask_value or (config.mask_kept > 0 and value == target)
            for value, target in zip(hidden, truth, strict=True)
        )
        for gene, target in zip(genes[1:], targets[1:], strict=True):
            if config.values == "raw":
                assert target == np.float32(row.get(gene, 0))
            elif config.values == "log2":
                least = [10_000 * row.get(gene, 0) >= (2**k - 1) * sum(row.values()) for k in range(1, config.n_bins)]
                assert target == (sum(least) if gene in row else 0)
            else:
                assert (target > 0) == (gene in row)
        assert tokens_of(config, [row], [key], epoch) == [tokens]
