"""A build that is stopped, however it is, goes on where it was and ends with the same bytes."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from corpora import OPTIONS, SIZES, build_process, equal, finished, interrupt, prepared, profiles, write_source

from scfm.data.building import build as build_module
from scfm.data.building.directory import Interrupted
from scfm.data.h5ad import H5adSource
from scfm.data.prepare import prepare
from scfm.data.shards import open_shards, read_manifest
from scfm.errors import ScfmError


def test_units_and_processes_change_nothing(
    sources: Path, undisturbed: Path, tmp_path: Path, small_units: None
) -> None:
    prepared(sources, tmp_path / "one", workers=1)
    assert equal(tmp_path / "one", undisturbed)
    prepared(sources, tmp_path / "four", workers=4)
    assert equal(tmp_path / "four", undisturbed)


@pytest.mark.parametrize("stage", ["_plan", "_make_units", "_make_shards"])
def test_a_build_that_dies_before_a_stage_goes_on(
    sources: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(build_module.Build, stage, interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepared(sources, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    prepared(sources, tmp_path / "out")
    assert equal(tmp_path / "out", undisturbed)


def test_a_build_that_dies_while_it_tidies_up_is_finished(
    sources: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "remove", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepared(sources, tmp_path / "out")
    with pytest.raises(ScfmError, match="out: holds something already"):
        prepared(sources, tmp_path / "out", seed=5)
    prepared(sources, tmp_path / "out")
    assert equal(tmp_path / "out", undisturbed)


# -- options and sources that change


def test_other_options_are_refused_by_name(stopped: Path, undisturbed: Path) -> None:
    files = stopped.parent / "files"
    with pytest.raises(ScfmError, match=r"other options \(--seed: was 0, is 7; --min-genes: was 0, is 3\).*--restart"):
        prepared(files, stopped, seed=7, min_genes=3)
    with pytest.raises(ScfmError, match=r"other options \(--codec: was not given, is list\)"):
        prepared(files, stopped, codec="list")
    write_source(files / "d.h5ad", profiles(20, 9))
    with pytest.raises(ScfmError, match=r"\(sources: new .*d\.h5ad\)"):
        prepared(files, stopped)
    (files / "d.h5ad").unlink()
    prepared(files, stopped, memory=3.0, workers=2)  # what it may use is no part of what it makes
    assert equal(stopped, undisturbed)


def test_finished_units_are_not_made_again(stopped: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "make_unit", None)
    prepared(stopped.parent / "files", stopped)
    assert equal(stopped, undisturbed)


def test_a_build_can_begin_anew(stopped: Path) -> None:
    prepared(stopped.parent / "files", stopped, min_genes=90, restart=True)
    assert read_manifest(stopped)["filters"]["min_genes"] == 90


def test_a_changed_source_is_refused_until_the_build_begins_anew(stopped: Path) -> None:
    files = stopped.parent / "files"
    write_source(files / "b.h5ad", profiles(40, 8))
    with pytest.raises(ScfmError, match=r"b\.h5ad: size was .*; it has changed since the build was begun.*--restart"):
        prepared(files, stopped)
    prepared(files, stopped, restart=True)
    assert open_shards(stopped).n_cells == 300 + 40 + 250


def test_a_vocabulary_that_changed_is_refused(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "genes.txt").write_text("G000\nG001\n")
    with monkeypatch.context() as patch:
        patch.setattr(build_module.Build, "_make_shards", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepared(sources, tmp_path / "out", vocabulary=tmp_path / "genes.txt")
    (tmp_path / "genes.txt").write_text("G000\nG002\n")
    with pytest.raises(ScfmError, match="--vocabulary: was"):
        prepared(sources, tmp_path / "out", vocabulary=tmp_path / "genes.txt")


@pytest.mark.parametrize("worth_keeping", [0, 10**9])
def test_a_source_that_changes_while_it_is_read(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_units: None, worth_keeping: int
) -> None:
    shutil.copytree(sources, tmp_path / "files")
    monkeypatch.setattr(build_module, "WORTH_KEEPING", worth_keeping)
    read = H5adSource.read

    def reading(source: H5adSource, first: int, last: int) -> object:
        found = read(source, first, last)
        if source.path.name == "b.h5ad":
            os.utime(source.path)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(H5adSource, "read", reading)
        with pytest.raises(ScfmError, match=r"b\.h5ad: mtime_ns was .* changed while it was read"):
            prepared(tmp_path / "files", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if worth_keeping:  # little was done: nothing is in the way
        prepared(tmp_path / "files", tmp_path / "out")
    else:
        with pytest.raises(ScfmError, match="it has changed since the build was begun"):
            prepared(tmp_path / "files", tmp_path / "out")
        prepared(tmp_path / "files", tmp_path / "out", restart=True)
    assert open_shards(tmp_path / "out").n_cells == sum(SIZES)


def test_a_source_that_vanishes_while_it_is_read(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_units: None
) -> None:
    shutil.copytree(sources, tmp_path / "files")
    make = build_module.make_unit

    def making(building: str, number: int) -> int:
        (tmp_path / "files/b.h5ad").unlink(missing_ok=True)
        return make(building, number)

    monkeypatch.setattr(build_module, "make_unit", making)
    with pytest.raises(ScfmError, match=r"b\.h5ad: there is no such file"):
        prepared(tmp_path / "files", tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


# -- the disk, permissions, other builds


def test_a_full_disk_is_named_and_the_build_goes_on(
    sources: Path, undisturbed: Path, tmp_path: Path, small_units: None
) -> None:
    """A limit on the size of files stands for the disk: the system refuses the write in the same way."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limit[1]))
    try:
        with pytest.raises(Interrupted, match=r"no room is left on the disk .* then the same command goes on"):
            prepared(sources, tmp_path / "out", workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    prepared(sources, tmp_path / "out")
    assert equal(tmp_path / "out", undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_disk_that_is_full(sources: Path, undisturbed: Path, small_disk: Path, small_units: None) -> None:
    (small_disk / "filler").write_bytes(bytes(430_000))
    with pytest.raises(Interrupted, match="no room is left on the disk"):
        prepared(sources, small_disk / "out")
    assert not (small_disk / "out").exists()
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    prepared(sources, small_disk / "out")
    assert equal(small_disk / "out", undisturbed)


def test_two_builds_into_one_directory(sources: Path, undisturbed: Path, tmp_path: Path) -> None:
    building = tmp_path / ".out.building"
    first = build_process(sources, "--out", tmp_path / "out", "--workers", 1, *OPTIONS)
    while not finished(building):
        assert first.poll() is None
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)
    with pytest.raises(ScfmError, match=rf"a build is under way here \(process {first.pid} on .* is building it\)"):
        prepared(sources, tmp_path / "out")
    with pytest.raises(ScfmError, match=rf"process {first.pid} on"):
        prepared(sources, tmp_path / "out", part="1/2")
    first.send_signal(signal.SIGCONT)
    _, complaints = first.communicate(timeout=120)
    assert first.returncode == 0, complaints
    assert equal(tmp_path / "out", undisturbed)


def test_a_source_or_folder_without_permission(sources: Path) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        secret = shutil.copy(sources / "a.h5ad", folder / "a.h5ad")
        os.chmod(secret, 0)
        with as_somebody(), pytest.raises(ScfmError, match=r"a\.h5ad: may not be read \(Permission denied\)"):
            prepare([secret], Path(tempfile.gettempdir()) / f"{folder.name}-out")
        os.chmod(secret, 0o644)
        folder.chmod(0o555)
        with as_somebody(), pytest.raises(ScfmError, match=r"out: cannot be written \(.*Permission denied"):
            prepare([secret], folder / "out")
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


@contextmanager
def as_somebody() -> Iterator[None]:
    """Be a user whom permissions bind, if this is root, for whom there are none."""
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(me)
