"""Binned numbers give back what they were, to within a bin."""

from __future__ import annotations

import numpy as np
import pytest

from scfm.inspecting.histogram import (
    FIRST_WHOLE,
    N_BINS,
    N_WHOLE,
    bins_of,
    coarse,
    lower_edges,
    middles,
    quantiles,
)


def test_small_whole_numbers_have_bins_of_their_own() -> None:
    numbers = np.arange(1, 128)
    assert len(set(bins_of(numbers))) == 127
    np.testing.assert_array_equal(middles(whole=True)[bins_of(numbers)], numbers)


@pytest.mark.parametrize("whole", [True, False])
def test_what_stands_for_a_bin_is_within_one_per_cent(whole: bool) -> None:
    numbers = np.unique(np.geomspace(1, 2**32 - 1, 5000).round()) if whole else np.geomspace(1e-6, 1e30, 5000)
    found = middles(whole=whole)[bins_of(numbers)]
    assert np.abs(found / numbers - 1).max() < 0.01
    edges = lower_edges(np.arange(N_BINS))
    assert (np.diff(edges) > 0).all()
    assert (edges[bins_of(numbers)] <= numbers.astype(np.float32)).all()


def test_quantiles_are_those_of_the_numbers() -> None:
    numbers = np.random.default_rng(0).lognormal(7, 1, 10_001).round() + 1
    counts = np.bincount(bins_of(numbers) - FIRST_WHOLE, minlength=N_WHOLE)
    found = quantiles(np.stack([counts, 0 * counts]), middles(FIRST_WHOLE, N_WHOLE, whole=True), [0.05, 0.5, 0.95])
    expected = np.quantile(numbers, [0.05, 0.5, 0.95], method="inverted_cdf")
    np.testing.assert_allclose(found[0], expected, rtol=0.01)
    assert np.isnan(found[1]).all()


def test_wide_bins_hold_all_numbers_once() -> None:
    numbers = np.random.default_rng(0).lognormal(6, 1, 5000).round() + 8
    values = np.arange(int(numbers.max()) + 1) * 1.0
    edges, counts = coarse(np.bincount(numbers.astype(int)), values)
    np.testing.assert_array_equal(counts, np.histogram(numbers, edges)[0])
    assert counts.sum() == 5000
    assert (edges == edges.round()).all()
