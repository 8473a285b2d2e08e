"""Shard directories: what is written comes back by memory map, and a damaged directory is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from scfm.data.expression import narrowest
from scfm.data.hashing import load_hashes, profile_hashes, store_hashes
from scfm.data.shards import Codec, ShardWriter, default_codec, open_shards, read_manifest, verify_shards
from scfm.data.store import CellBlock, CellStore, ValueKind
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.errors import ScfmError

VOCABULARY = Vocabulary.from_genes(Gene.of(None, f"G{i:03}") for i in range(300))
TYPES = ["B cell", "T cell"]


def some_cells(n: int, seed: int, largest: int = 200) -> csr_matrix:
    rng = np.random.default_rng(seed)
    expressed = rng.random((n, VOCABULARY.n_genes)) < 0.1
    return csr_matrix(expressed * rng.integers(1, largest + 1, expressed.shape), dtype=np.uint32)


def as_block(cells: csr_matrix) -> CellBlock:
    return CellBlock(cells.indptr, cells.indices.astype(np.uint32), cells.data)


def as_csr(store: CellStore) -> np.ndarray:
    parts = [
        csr_matrix((b.values, b.genes, b.offsets), (b.n_cells, VOCABULARY.n_genes)).toarray() for b in store.blocks
    ]
    return np.concatenate(parts)


def build(directory: Path, *parts: csr_matrix, value_kind: ValueKind = "counts", codec: Codec = "list") -> Path:
    directory.mkdir()
    writer = ShardWriter(directory, VOCABULARY, value_kind, obs={"cell_type": TYPES}, codec=codec)
    for cells in parts:
        writer.write(as_block(cells), {"cell_type": np.arange(cells.shape[0]) % 3 - 1})
    writer.finish()
    return directory


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return build(tmp_path / "shards", some_cells(50, 0), some_cells(30, 1))


def test_what_is_written_comes_back(shards: Path) -> None:
    store = open_shards(shards)
    expected = np.concatenate([some_cells(50, 0).toarray(), some_cells(30, 1).toarray()])
    np.testing.assert_array_equal(as_csr(store), expected)
    assert (store.n_cells, store.value_kind, store.vocabulary) == (80, "counts", VOCABULARY)
    assert store.first_rows.tolist() == [0, 50, 80]
    assert store.obs["cell_type"].categories == TYPES
    assert store.obs["cell_type"].codes[[0, 1, 2, 50]].tolist() == [-1, 0, 1, -1]


def test_reading_copies_nothing(shards: Path) -> None:
    for block in open_shards(shards).blocks:
        for array in (block.offsets, block.genes, block.values):
            assert not array.flags.owndata
            assert not array.flags.writeable  # a view of the map, which is opened for reading


@pytest.mark.parametrize(
    ("largest", "expected"), [(255, np.uint8), (256, np.uint16), (65_535, np.uint16), (65_536, np.uint32)]
)
def test_values_take_the_narrowest_type_that_holds_the_shard(tmp_path: Path, largest: int, expected: type) -> None:
    cells = some_cells(10, 0)
    cells.data[0] = largest
    store = open_shards(build(tmp_path / "s", cells))
    assert store.blocks[0].values.dtype == expected
    assert store.blocks[0].values.max() == largest
    assert read_manifest(tmp_path / "s")["shards"][0]["values"] == np.dtype(expected).name


def test_normalised_values_stay_float32(tmp_path: Path) -> None:
    cells = some_cells(10, 0).astype(np.float32)
    cells.data += np.float32(0.25)
    store = open_shards(build(tmp_path / "s", cells, value_kind="normalised"))
    assert store.value_kind == "normalised"
    assert store.blocks[0].values.dtype == np.float32
    np.testing.assert_array_equal(store.blocks[0].values, cells.data)
    assert narrowest(cells.data) is cells.data


def test_hashes_of_all_cells_are_kept_sorted(shards: Path) -> None:
    parts = (some_cells(50, 0), some_cells(30, 1))
    each = [profile_hashes(c.indptr, c.indices.astype(np.uint16), c.data, VOCABULARY.gene_keys) for c in parts]
    np.testing.assert_array_equal(load_hashes(shards / "cells.hash"), np.sort(np.concatenate(each)))


def test_the_manifest_says_what_is_there(shards: Path) -> None:
    manifest = read_manifest(shards)
    assert manifest["cells"] == 80
    assert manifest["tokens"] == some_cells(50, 0).nnz + some_cells(30, 1).nnz
    assert [shard["file"] for shard in manifest["shards"]] == ["shards/00000.arrow", "shards/00001.arrow"]
    assert manifest["vocabulary_hash"] == VOCABULARY.hash
    assert verify_shards(shards) == 2


def test_hugging_face_datasets_read_a_shard(shards: Path) -> None:
    from datasets import Dataset

    dataset = Dataset.from_file(str(shards / "shards/00000.arrow"))
    expected = some_cells(50, 0)
    assert len(dataset) == 50
    assert dataset[7]["genes"] == expected[7].indices.tolist()
    assert dataset[7]["values"] == expected[7].data.tolist()
    assert dataset[7]["cell_type"] == 7 % 3 - 1


def test_a_cell_without_genes_keeps_its_row(tmp_path: Path) -> None:
    cells = csr_matrix(np.diag([1, 0, 3]).astype(np.uint32))
    store = open_shards(build(tmp_path / "s", cells))
    assert store.n_genes(np.arange(3)).tolist() == [1, 0, 1]


def test_a_missing_shard_is_named(shards: Path) -> None:
    (shards / "shards/00001.arrow").unlink()
    with pytest.raises(ScfmError, match=r"00001\.arrow: the shard is missing"):
        open_shards(shards)


def test_a_truncated_shard_is_named(shards: Path) -> None:
    path = shards / "shards/00001.arrow"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ScfmError, match=r"00001\.arrow: .* bytes, but the manifest says .* cut off"):
        open_shards(shards)


def test_a_shard_of_another_build_is_named(shards: Path, tmp_path: Path) -> None:
    other = build(tmp_path / "other", some_cells(40, 2))
    manifest = json.loads((shards / "manifest.json").read_text())
    shutil.copy(other / "shards/00000.arrow", shards / "shards/00000.arrow")
    manifest["shards"][0]["bytes"] = (shards / "shards/00000.arrow").stat().st_size
    (shards / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ScfmError, match=r"00000\.arrow: holds 40 cells .* but the manifest says 50 cells"):
        open_shards(shards)


def test_a_shard_that_is_not_arrow_is_named(shards: Path) -> None:
    path = shards / "shards/00000.arrow"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(ScfmError, match=r"00000\.arrow: not a readable Arrow stream"):
        open_shards(shards)


def test_a_changed_byte_is_found_by_verify_only(shards: Path) -> None:
    path = shards / "shards/00001.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    open_shards(shards)
    with pytest.raises(ScfmError, match=r"1 of 2 shards are damaged .*: shards/00001\.arrow"):
        verify_shards(shards)


@pytest.mark.parametrize("damage", ["missing", "cut off", "changed"])
def test_a_damaged_shard_can_be_left_out(shards: Path, damage: str) -> None:
    path = shards / "shards/00000.arrow"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-8] if damage == "cut off" else content[:-1] + b"?")
    store = open_shards(shards, skip_damaged=True)
    assert store.n_cells == 80  # rows keep their numbers
    assert [lost.rows for lost in store.lost] == [range(50)]
    assert "00000.arrow: " in store.lost[0].why
    assert store.lost_rows.tolist() == list(range(50))
    np.testing.assert_array_equal(as_csr(store)[50:], some_cells(30, 1).toarray())
    assert store.obs["cell_type"].codes[np.arange(50, 53)].tolist() == [-1, 0, 1]


def test_shards_that_are_all_damaged_are_an_error(shards: Path) -> None:
    for path in (shards / "shards").iterdir():
        path.unlink()
    with pytest.raises(ScfmError, match=r"all 2 shards are damaged; .*00000\.arrow: the shard is missing"):
        open_shards(shards, skip_damaged=True)


def test_nothing_is_left_out_of_whole_shards(shards: Path) -> None:
    assert open_shards(shards, skip_damaged=True).lost == []
    assert len(open_shards(shards).lost_rows) == 0


@pytest.mark.parametrize("codec", ["list", "packed"])
def test_both_codecs_hold_the_same_cells(tmp_path: Path, codec: Codec) -> None:
    cells = some_cells(200, 3, largest=70_000)
    store = open_shards(build(tmp_path / "s", cells, some_cells(1, 4), codec=codec))
    rows = np.random.default_rng(0).permutation(200)
    dense = np.zeros((200, VOCABULARY.n_genes), np.int64)
    for block, at, places in store.parts(rows):
        dense[at] = csr_matrix((block.values, block.genes, block.offsets), (block.n_cells, 300)).toarray()[places]
    np.testing.assert_array_equal(dense, cells.toarray()[rows])
    assert store.n_genes(rows).tolist() == (cells.toarray()[rows] > 0).sum(1).tolist()
    assert read_manifest(tmp_path / "s")["codec"] == codec
    each = profile_hashes(cells.indptr, cells.indices.astype(np.uint16), cells.data, VOCABULARY.gene_keys)
    np.testing.assert_array_equal(store_hashes(store)[:200], each)
    assert sum(part.n_cells for part in store.in_turn()) == 201


def test_hugging_face_datasets_read_a_packed_shard(tmp_path: Path) -> None:
    from datasets import Dataset

    cells = some_cells(50, 0)
    dataset = Dataset.from_file(str(build(tmp_path / "s", cells, codec="packed") / "shards/00000.arrow"))
    assert dataset.column_names == ["cell", "n_genes", "cell_type"]
    assert dataset[7]["n_genes"] == cells[7].nnz
    gaps = np.frombuffer(dataset[7]["cell"], np.uint8)[: cells[7].nnz]
    assert (np.cumsum(gaps.astype(int) + 1) - 1).tolist() == cells[7].indices.tolist()


def test_normalised_values_are_not_packed(tmp_path: Path) -> None:
    with pytest.raises(ScfmError, match=r"--codec packed: it holds counts, .* use --codec list"):
        ShardWriter(tmp_path, VOCABULARY, "normalised", codec="packed")
    assert (default_codec("counts"), default_codec("normalised")) == ("packed", "list")


def test_codes_of_many_shards_are_asked_for_like_an_array(shards: Path) -> None:
    codes = open_shards(shards).obs["cell_type"].codes
    whole = np.concatenate([np.arange(50) % 3 - 1, np.arange(30) % 3 - 1])
    np.testing.assert_array_equal(np.asarray(codes), whole)
    assert (len(codes), codes.dtype) == (80, np.int16)
    assert codes[48:53].tolist() == whole[48:53].tolist()
    assert codes[whole == 1].tolist() == [1] * (whole == 1).sum()
    np.testing.assert_array_equal(codes == 0, whole == 0)


def test_a_foreign_vocabulary_is_named(shards: Path) -> None:
    Vocabulary.from_genes([Gene.of(None, "G000")]).save(shards / "vocab.json")
    with pytest.raises(ScfmError, match=r"vocab\.json: not the vocabulary"):
        open_shards(shards)


@pytest.mark.parametrize(
    ("manifest", "complaint"),
    [
        (None, "not a shard directory"),
        ("{", "not JSON"),
        ("[]", "shard format None"),
        ('{"format_version": 99, "codec": "list"}', "shard format 99 .* this scfm reads format 1"),
    ],
)
def test_a_directory_that_holds_something_else_is_named(tmp_path: Path, manifest: str | None, complaint: str) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(ScfmError, match=complaint):
        open_shards(tmp_path)


def test_an_unfinished_directory_has_no_manifest(tmp_path: Path) -> None:
    ShardWriter(tmp_path, VOCABULARY, "counts").write(as_block(some_cells(5, 0)), {})
    with pytest.raises(ScfmError, match="not a shard directory"):
        open_shards(tmp_path)
