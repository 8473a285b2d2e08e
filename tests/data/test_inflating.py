"""Spans of gzipped arrays are what h5py reads, however they lie on chunks, and damage is still an error."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from scfm.data import inflating
from scfm.data.inflating import read_span

pytest.importorskip("isal", reason="without ISA-L h5py reads alone: pip install 'scfm[fast]'")

LAYOUTS = {
    "gzip": {"compression": "gzip", "chunks": (100,)},
    "gzip after shuffling bytes": {"compression": "gzip", "shuffle": True, "chunks": (100,)},
    "lzf": {"compression": "lzf", "chunks": (100,)},
    "plain chunks": {"chunks": (100,)},
    "contiguous": {},
    "big-endian": {"compression": "gzip", "chunks": (100,), "dtype": ">f4"},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_spans_are_those_of_h5py(tmp_path: Path, layout: dict[str, object]) -> None:
    values = np.random.default_rng(0).poisson(1.0, 1234).astype(np.float32)
    with h5py.File(tmp_path / "f.h5", "w") as file:
        array = file.create_dataset("a", data=values, **layout)
        for first, last in ((0, 1234), (0, 0), (99, 101), (100, 200), (150, 151), (1200, 1234), (37, 905)):
            read = read_span(array, first, last)
            assert read.dtype == array.dtype
            np.testing.assert_array_equal(read, values[first:last])


def test_gzipped_chunks_do_not_pass_through_zlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inflated: list[int] = []
    inflate = inflating.isal_zlib.decompress
    monkeypatch.setattr(inflating.isal_zlib, "decompress", lambda chunk: inflated.append(1) or inflate(chunk))
    with h5py.File(tmp_path / "f.h5", "w") as file:
        array = file.create_dataset("a", data=np.arange(1000), chunks=(100,), compression="gzip")
        read_span(array, 250, 600)
    assert len(inflated) == 4


def test_chunks_that_were_never_written_or_are_not_filtered(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "f.h5", "w") as file:
        array = file.create_dataset("a", (500,), "f4", chunks=(100,), compression="gzip", fillvalue=7)
        array[100:200] = 1
        array.id.write_direct_chunk((200,), np.full(100, 2, "f4").tobytes(), filter_mask=1)
        expected = np.repeat(np.float32([7, 1, 2, 7, 7]), 100)
        np.testing.assert_array_equal(read_span(array, 0, 500), expected)


def test_a_damaged_chunk_is_an_error(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "f.h5", "w") as file:
        array = file.create_dataset("a", data=np.random.default_rng(0).random(1000), chunks=(500,), compression="gzip")
        place = array.id.get_chunk_info(1)
    content = bytearray((tmp_path / "f.h5").read_bytes())
    at = place.byte_offset + place.size // 2
    content[at : at + 200] = bytes(200)
    (tmp_path / "f.h5").write_bytes(content)
    with h5py.File(tmp_path / "f.h5") as file, pytest.raises(OSError, match="filter"):
        read_span(file["a"], 0, 1000)
