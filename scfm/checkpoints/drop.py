"""What `--drop` leaves behind: tensors of a checkpoint that is read, whole heads of a model that is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from scfm.checkpoints.native import ModelFiles
from scfm.errors import ScfmError
from scfm.model.heads import HeadSpec


def matching(patterns: Sequence[str], tensors: Iterable[str], source: str) -> list[str]:
    """Return the names that match any pattern. Raises ScfmError naming the source where a pattern matches none."""
    names = list(tensors)
    idle = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    if idle:
        raise ScfmError(f"{source}: --drop {' '.join(idle)} matches no tensor")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def without(files: ModelFiles, drop: Sequence[str], tensors: Iterable[str]) -> tuple[list[HeadSpec], list[str]]:
    """Return the heads that patterns of tensor names leave, and the tensors that they drop.

    Raises ScfmError where a pattern matches nothing, or a part of a head, or anything but heads.
    """
    names = list(tensors)
    dropped = matching(drop, names, "the model")
    kept = [name for name in names if name not in dropped]
    heads = [head for head in files.heads if not any(name.startswith(f"heads.{head.task}.") for name in dropped)]
    tasks = {head.task for head in files.heads} - {head.task for head in heads}
    torn = [name for name in dropped if not any(name.startswith(f"heads.{task}.") for task in tasks)]
    torn += [name for name in kept if any(name.startswith(f"heads.{task}.") for task in tasks)]
    if torn:
        raise ScfmError(f"--drop: only whole heads can be left behind, heads.TASK.*; not {', '.join(torn[:5])}")
    return heads, dropped
