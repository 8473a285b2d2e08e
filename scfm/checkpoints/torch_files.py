"""Files that torch.save wrote, read without ever executing what a pickle asks for."""

from __future__ import annotations

import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scfm.errors import ScfmError

WEIGHTS = ("best_model.pt", "model.pt")


def weights_file(source: Path) -> Path:
    """Return the file of weights: `source` itself, or best_model.pt, model.pt or the only .pt or .pth file in it.

    Raises:
        ScfmError: there is none, or several and none of these names.
    """
    if source.is_file():
        return source
    for name in WEIGHTS:
        if (source / name).is_file():
            return source / name
    found = sorted([*source.glob("*.pt"), *source.glob("*.pth")])
    if len(found) == 1:
        return found[0]
    names = ", ".join(path.name for path in found) or "no .pt or .pth file"
    raise ScfmError(f"{source}: expected {' or '.join(WEIGHTS)}, found {names}; give the file itself")


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file that holds nothing else, by name. Raises ScfmError as `read_content` does."""
    return tensors_in(read_content(path), path)


def read_content(path: Path) -> Any:
    """Return what a file holds, its tensors mapped into memory where its format allows.

    Raises:
        ScfmError: the file is damaged, or asks for code to be executed.
    """
    zipped = zipfile.is_zipfile(path)
    damaged = ScfmError(f"{path}: is damaged or no torch file; copy it again from where it came")
    if zipped and not is_whole(path):  # torch does not look at checksums
        raise damaged
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # the file is refused or read, all the same
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True if zipped else None)
    except pickle.UnpicklingError as error:
        if not zipped and not is_pickle(path):
            raise damaged from error
        raise refusal(path, str(error)) from error
    except FileNotFoundError:
        raise ScfmError(f"{path}: there is no such file") from None
    except Exception as error:  # torch lets through whatever a reader of broken bytes raises
        raise damaged from error


def tensors_in(content: Any, path: Path) -> dict[str, Tensor]:
    """Return content that is tensors by name. Raises ScfmError where it is anything else."""
    if not isinstance(content, Mapping) or not content:
        raise ScfmError(f"{path}: holds no tensors by name but a {type(content).__name__}; {RESAVE}")
    other = [str(name) for name, value in content.items() if not isinstance(value, Tensor) or not isinstance(name, str)]
    if other:
        raise ScfmError(f"{path}: holds more than tensors by name: {', '.join(other[:5])}; {RESAVE}")
    return dict(content)


RESAVE = "save the weights alone, where they were trained: torch.save(model.state_dict(), 'best_model.pt')"


def refusal(path: Path, reason: str) -> ScfmError:
    said = next((line.strip() for line in reason.splitlines() if "GLOBAL" in line or "Unsupported" in line), "")
    detail = f" ({said})" if said else ""
    return ScfmError(
        f"{path}: holds code or objects other than tensors{detail}. scfm never executes what a file asks for, and "
        f"nothing of it was executed. If you trust its origin, {RESAVE}"
    )


def is_whole(path: Path) -> bool:
    """Say whether every member of a zip file has its checksum."""
    try:
        with zipfile.ZipFile(path) as members:
            return members.testzip() is None
    except zipfile.BadZipFile:
        return False


def is_pickle(path: Path) -> bool:
    """Say whether a file is well-formed as a pickle; its opcodes are read, not executed."""
    try:
        with path.open("rb") as file:
            for _ in pickletools.genops(file):
                pass
    except Exception:  # the parser raises whatever broken bytes lead to
        return False
    return True
