"""Model directories on the Hugging Face Hub: pushed as they are, loaded by name.

What is pushed is a native model directory and nothing else; what is fetched are the files of one, all of them JSON,
text or safetensors, none of which can hold code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scfm.errors import ScfmError
from scfm.redaction import redacted
from scfm.version import __version__

FILES = (
    "config.json",
    "vocab.json",
    "model.safetensors",
    "conditions.json",
    "training_data.json",
    "cells.hash",
    "README.md",
)
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_folder(place: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """Return the local folder of a model: a path as it is, a name on the Hub (`org/name`) once it is fetched.

    What lies on this disk comes first, and so does a path whose first folder does: `runs/model` is no name where there
    is a folder `runs`. A Path is never a name.

    Args:
        place: a path, or as text a name on the Hub.
        revision: branch, tag or commit of a model on the Hub; its newest commit if not given.
        token: for models that are not public; that of `hf auth login` or HF_TOKEN if not given.

    Raises ScfmError where the Hub has no such model, or cannot be reached.
    """
    path = Path(place)
    named = isinstance(place, str) and NAME.fullmatch(place)
    if not named or path.exists() or Path(path.parts[0]).exists():
        if revision is not None:
            raise ScfmError(f"{place}: is no name on the Hub, so it has no revision {revision}")
        return path
    with asked_of_the_hub(f"{place}: is no folder here, and from the Hub it cannot be fetched", token):
        import huggingface_hub

        options: dict[str, Any] = {"library_name": "scfm", "library_version": __version__}
        fetched = huggingface_hub.snapshot_download(
            str(place), revision=revision, token=token, allow_patterns=list(FILES), **options
        )
    folder = Path(str(fetched))
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise ScfmError(f"{place}: the Hub has it, but it is not an scfm model (config.json, model.safetensors)")
    return folder


def push_folder(
    folder: Path, name: str, *, private: bool = True, token: str | None = None, message: str | None = None
) -> str:
    """Make a repository on the Hub hold exactly a model directory; return its URL.

    Args:
        folder: a native model directory.
        name: `org/name`; created where it is not there yet, and emptied of files that the directory does not have.
        private: whether only its owners see a repository that is created now.
        token: with the right to write; that of `hf auth login` or HF_TOKEN if not given.
        message: of the commit.

    Raises ScfmError where the folder holds other files, or the Hub refuses.
    """
    if not NAME.fullmatch(name):
        raise ScfmError(f"{name}: is no name on the Hub; it has the form org/name")
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    if other := sorted(there - set(FILES)):
        raise ScfmError(f"{folder}: holds files that are no part of a model, and are not published: {', '.join(other)}")
    if missing := sorted({"config.json", "vocab.json", "model.safetensors"} - there):
        raise ScfmError(f"{folder}: is not a model directory: {', '.join(missing)} is not there")
    with asked_of_the_hub(f"{name}: cannot be pushed to the Hub", token):
        import huggingface_hub

        hub = huggingface_hub.HfApi(token=token, library_name="scfm", library_version=__version__)
        hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=message or f"Written by scfm {__version__}",
            allow_patterns=list(FILES),
            delete_patterns=["*"],
        )
    return f"https://huggingface.co/{name}"


@contextmanager
def asked_of_the_hub(failure: str, token: str | None) -> Iterator[None]:
    """Word what the Hub, or the way to it, says against a request; without the token in it."""
    try:
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise ScfmError(f"{failure}: huggingface_hub is not installed; pip install 'scfm[hub]'") from None
    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = redacted(" ".join(str(error).split()), token)
        raise ScfmError(
            f"{failure} ({type(error).__name__}: {reason}). Check the name and the network; models that are not public "
            "need `hf auth login` or HF_TOKEN"
        ) from None  # the original may hold the token in its request
