"""Checkpoint files: written in the background, whole or not at all, and a full disk costs none of those there are."""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from scfm.errors import ScfmError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk, in the quota, or for a file of that size
UNFINISHED = ".tmp"


class BackgroundCheckpoints(TorchCheckpointIO):
    """Copies a state to the CPU, and lets a thread write it while training goes on.

    Files are written one after another in the order in which they were asked for: a checkpoint that knows of
    `best.ckpt` is never there before it. Asking for one waits for the last to be written, so that at most one copy of
    a state is in memory. What goes wrong in the thread is raised at the next call; only a full disk is not an error,
    but a line in `news` and one more in `not_saved`.

    Args:
        folder: checkpoints in it are written in the background, others at once.
        keep: how many resumable checkpoints are kept; older ones go when a new one is safe.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.not_saved = 0
        self.news: list[str] = []
        self.writing: Future[None] | None = None
        self.waiting: dict[Path, Any] = {}  # states that are still to be written, the best weights before all others
        self.thread: ThreadPoolExecutor | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path).absolute()
        if path.parent.resolve() != self.folder.resolve():
            write_whole(checkpoint, path)
            return
        self.wait()
        # the new state makes those needless that found no room, but not the best weights
        self.waiting = {other: state for other, state in self.waiting.items() if not is_resumable(other)}
        self.waiting.pop(path, None)
        self.waiting[path] = on_cpu(checkpoint)
        if self.thread is None:
            self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self.writing = self.thread.submit(self.write)

    def write(self) -> None:
        """Write what is waiting, and drop the checkpoints that it replaces; where there is no room, leave the rest."""
        for path, state in list(self.waiting.items()):
            try:
                write_whole(state, path)
            except OSError as error:
                if not is_full(error):
                    raise
                self.not_saved += 1
                self.news.append(
                    f"{path}: NOT saved, {os.strerror(error.errno or 0).lower()}; the checkpoints before it stay, and "
                    "the run goes on and tries again at the next interval: free some space"
                )
                return
            del self.waiting[path]
            if is_resumable(path):
                before = [old for old in checkpoints(self.folder) if step_of(old) <= step_of(path)]
                for old in before[: -self.keep]:
                    old.unlink()

    def wait(self) -> None:
        """Wait for the file that is being written; raise what went wrong, a full disk aside."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def finish(self) -> None:
        """Wait for all files at the end of a run. Raises ScfmError where there is no room for the best weights."""
        self.wait()
        if any(not is_resumable(path) for path in self.waiting):
            self.write()
        for path in self.waiting:
            if not is_resumable(path):
                raise ScfmError(
                    f"{path}: there is no space left for the best weights of the run; free some, and continue with "
                    "--resume auto"
                )

    def teardown(self) -> None:
        self.wait()


def write_whole(state: Any, path: Path) -> None:
    """Write a state to a file that is there when all of it is on the disk, and not before.

    Raises the OSError of a disk that is full, after which nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + UNFINISHED)
    file = _File(unfinished)
    try:
        torch.save(state, file)  # type: ignore[arg-type]
        file.sync()
        file.close()
    except Exception as error:
        with suppress(OSError):  # what was buffered has no room either
            file.close()
        unfinished.unlink()
        if file.error is not None and file.error is not error:
            raise file.error from error
        raise
    os.replace(unfinished, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # else the new name could be lost in a power cut, and the old file be gone
    finally:
        os.close(folder)


class _File:
    """A file that remembers why it could not be written: what `torch.save` raises then does not say it.

    Args:
        path: created, or emptied.
    """

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        with self._remembering():
            return self.file.write(data)

    def flush(self) -> None:
        with self._remembering():
            self.file.flush()

    def sync(self) -> None:
        """Wait until all of it is on the disk."""
        with self._remembering():
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        with self._remembering():
            self.file.close()

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = error
            raise


def on_cpu(state: Any) -> Any:
    """Return a copy of a state whose tensors are on the CPU, and those that were one are one again."""
    copied: dict[Any, torch.Tensor] = {}

    def copy_of(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            key = part.device, part.data_ptr(), part.dtype, tuple(part.shape), part.stride()
            if key not in copied or not part.numel():
                copied[key] = part.detach().to("cpu", copy=True)
            return copied[key]
        if isinstance(part, dict):
            new = copy.copy(part)  # of its own kind, with what hangs on it, as the `_metadata` of a state_dict
            new.update({key: copy_of(value) for key, value in part.items()})
            return new
        if isinstance(part, list):
            return [copy_of(value) for value in part]
        if isinstance(part, tuple):
            return tuple(copy_of(value) for value in part)
        return copy.deepcopy(part)

    return copy_of(state)


def is_full(error: BaseException) -> bool:
    """Say whether something could not be written because there was no room for it."""
    # safetensors has errors of its own, which hold the system's only as text
    return (isinstance(error, OSError) and error.errno in FULL) or os.strerror(errno.ENOSPC) in str(error)


def is_resumable(path: Path) -> bool:
    """Say whether a file of the checkpoints folder is one that a run can continue from, by its name."""
    return path.match("step=*.ckpt")


def checkpoints(folder: Path) -> list[Path]:
    """Return the resumable checkpoints of a run, earliest step first."""
    return sorted(filter(is_resumable, folder.glob("*.ckpt")), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the optimizer steps taken at a checkpoint."""
    return int(checkpoint.stem.removeprefix("step="))


def drop_unfinished(folder: Path) -> None:
    """Remove what a killed run has left half-written."""
    for left in folder.glob(f"*{UNFINISHED}"):
        left.unlink()
