"""A build that is killed at any moment goes on where it was and ends with the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from corpora import OPTIONS, build_process, equal, finished, prepared


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
