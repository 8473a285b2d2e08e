"""What is measured is what numpy finds in the cells, read as a matrix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from corpora import N_GENES, dense, names

from scfm.data.shards import open_shards, read_manifest
from scfm.data.store import CellStore
from scfm.inspecting.histogram import bins_of, middles
from scfm.inspecting.measuring import RUN, Measured, count_equal, measure, n_sampled
from scfm.inspecting.tables import WHOLE, percentiles


def measured_of(shards: Path, sample: int = 0) -> tuple[CellStore, Measured]:
    store = open_shards(shards)
    return store, measure(store, read_manifest(shards), shards / "cells.hash", sample)


def test_genes_counts_and_values(shards: Path) -> None:
    store, measured = measured_of(shards)
    cells = dense(store)
    columns = [store.vocabulary.names.index(f"G{i:03}") for i in range(N_GENES)]
    assert (measured.cells, measured.sampled, measured.run) == (len(cells), len(cells), 0)
    np.testing.assert_array_equal(measured.genes_per_cell, np.bincount((cells > 0).sum(1), minlength=N_GENES + 1))
    np.testing.assert_array_equal(measured.gene_cells[columns], (cells > 0).sum(0))
    np.testing.assert_array_equal(measured.gene_sums[columns], cells.sum(0))
    assert measured.gene_cells[columns[149]] == 0
    values = cells[cells > 0]
    np.testing.assert_array_equal(measured.values, np.bincount(bins_of(values), minlength=len(measured.values)))
    assert measured.largest == values.max()
    expected = np.quantile(cells.sum(1), [0.05, 0.5, 0.95], method="inverted_cdf")
    np.testing.assert_allclose(percentiles(measured.totals, WHOLE), expected, rtol=0.01)
    assert measured.equal_profiles == 0


@pytest.mark.parametrize("column", ["source", "tissue", "assay", "donor_id"])
def test_categories(shards: Path, column: str) -> None:
    store, measured = measured_of(shards)
    group, of, cells = measured.groups[column], np.array(names(store, column)), dense(store)
    held_out = np.arange(store.n_cells) >= store.n_cells - read_manifest(shards)["held_out"]["cells"]
    assert group.missing == 0
    assert group.genes is not None
    assert group.counts is not None
    for k, name in enumerate(group.categories):
        here = of == name
        assert group.cells[k] == here.sum()
        assert group.held_out[k] == (here & held_out).sum()
        if here.any():
            sizes = (cells[here] > 0).sum(1)
            median = np.quantile(sizes, 0.5, method="inverted_cdf")
            np.testing.assert_allclose(percentiles(group.genes[k], WHOLE)[1], median, rtol=0.01)
            totals = np.quantile(cells[here].sum(1), 0.5, method="inverted_cdf")
            np.testing.assert_allclose(percentiles(group.counts[k], WHOLE)[1], totals, rtol=0.01)
    if column != "source":
        sources = np.array(names(store, "source"))
        for s, source in enumerate(measured.groups["source"].categories):
            for k, name in enumerate(group.categories):
                assert measured.pairs[column][s, k] == ((sources == source) & (of == name)).sum()


def test_a_sample_is_of_some_cells_and_what_needs_no_values_is_of_all(shards: Path) -> None:
    store, everything = measured_of(shards)
    _, measured = measured_of(shards, sample=2 * RUN)
    assert RUN < measured.sampled <= 2 * RUN
    assert measured.sampled == n_sampled(store, 2 * RUN)
    assert measured.run == RUN
    np.testing.assert_array_equal(measured.genes_per_cell, everything.genes_per_cell)
    np.testing.assert_array_equal(measured.groups["tissue"].cells, everything.groups["tissue"].cells)
    assert measured.totals.sum() == measured.sampled
    assert measured.gene_cells.max() <= measured.sampled
    assert (measured.gene_cells <= everything.gene_cells).all()
    _, again = measured_of(shards, sample=2 * RUN)
    np.testing.assert_array_equal(measured.gene_cells, again.gene_cells)


def test_a_sample_reads_no_cell_twice_and_reaches_all_parts(shards: Path) -> None:
    from scfm.inspecting.measuring import _sampled_places

    store = open_shards(shards)
    rows = np.concatenate([store.first_rows[b] + places for b, places in _sampled_places(store, 4 * RUN)])
    assert len(set(rows.tolist())) == len(rows)
    stretch = store.n_cells / 4
    assert {int(row // stretch) for row in rows} == {0, 1, 2, 3}


def test_equal_hashes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scfm.inspecting.measuring.HASHES", 3)
    hashes = np.array([1, 1, 2, 3, 3, 3, 4, 2**64 - 1, 2**64 - 1], np.uint64)
    assert count_equal(hashes) == 4
    assert count_equal(hashes[:0]) == 0


def test_normalised_values_keep_their_size() -> None:
    values = np.array([0.013, 0.7, 1.5, 8.25])
    np.testing.assert_allclose(middles()[bins_of(values)], values, rtol=0.01)
