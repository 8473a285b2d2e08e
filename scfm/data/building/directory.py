"""The hidden directory of a build that is under way: who works in it, what is finished, and how it ends.

    .OUT.building/
      lock, part-*.lock   held while a process works here
      options.json        what the build was asked for
      sources/            which cells of a Census are chosen
      survey/             what each source holds
      genes/              lists of genes and where they stand in the vocabulary
      chosen/             which rows of each source are wanted
      plan.json           all decisions that the units depend on; from here on every step is a pure function of it
      units/              the cells of each unit, dealt to buckets
      shard-*.json        what the manifest says of each finished shard
      out/                what becomes OUT

A file takes its name only when it is whole, so whatever has its name is finished.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scfm.errors import ScfmError

PLANNING, BUILDING = "planning", "building"
PATIENCE = 5
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Interrupted(ScfmError):
    """A build that stopped half-way for a reason that lies outside it: the same command takes it up again."""


def building_directory(out: Path) -> Path:
    """Return where a build of `out` is under way."""
    return out.with_name(f".{out.name}.building")


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Give a name to write a file under; it takes its own name when it is whole, and leaves nothing if it fails.

    Raises Interrupted where the disk is full.
    """
    # threads of one process (Dask has such) write the gene list that their sources share
    mine = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    temporary = path.with_name(f"{path.name}.{mine}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise Interrupted(
                f"{path.parent}: no room is left on the disk ({error.strerror}); what is finished is kept: make room, "
                "then the same command goes on"
            ) from error
        raise


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file under its name only when it is whole."""
    with written(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file of the building directory."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def locked(building: Path, name: str, role: str, wait_while: str | None = None) -> Iterator[None]:
    """Hold a lock of a building directory, which is made where it is absent; it ends with the process, however it ends.

    Args:
        building: the directory.
        name: of the lock's file.
        role: what this process is doing, for others to read.
        wait_while: wait for a holder that is doing this; another holder is an error.

    Raises ScfmError that names the process and host that hold the lock.
    """
    looks = 0
    while True:
        try:
            building.mkdir(parents=True, exist_ok=True)
            file = (building / name).open("a+")
        except FileNotFoundError:
            continue  # the build that was here has just finished, and took the directory away
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(building / name)
                # who has just taken the lock may not have signed it yet: what stands there is then of another
                if wait_while and (holder.get("role") == wait_while or looks < PATIENCE):
                    looks = 0 if holder.get("role") == wait_while else looks + 1
                    time.sleep(0.2)
                    continue
                raise ScfmError(_busy(building, holder)) from None
            try:
                same = os.fstat(file.fileno()).st_ino == (building / name).stat().st_ino
            except FileNotFoundError:
                same = False
            if not same:
                continue
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "role": role}))
            file.flush()
            yield
            return


def refuse_running_parts(building: Path) -> None:
    """Raise ScfmError where a part of the build is being made by another process."""
    for path in sorted(building.glob("part-*.lock")):
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ScfmError(_busy(building, _holder(path))) from None


def _holder(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path))
    except (OSError, ValueError):
        return {}  # between taking the lock and signing it


def _busy(building: Path, holder: dict[str, Any]) -> str:
    who = f"process {holder['pid']} on {holder['host']} is {holder['role']} it" if holder else "another process has it"
    return f"{building}: a build is under way here ({who}); wait for it to end, or name another --out"


def remove(building: Path) -> None:
    """Remove a building directory; its lock goes last, so that nobody meets half of it."""
    for path in building.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()
    shutil.rmtree(building)


def clear(building: Path) -> None:
    """Remove all of a building directory but the locks."""
    for path in building.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix != ".lock" and path.name != "lock":
            path.unlink()
