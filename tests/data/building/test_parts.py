"""A build on several machines, on a Dask cluster, or in processes that die, makes what one process makes."""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
from corpora import OPTIONS, build_process, equal, prepared

from scfm.data.building import build as build_module
from scfm.data.building.directory import Interrupted
from scfm.errors import ScfmError


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
