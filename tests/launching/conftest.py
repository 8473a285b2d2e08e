"""Places to launch from, with scfm on their PATH: the real one, or a stand-in that does what a test says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launchpad import ROOT, Launchpad, until
from runs import tiny_recipe, write_shards

HERE = Path(__file__).parent


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[Launchpad]:
    """A place to launch a stand-in for scfm from, on a machine with two GPUs."""
    place = Launchpad(tmp_path, [HERE / "stub", HERE / "bin"])
    yield place
    place.end()


@pytest.fixture(scope="session")
def warm_scfm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The socket of a process that has imported scfm."""
    place = tmp_path_factory.mktemp("warm") / "socket"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "warm_scfm.py"), str(place)]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    until(place.exists, 120)
    yield str(place)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def real(tmp_path: Path, warm_scfm: str) -> Iterator[Launchpad]:
    """A place to launch scfm itself from, with shards and a tiny recipe."""
    place = Launchpad(tmp_path, [HERE / "bin"], WARM_SCFM=warm_scfm)
    write_shards(tmp_path / "shards")
    tiny_recipe(tmp_path / "shards", tmp_path / "run").save(tmp_path / "recipe.yaml")
    yield place
    place.end()
