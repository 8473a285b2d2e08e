"""Profile hashes: equal for equal cells whatever the vocabulary, different for different cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cells import GENES, made_up_cells
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.data.hashing import load_hashes, overlap, profile_hashes, row_hashes, save_hashes, store_hashes, without
from scfm.data.sources import store_from_anndata
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.errors import ScfmError

NAMES = [f"G{i}" for i in range(40)]
SMALL = Vocabulary.from_genes(Gene.of(None, name) for name in NAMES)
LARGE = Vocabulary.from_genes(Gene.of(None, name) for name in [*NAMES, *(f"A{i}" for i in range(60))])

profiles = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 2**32 - 1), max_size=len(NAMES))


def hash_of(profile: dict[str, int], vocabulary: Vocabulary, dtype: type = np.uint32) -> int:
    genes = vocabulary.match([None] * len(profile), list(profile)).astype(np.uint16)
    order = np.argsort(genes)
    values = np.array(list(profile.values()), dtype)[order]
    return int(profile_hashes(np.array([0, len(genes)]), genes[order], values, vocabulary.gene_keys)[0])


@settings(deadline=None)  # the first call compiles
@given(profiles)
def test_the_vocabulary_that_numbers_the_genes_does_not_matter(profile: dict[str, int]) -> None:
    assert hash_of(profile, SMALL) == hash_of(profile, LARGE)


@settings(deadline=None)  # the first call compiles
@given(profiles, profiles)
def test_hashes_are_equal_exactly_where_profiles_are(one: dict[str, int], other: dict[str, int]) -> None:
    assert (hash_of(one, SMALL) == hash_of(other, SMALL)) == (one == other)


def test_swapped_values_and_neighbouring_profiles_differ() -> None:
    cells = [{"G1": 1, "G2": 2}, {"G1": 2, "G2": 1}, {"G1": 1}, {"G2": 2}, {"G1": 1, "G2": 2, "G3": 1}, {}]
    assert len({hash_of(cell, SMALL) for cell in cells}) == len(cells)


def test_the_unsigned_type_that_holds_a_count_does_not_matter() -> None:
    cell = {"G3": 7, "G5": 255}
    assert hash_of(cell, SMALL, np.uint8) == hash_of(cell, SMALL, np.uint16) == hash_of(cell, SMALL, np.uint32)


def test_normalised_values_are_hashed_by_all_their_bits() -> None:
    def of(value: float) -> int:
        values = np.array([value], np.float32)
        return int(profile_hashes(np.array([0, 1]), np.array([3], np.uint16), values, SMALL.gene_keys)[0])

    assert of(1.5) == of(1.5)
    assert of(1.5) != of(float(np.nextafter(np.float32(1.5), np.float32(2))))


def test_a_million_cells_of_one_gene_do_not_collide() -> None:
    n = 1_000_000
    hashes = profile_hashes(
        np.arange(n + 1), np.zeros(n, np.uint16), np.arange(1, n + 1, dtype=np.uint32), SMALL.gene_keys
    )
    assert len(np.unique(hashes)) == n


def test_saved_hashes_are_sorted_and_come_back(tmp_path: Path) -> None:
    save_hashes(tmp_path / "cells.hash", np.array([5, 2**64 - 1, 3], np.uint64))
    assert load_hashes(tmp_path / "cells.hash").tolist() == [3, 5, 2**64 - 1]
    assert (tmp_path / "cells.hash").stat().st_size == 24


def test_overlap_finds_the_cells_that_are_known() -> None:
    known = np.array([3, 5, 9], np.uint64)
    assert overlap(known, np.array([9, 4, 3, 10], np.uint64)).tolist() == [True, False, True, False]
    assert overlap(known[:0], known).tolist() == [False, False, False]


def test_some_rows_hash_as_they_do_among_all() -> None:
    store = store_from_anndata(made_up_cells(40), Vocabulary.from_genes(Gene.of(None, name) for name in GENES))
    rows = np.array([7, 3, 39])
    np.testing.assert_array_equal(row_hashes(store, rows), store_hashes(store)[rows])
    assert len(row_hashes(store, rows[:0])) == 0


def test_taking_cells_away_takes_one_of_each() -> None:
    known = np.array([3, 5, 5, 5, 9], np.uint64)
    assert without(known, np.array([5, 9, 5, 4], np.uint64)).tolist() == [3, 5]
    assert without(known, known[:0]).tolist() == known.tolist()
    assert without(known[:1], np.array([3, 3], np.uint64)).tolist() == []


def test_a_cut_off_or_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "cells.hash").write_bytes(b"12345")
    with pytest.raises(ScfmError, match=r"cells\.hash: 5 bytes .* cut off"):
        load_hashes(tmp_path / "cells.hash")
    with pytest.raises(ScfmError, match=r"none\.hash: there is no such file"):
        load_hashes(tmp_path / "none.hash")
