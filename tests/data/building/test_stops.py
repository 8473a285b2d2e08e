"""A build that is stopped, however it is, goes on where it was and ends with the same bytes."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import pytest
from corpora import build_process, corpus, profiles, same_directories, unchanged, write_source

from scfm.data.building import build as build_module
from scfm.data.building import workers as workers_module
from scfm.data.building.directory import Interrupted
from scfm.data.h5ad import H5adSource
from scfm.data.prepare import prepare
from scfm.data.shards import open_shards, read_manifest
from scfm.errors import ScfmError

SIZES = (300, 200, 250)
OPTIONS = ["--obs", "cell", "--cells-per-shard", "60", "--hold-out-by", "donor_id", "--hold-out-fraction", "0.1"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus") / "files", SIZES)


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "VALUES_PER_UNIT", 2_000)


@pytest.fixture(scope="module")
def undisturbed(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the sources in one go, with units of the usual size."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    prepared(sources, out)
    assert unchanged(out, *(("abc"[i], profiles(n, i)) for i, n in enumerate(SIZES)))
    return out


def prepared(sources: Path, out: Path, **options: object) -> None:
    keys = {"obs": ["cell"], "cells_per_shard": 60, "hold_out_by": "donor_id", "hold_out_fraction": 0.1}
    prepare([sources], out, **(keys | options))  # type: ignore[arg-type]


def equal(out: Path, undisturbed: Path) -> bool:
    """The same bytes, the same hash, and no trace of the work."""
    left = [path for path in out.parent.iterdir() if path != out and path.name.startswith(".")]
    hashes = [read_manifest(directory)["hash"] for directory in (out, undisturbed)]
    return not left and hashes[0] == hashes[1] and same_directories(out, undisturbed)


def test_units_and_processes_change_nothing(
    sources: Path, undisturbed: Path, tmp_path: Path, small_units: None
) -> None:
    prepared(sources, tmp_path / "one", workers=1)
    assert equal(tmp_path / "one", undisturbed)
    prepared(sources, tmp_path / "four", workers=4)
    assert equal(tmp_path / "four", undisturbed)


# -- killed


def finished(building: Path) -> dict[str, int]:
    """Return the finished pieces of work, each with the time that it was finished at."""
    places = [*building.glob("survey/*.json"), *building.glob("units/*.npz"), *building.glob("shard-*.json")]
    times = {}
    for path in places:
        with suppress(FileNotFoundError):  # a build that is done tidies up
            times[path.name] = path.stat().st_mtime_ns
    return times


def descendants(pid: int) -> set[int]:
    children = {int(c) for path in Path(f"/proc/{pid}/task").glob("*/children") for c in path.read_text().split()}
    return children.union(*(descendants(child) for child in children)) if children else set()


class Forked:
    """A build in a copy of this process, which is much quicker to start than a fresh one."""

    def __init__(self, build: Callable[[], object]) -> None:
        self.pid = os.fork()
        self.returncode: int | None = None
        if self.pid == 0:
            try:
                build()
            finally:
                os._exit(0)

    def poll(self) -> int | None:
        if self.returncode is None and os.waitpid(self.pid, os.WNOHANG)[0]:
            self.returncode = 0
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def killed(build: subprocess.Popen[str] | Forked, out: Path, chance: random.Random) -> bool:
    """Kill a build as soon as it has made some more pieces; say whether it was still running then.

    No finished piece is ever made again, nothing half is visible, and no process outlives the build.
    """
    building = out.with_name(f".{out.name}.building")
    before = finished(building)
    aim = len(before) + chance.randrange(1, 15)
    while build.poll() is None and len(finished(building)) < aim:
        time.sleep(0.001)
    time.sleep(chance.random() * 0.05)
    if build.poll() is not None:
        return False
    family = descendants(build.pid)
    build.kill()
    hit = build.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in family) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]
    assert not out.exists() or (out / "manifest.json").exists()
    now = finished(building)
    assert {name: now.get(name) for name in before} == before or out.exists()
    return hit


def test_a_build_that_is_killed_goes_on(sources: Path, undisturbed: Path, tmp_path: Path, small_units: None) -> None:
    chance, out = random.Random(0), tmp_path / "out"
    assert killed(Forked(lambda: prepared(sources, out, workers=1)), out, chance)
    assert killed(build_process(sources, "--out", out, "--workers", 2, *OPTIONS), out, chance)
    assert killed(Forked(lambda: prepared(sources, out, workers=1)), out, chance)
    prepared(sources, out)
    assert equal(out, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_storm_of_kills(sources: Path, undisturbed: Path, tmp_path: Path) -> None:
    chance, kills = random.Random(1), 0
    while kills < 25:
        out = tmp_path / f"{kills}/out"
        out.parent.mkdir()
        command = [sources, "--out", out, *OPTIONS, "--workers"]
        while not out.exists():
            kills += killed(build_process(*command, chance.choice([1, 2, 3])), out, chance)
        prepared_again = build_process(*command, 1)  # tidies up after one that was killed in its last moment
        prepared_again.communicate(timeout=120)
        assert equal(out, undisturbed)


@pytest.mark.parametrize("stage", ["_plan", "_make_units", "_make_shards"])
def test_a_build_that_dies_before_a_stage_goes_on(
    sources: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

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
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "remove", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepared(sources, tmp_path / "out")
    with pytest.raises(ScfmError, match="out: holds something already"):
        prepared(sources, tmp_path / "out", seed=5)
    prepared(sources, tmp_path / "out")
    assert equal(tmp_path / "out", undisturbed)


# -- options and sources that change


@pytest.fixture
def stopped(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_units: None) -> Path:
    """A build of a copy of the sources, stopped after all of its units; return where it is to stand."""
    shutil.copytree(sources, tmp_path / "files")
    with monkeypatch.context() as patch:
        patch.setattr(build_module.Build, "_make_shards", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            prepared(tmp_path / "files", tmp_path / "out")
    return tmp_path / "out"


def test_other_options_are_refused_by_name(stopped: Path, undisturbed: Path) -> None:
    files = stopped.parent / "files"
    with pytest.raises(ScfmError, match=r"other options \(--seed: was 0, is 7; --min-genes: was 0, is 3\).*--restart"):
        prepared(files, stopped, seed=7, min_genes=3)
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
        patch.setattr(build_module.Build, "_make_shards", lambda *_: os.kill(os.getpid(), signal.SIGINT))
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


# -- larger than one machine


def test_parts_and_a_merge_make_the_same(sources: Path, undisturbed: Path, tmp_path: Path, small_units: None) -> None:
    for part in (2, 3):
        prepared(sources, tmp_path / "out", part=f"{part}/3")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ScfmError, match=r"\d+ of \d+ units are missing; give the parts that did not finish again"):
        prepared(sources, tmp_path / "out", merge=True)
    prepared(sources, tmp_path / "out", part="1/3")
    prepared(sources, tmp_path / "out", merge=True)
    assert equal(tmp_path / "out", undisturbed)


def test_parts_that_start_at_once_share_one_plan(sources: Path, undisturbed: Path, tmp_path: Path) -> None:
    common = [sources, "--out", tmp_path / "out", "--workers", 1, *OPTIONS]
    parts = [build_process(*common, "--part", f"{part}/2") for part in (1, 2)]
    for process in parts:
        _, complaints = process.communicate(timeout=120)
        assert process.returncode == 0, complaints
    prepared(sources, tmp_path / "out", merge=True)
    assert equal(tmp_path / "out", undisturbed)


def test_a_running_part_is_not_merged(stopped: Path) -> None:
    from scfm.data.building.directory import building_directory, locked

    held = locked(building_directory(stopped), "part-1-of-2.lock", "making part 1 of 2 of")
    with held, pytest.raises(ScfmError, match=rf"process {os.getpid()} on .* is making part 1 of 2 of it"):
        prepared(stopped.parent / "files", stopped, merge=True)


def test_dask_does_the_work_of_processes(
    sources: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_units: None
) -> None:
    calls: list[str] = []

    class DaskExecutor(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True) -> None:  # no more than Dask's takes
            super().shutdown(wait)

    class Client:
        def __init__(self, address: str) -> None:
            calls.append(address)

        def __enter__(self) -> Client:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def get_executor(self, *, pure: bool) -> DaskExecutor:
            assert pure is False
            return DaskExecutor(2)

    module = ModuleType("distributed")
    module.Client = Client  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "distributed", module)
    prepared(sources, tmp_path / "out", dask="tcp://scheduler:8786")
    assert set(calls) == {"tcp://scheduler:8786"}
    assert equal(tmp_path / "out", undisturbed)


def test_dask_that_is_not_installed_is_named(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ScfmError, match=r"pip install 'scfm\[dask\]'"):
        prepared(sources, tmp_path / "out", dask="tcp://scheduler:8786")


def test_a_worker_that_dies_is_named_and_the_build_goes_on(
    sources: Path, undisturbed: Path, tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "make_unit", _die)
        with pytest.raises(Interrupted, match=r"a worker process ended before its time \(out of memory\?"):
            prepared(sources, tmp_path / "out", workers=2)
    prepared(sources, tmp_path / "out", workers=2)
    assert equal(tmp_path / "out", undisturbed)


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
