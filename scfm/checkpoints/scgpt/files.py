"""The files of an scGPT checkpoint: weights read without ever executing what a pickle asks for, and args.json."""

from __future__ import annotations

import json
import pickle
import pickletools
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scfm.errors import ScfmError

WEIGHTS = ("best_model.pt", "model.pt")


def weights_file(source: Path) -> Path:
    """Return the file that holds the weights: `source` itself, or best_model.pt, model.pt or the only .pt in it.

    Raises:
        ScfmError: there is none, or several and none of these names.
    """
    if source.is_file():
        return source
    for name in WEIGHTS:
        if (source / name).is_file():
            return source / name
    found = sorted(source.glob("*.pt"))
    if len(found) == 1:
        return found[0]
    names = ", ".join(path.name for path in found) or "no .pt file"
    raise ScfmError(f"{source}: expected {' or '.join(WEIGHTS)}, found {names}; give the file itself")


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .pt file by name, mapped into memory where its format allows.

    Raises:
        ScfmError: the file is damaged, holds anything but tensors, or asks for code to be executed.
    """
    zipped = zipfile.is_zipfile(path)
    damaged = ScfmError(f"{path}: is damaged or no torch file; copy it again from where it came")
    if zipped and not is_whole(path):  # torch does not look at checksums
        raise damaged
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # the file is refused or read, all the same
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True if zipped else None)
    except pickle.UnpicklingError as error:
        if not zipped and not is_pickle(path):
            raise damaged from error
        raise refusal(path, str(error)) from error
    except FileNotFoundError:
        raise ScfmError(f"{path}: there is no such file") from None
    except Exception as error:  # torch lets through whatever a reader of broken bytes raises
        raise damaged from error
    if not isinstance(content, dict) or not content:
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


def read_args(path: Path) -> dict[str, Any]:
    """Return the content of args.json. Raises ScfmError where it is missing or no JSON object."""
    try:
        args = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ScfmError(f"{path}: there is no such file; name the args.json of the model with --args") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ScfmError(f"{path}: is not JSON ({error})") from error
    if not isinstance(args, dict):
        raise ScfmError(f"{path}: holds a {type(args).__name__}; expected an object of settings")
    return args
