"""A local folder in the place of the Hugging Face Hub: takes the calls of its client, with the client's signatures."""

from __future__ import annotations

import inspect
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

REAL = {name: getattr(huggingface_hub.HfApi, name) for name in ("__init__", "create_repo", "upload_folder")}
REAL["snapshot_download"] = huggingface_hub.snapshot_download


def bound(name: str, *given: Any, **named: Any) -> dict[str, Any]:
    """Return the arguments as the real client takes them; one that it does not know is a TypeError."""
    call = inspect.signature(REAL[name]).bind(*given, **named)
    call.apply_defaults()
    return dict(call.arguments)


class HubDouble:
    """Repositories below a folder.

    Attributes:
        folder: repositories, by their names.
        private: those that were created as such.
        tokens: with which the client was called.
        reachable: whether the network works.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.private, self.tokens, self.reachable = folder, set[str](), list[Any](), True
        monkeypatch.setattr(huggingface_hub, "HfApi", self.client)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def client(self, *given: Any, **named: Any) -> HubDouble:
        self.tokens.append(bound("__init__", self, *given, **named)["token"])
        return self

    def expect_network(self) -> None:
        if not self.reachable:
            raise OSError(f"no route to host; the request was sent with {self.tokens[-1]}")

    def create_repo(self, *given: Any, **named: Any) -> None:
        self.expect_network()
        asked = bound("create_repo", self, *given, **named)
        repository = self.folder / asked["repo_id"]
        if not repository.exists():
            repository.mkdir(parents=True)
            (repository / ".gitattributes").touch()
            self.private |= {asked["repo_id"]} if asked["private"] else set()
        elif not asked["exist_ok"]:
            raise OSError("409 conflict")

    def upload_folder(self, *given: Any, **named: Any) -> None:
        asked = bound("upload_folder", self, *given, **named)
        repository, source = self.folder / asked["repo_id"], Path(asked["folder_path"])
        for old in repository.iterdir():
            if old.name != ".gitattributes" and any(fnmatch(old.name, p) for p in asked["delete_patterns"] or []):
                old.unlink()
        for path in source.iterdir():
            if asked["allow_patterns"] is None or any(fnmatch(path.name, p) for p in asked["allow_patterns"]):
                shutil.copy(path, repository / path.name)

    def snapshot_download(self, *given: Any, **named: Any) -> str:
        asked = bound("snapshot_download", *given, **named)
        self.tokens.append(asked["token"])
        self.expect_network()
        repository = self.folder / asked["repo_id"]
        if asked["revision"] not in (None, "main") or not repository.is_dir():
            raise RepositoryNotFoundError(f"404 for {asked['repo_id']}", response=FakeResponse())
        cached = self.folder / "cache" / asked["repo_id"]
        shutil.rmtree(cached, ignore_errors=True)
        cached.mkdir(parents=True)
        for path in repository.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in asked["allow_patterns"] or ["*"]):
                shutil.copy(path, cached / path.name)
        return str(cached)


class FakeResponse:
    """What the client's errors read off an answer."""

    headers: dict[str, str] = {}
    status_code = 404
    request = None
