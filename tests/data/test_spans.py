"""Spans of files come into memory as they stand in the files, or an error names the file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.data import spans
from scfm.data.spans import AHEAD, FileSpans, ask_for, read_spans
from scfm.errors import ScfmError

BYTES = 5000


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("spans"), np.random.default_rng(0)
    paths = [folder / f"{i}.bin" for i in range(3)]
    for path in paths:
        path.write_bytes(rng.bytes(BYTES))
    return paths


def of_file(path: Path, bounds: list[tuple[int, int]]) -> FileSpans:
    """Return spans that are read one behind the other into memory of their size."""
    at, ends = np.array(bounds, np.int64).reshape(-1, 2).T
    places = np.cumsum(ends - at) - (ends - at)
    return FileSpans(path, at.copy(), ends - at, np.zeros((ends - at).sum(), np.uint8), places)


def in_file(path: Path, bounds: list[tuple[int, int]]) -> bytes:
    return b"".join(path.read_bytes()[at:end] for at, end in bounds)


bounds_of = st.lists(st.tuples(st.integers(0, BYTES), st.integers(0, BYTES)).map(lambda pair: tuple(sorted(pair))))


@settings(deadline=None)
@given(bounds=st.lists(bounds_of, max_size=3))
def test_spans_are_what_stands_in_the_files(files: list[Path], bounds: list[list[tuple[int, int]]]) -> None:
    wanted = [of_file(path, some) for path, some in zip(files, bounds, strict=False)]
    read_spans(wanted)
    assert [file.memory.tobytes() for file in wanted] == [
        in_file(path, some) for path, some in zip(files, bounds, strict=False)
    ]


def test_more_is_read_than_is_asked_for_ahead(tmp_path: Path) -> None:
    (tmp_path / "large.bin").write_bytes(np.random.default_rng(0).bytes(4 * AHEAD))
    bounds = [(0, 2 * AHEAD), *((at, at + 40_000) for at in range(AHEAD, 4 * AHEAD - 40_000, 30_000))]
    wanted = of_file(tmp_path / "large.bin", bounds)
    read_spans([wanted])
    assert wanted.memory.tobytes() == in_file(tmp_path / "large.bin", bounds)


@pytest.mark.parametrize("comes", [1, 7, 100])
def test_what_comes_in_parts_is_put_together(files: list[Path], comes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(spans, "_read", lambda descriptor, at, *_: min(1, len(at)))  # every other span alone
    monkeypatch.setattr(os, "preadv", lambda descriptor, into, at: preadv(descriptor, [into[0][:comes]], at))
    bounds = [(0, 10), (20, 350), (400, 401), (4900, 5000)]
    wanted = of_file(files[0], bounds)
    spans._read_all([wanted])
    expected = in_file(files[0], bounds)
    assert wanted.memory.tobytes()[10:340] == expected[10:340]
    assert wanted.memory.tobytes()[341:] == expected[341:]


def test_a_file_that_ends_too_early_is_named_with_the_byte(files: list[Path]) -> None:
    with pytest.raises(ScfmError, match=r"1\.bin: ends at byte 5,000, before the cells that its index names"):
        read_spans([of_file(files[0], [(0, 100)]), of_file(files[1], [(0, 100), (4000, 5001)])])


def test_a_file_that_is_missing_is_named(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ScfmError, match=r"no\.bin: cannot be read \(.*No such file"):
        read_spans([of_file(files[0], [(0, 100)]), of_file(tmp_path / "no.bin", [(0, 100)])])
    with pytest.raises(ScfmError, match=r"no\.bin: cannot be read \(.*No such file"):
        ask_for(tmp_path / "no.bin", np.array([0]), np.array([1]))


def test_what_the_system_refuses_to_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScfmError, match=r"cannot be read \(.*Is a directory"):
        read_spans([of_file(tmp_path, [(0, 100)])])


def test_memory_that_is_too_small_is_not_written_past() -> None:
    room = np.zeros(20, np.uint8)
    short = FileSpans(Path(__file__), np.array([0]), np.array([15]), room[:10], np.array([0]))
    with pytest.raises(ScfmError):
        read_spans([short])
    assert not room[10:].any()


def test_files_are_closed(files: list[Path]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        read_spans([of_file(path, [(0, 10), (100, 200)]) for path in files])
        ask_for(files[0], np.array([0]), np.array([100]))
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_linux_alone_has_is_not_needed_to_import() -> None:
    """Cells in memory are read on any system."""
    without = "import os; del os.posix_fadvise, os.POSIX_FADV_WILLNEED; import scfm.data.loader, scfm.data.access"
    subprocess.run([sys.executable, "-c", without], check=True)


def test_the_kernel_is_asked_for_what_the_system_calls_so() -> None:
    assert spans.WILL_NEED == os.POSIX_FADV_WILLNEED
