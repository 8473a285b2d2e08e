"""Checkpoints: in the background what they would be in the foreground, on time, and none is lost to a full disk."""

from __future__ import annotations

import errno
import subprocess
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import assert_same_run, logged
from runs import tiny_recipe, write_shards

from scfm.errors import ScfmError
from scfm.recipe import Recipe
from scfm.training import saving
from scfm.training.module import FoundationModule
from scfm.training.run import pretrain
from scfm.training.run_log import Lines
from scfm.training.saving import BackgroundCheckpoints, checkpoints, step_of, write_whole

STEPS = 15  # 6 to an epoch, which a validation ends


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("cells") / "shards")


def state() -> dict[str, Any]:
    weights = OrderedDict(a=torch.arange(5.0), b=torch.zeros(3, 4), empty=torch.zeros(0))
    weights["tied"] = weights["a"]
    weights._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    return {"state_dict": weights, "optimizer": [{"state": {0: {"step": torch.tensor(3.0)}}, "betas": (0.9, 0.99)}]}


def test_in_the_background_the_file_is_the_same(tmp_path: Path) -> None:
    write_whole(state(), tmp_path / "foreground.ckpt")
    files, live = BackgroundCheckpoints(tmp_path, keep=1), state()
    files.save_checkpoint(live, tmp_path / "step=1.ckpt")
    for tensor in live["state_dict"].values():
        tensor.fill_(7.0)  # training goes on
    files.wait()
    assert (tmp_path / "step=1.ckpt").read_bytes() == (tmp_path / "foreground.ckpt").read_bytes()
    assert not list(tmp_path.glob("*.tmp"))


def test_what_goes_wrong_in_the_thread_is_raised_in_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    files = BackgroundCheckpoints(tmp_path, keep=1)
    monkeypatch.setattr(saving, "write_whole", broken)
    files.save_checkpoint(state(), tmp_path / "step=1.ckpt")
    with pytest.raises(PermissionError):
        files.save_checkpoint(state(), tmp_path / "step=2.ckpt")


def test_old_checkpoints_go_when_a_new_one_is_safe(tmp_path: Path) -> None:
    files = BackgroundCheckpoints(tmp_path, keep=2)
    for step in (1, 2, 9, 3, 4):  # 9 is of a course that was given up for 2
        files.save_checkpoint(state(), tmp_path / f"step={step}.ckpt")
        files.save_checkpoint(state(), tmp_path / "best.ckpt")
    files.wait()
    assert [step_of(path) for path in checkpoints(tmp_path)] == [3, 4, 9]


def test_lines_that_find_no_room_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written in part, they are taken back, and come whole and in order when there is room."""
    lines, write = Lines(tmp_path / "log.txt"), Path.open
    lines.add("first\n")

    def full(self: Path, *args: Any, **options: Any) -> Any:
        class Disk:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def fileno(self) -> int:
                return file.fileno()

            def truncate(self, size: int) -> None:
                file.truncate(size)

            def write(self, data: bytes) -> int:
                if file.tell() > 8:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return file.write(data[:5])

        file = write(self, *args, **options)
        return Disk()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        lines.add("second, which is long\n")
        lines.add("third\n")
    assert lines.path.read_text() == "first\n"
    lines.add("fourth\n")
    assert lines.path.read_text() == "first\nsecond, which is long\nthird\nfourth\n"


class RealDisk:
    """A file system of a few MB."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.filler = folder, folder / "filler"

    def fill(self) -> None:
        with self.filler.open("wb", buffering=0) as file:
            for size in (65536, 64):
                with suppress(OSError):  # until there is no room for more
                    while True:
                        file.write(b"\0" * size)

    def free(self) -> None:
        self.filler.unlink()


class PretendedDisk:
    """Where no file system may be mounted: one that refuses what checkpoints write."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.full = folder, False
        write = saving._File.write

        def refused(file: saving._File, data: bytes) -> int:
            if self.full:
                file.error = OSError(errno.ENOSPC, "No space left on device")
                raise file.error
            return write(file, data)

        monkeypatch.setattr(saving._File, "write", refused)

    def fill(self) -> None:
        self.full = True

    def free(self) -> None:
        self.full = False


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RealDisk | PretendedDisk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    try:
        real = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        real = False
    if not real:
        yield PretendedDisk(folder, monkeypatch)
        return
    yield RealDisk(folder)
    subprocess.run(["umount", str(folder)], check=True)


def recipe_for(shards: Path, out: Path, **sections: Any) -> Recipe:
    sections["checkpoint"] = {"every_steps": 4} | sections.get("checkpoint", {})
    sections["trainer"] = {"max_steps": STEPS, "log_every_n_steps": 1} | sections.get("trainer", {})
    return tiny_recipe(shards, out, **sections)


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    pretrain(recipe_for(shards, out))
    return out


def in_steps(monkeypatch: pytest.MonkeyPatch, acts: dict[int, Callable[[], None]]) -> None:
    """Do something in the middle of some steps, once each."""
    look = FoundationModule.look

    def watched(self: FoundationModule, *args: Any) -> Any:
        if self.training and self.global_step in acts:
            acts.pop(self.global_step)()
        return look(self, *args)

    monkeypatch.setattr(FoundationModule, "look", watched)


@pytest.mark.parametrize(
    ("full", "free", "refused"),
    [(7, 10, "step=000000008"), (11, 13, "best")],
    ids=["a checkpoint", "the best weights"],
)
def test_a_full_disk_costs_nothing(
    shards: Path,
    undisturbed: Path,
    disk: RealDisk | PretendedDisk,
    monkeypatch: pytest.MonkeyPatch,
    full: int,
    free: int,
    refused: str,
) -> None:
    """The step at which there is no room, and the one at which there is again; validations are at 6, 12 and the end."""
    in_steps(monkeypatch, {full: disk.fill, free: disk.free})
    out = disk.folder / "run"
    pretrain(recipe_for(shards, out))
    log = (out / "log.txt").read_text()
    assert f"{refused}.ckpt: NOT saved, no space left on device; the checkpoints before it stay" in log
    counted = [row for row in logged(out) if row[1] == "checkpoint/not_saved"]
    assert counted
    kept = [row for row in logged(out) if row not in counted]
    assert kept == logged(undisturbed)
    assert_same_weights(out, undisturbed)
    assert step_of(checkpoints(out / "checkpoints")[-1]) == (12 if refused != "best" else 8)


def assert_same_weights(out: Path, other: Path) -> None:
    assert (out / "model/model.safetensors").read_bytes() == (other / "model/model.safetensors").read_bytes()


def test_a_disk_that_stays_full_ends_the_run_with_the_reason(
    shards: Path, undisturbed: Path, disk: RealDisk | PretendedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_steps(monkeypatch, {14: disk.fill})
    out = disk.folder / "run"
    with pytest.raises(ScfmError, match=r"no space left.*--resume auto"):
        pretrain(recipe_for(shards, out))
    assert not (out / "model").exists()
    disk.free()
    pretrain(recipe_for(shards, out), resume="auto")
    assert_same_weights(out, undisturbed)


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_checkpoints_by_the_clock(shards: Path, tmp_path: Path, devices: int) -> None:
    """So often that every step is one; of two processes the first one's clock counts, and its word takes a step."""
    two = {"devices": 2, "strategy": "ddp_fork"} if devices == 2 else {}
    section = {"every_steps": 1000, "every_minutes": 1e-9, "keep": 99}
    pretrain(recipe_for(shards, tmp_path / "run", checkpoint=section, trainer={"max_steps": 6, **two}))
    steps = [step_of(path) for path in checkpoints(tmp_path / "run" / "checkpoints")]
    assert steps == ([1, 2, 3, 4, 5] if devices == 1 else [1, 3, 5])


def test_a_clock_that_is_off_counts_no_minutes(shards: Path, tmp_path: Path) -> None:
    section = {"every_steps": 4, "every_minutes": 0}
    recipe = recipe_for(shards, tmp_path / "run", checkpoint=section, trainer={"max_steps": 6})
    pretrain(recipe)
    assert [step_of(path) for path in checkpoints(tmp_path / "run" / "checkpoints")] == [4]


def test_what_is_resumed_is_the_same_whenever_it_was_saved(shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    recipe = recipe_for(shards, tmp_path / "run", checkpoint={"every_minutes": 1e-9, "keep": 99})
    pretrain(recipe)
    pretrain(recipe, resume=str(tmp_path / "run" / "checkpoints" / "step=000000007.ckpt"))
    assert_same_run(tmp_path / "run", undisturbed)
