"""The script that downloads CELLxGENE collections, against a server of our own that drops connections."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import pytest

from scfm.errors import ScfmError

SCRIPT = Path(__file__).parents[2] / "scripts/data/download_cellxgene.py"
COLLECTION = "4195ab4c-20bd-4cd3-8b3d-65601277e731"
DATASETS = [f"0000000{i}-20bd-4cd3-8b3d-65601277e731" for i in range(3)]


def h5ad(seed: int) -> bytes:
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file["X"] = np.random.default_rng(seed).integers(0, 255, 60_000, np.uint8)
        file.create_group("obs")
        file.create_group("var")
    return content.getvalue()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("download_cellxgene", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "download_cellxgene", module)  # dataclasses look it up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PAUSE", 0.001)
    return module


class Server:
    """Files by path; `drops` says after how many bytes the next connections for a path close, `fails` their status."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.drops: dict[str, list[int]] = {}
        self.fails: dict[str, list[int]] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.takes_ranges = True
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers.get("Range")
                outer.asked.append((self.path, asked))
                if outer.fails.get(self.path):
                    self.send_error(outer.fails[self.path].pop(0))
                    return
                if self.path not in outer.files:
                    self.send_error(404)
                    return
                content = outer.files[self.path]
                first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and outer.takes_ranges else 0
                if first >= len(content) > 0:
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(206 if first else 200)
                self.send_header("Content-Length", str(len(content) - first))
                if first:
                    self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
                self.end_headers()
                sent = content[first:]
                if outer.drops.get(self.path):
                    sent = sent[: outer.drops[self.path].pop(0)]
                self.wfile.write(sent)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.files |= {f"/{id}.h5ad": h5ad(seed) for seed, id in enumerate(DATASETS)}
        self.describe()

    def describe(self, version: str = "v1", **sizes: int) -> None:
        """Describe the collection, by the true sizes unless others are given by dataset number (`of_0=...`)."""
        datasets = [
            {
                "dataset_id": id,
                "dataset_version_id": f"{version}-{i}",
                "title": f"title {i}",
                "assets": [
                    {"filetype": "RDS", "url": f"{self.url}/{id}.rds", "filesize": 3},
                    {
                        "filetype": "H5AD",
                        "url": f"{self.url}/{id}.h5ad",
                        "filesize": sizes.get(f"of_{i}", len(self.files[f"/{id}.h5ad"])),
                    },
                ],
            }
            for i, id in enumerate(DATASETS)
        ]
        self.files[f"/collections/{COLLECTION}"] = json.dumps({"datasets": datasets}).encode()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    served = Server()
    thread = threading.Thread(target=served.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    served.http.shutdown()
    served.http.server_close()
    thread.join()


def stored(folder: Path, number: int = 0) -> Path:
    return folder / COLLECTION / f"{DATASETS[number]}.h5ad"


def test_a_collection_comes_whole_over_connections_that_drop(
    script: ModuleType, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    server.drops[f"/{DATASETS[0]}.h5ad"] = [1_000, 0, 20_000, 7]
    server.drops[f"/collections/{COLLECTION}"] = [10]
    server.fails[f"/{DATASETS[1]}.h5ad"] = [503, 429]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path), COLLECTION, "--api", server.url])
    assert script.main() == 0
    for number, id in enumerate(DATASETS):
        assert stored(tmp_path, number).read_bytes() == server.files[f"/{id}.h5ad"]
    ranges = [asked for path, asked in server.asked if path == f"/{DATASETS[0]}.h5ad"]
    assert ranges == [None, "bytes=1000-", "bytes=1000-", "bytes=21000-", "bytes=21007-"]
    listed = json.loads((tmp_path / "downloaded.json").read_text())
    entry = listed[f"{COLLECTION}/{DATASETS[2]}.h5ad"]
    content = server.files[f"/{DATASETS[2]}.h5ad"]
    assert (entry["size"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert (entry["version"], entry["title"]) == ("v1-2", "title 2")
    assert not list(tmp_path.rglob(".*"))

    # Again: nothing is fetched, until the collection has a newer version.
    server.asked.clear()
    assert script.main() == 0
    assert [path for path, _ in server.asked] == [f"/collections/{COLLECTION}"]
    server.files[f"/{DATASETS[1]}.h5ad"] = h5ad(9)
    server.describe(version="v2")
    assert script.main() == 0
    assert stored(tmp_path, 1).read_bytes() == h5ad(9)
    assert "was there" in capsys.readouterr().out


def test_a_later_run_goes_on_where_an_earlier_one_gave_up(
    script: ModuleType, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "TRIES", 2)
    path = f"/{DATASETS[0]}.h5ad"
    server.drops[path] = [30_000, 0, 0]
    complaints = script.download(tmp_path, [COLLECTION], api=server.url)
    assert len(complaints) == 1
    assert "tried 2 times; run it again to go on" in complaints[0]
    assert not stored(tmp_path).exists()
    assert stored(tmp_path, 1).exists()
    server.asked.clear()
    server.drops[path].clear()
    assert script.download(tmp_path, [COLLECTION], api=server.url) == []
    assert [asked for at, asked in server.asked if at == path] == ["bytes=30000-"]
    assert stored(tmp_path).read_bytes() == server.files[path]


def test_a_server_that_knows_no_ranges_sends_it_all_again(script: ModuleType, server: Server, tmp_path: Path) -> None:
    server.takes_ranges = False
    path = f"/{DATASETS[0]}.h5ad"
    server.drops[path] = [5_000]
    script.fetch(server.url + path, tmp_path / "part", len(server.files[path]))
    assert (tmp_path / "part").read_bytes() == server.files[path]


def test_a_part_of_an_older_version_is_not_gone_on_with(
    script: ModuleType, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "TRIES", 1)
    path = f"/{DATASETS[0]}.h5ad"
    server.drops[path] = [30_000]
    assert script.download(tmp_path, [COLLECTION], api=server.url)
    server.files[path] = h5ad(7)
    server.describe(version="v2")
    assert script.download(tmp_path, [COLLECTION], api=server.url) == []
    assert stored(tmp_path).read_bytes() == h5ad(7)


@pytest.mark.parametrize(
    ("content", "size", "complaint"),
    [
        (h5ad(0), len(h5ad(0)) + 5, "bytes, but its collection says"),
        (b"<html>not today</html>", None, "no whole HDF5 file"),
        (h5ad(0)[:-9_000], None, "no whole HDF5 file"),
    ],
)
def test_what_is_not_the_promised_file_is_refused(
    script: ModuleType, server: Server, tmp_path: Path, content: bytes, size: int | None, complaint: str
) -> None:
    server.files[f"/{DATASETS[0]}.h5ad"] = content
    server.describe(of_0=len(content) if size is None else size)
    complaints = script.download(tmp_path, [COLLECTION], api=server.url)
    assert [complaint in said for said in complaints] == [True]
    assert not stored(tmp_path).exists()
    assert list(json.loads((tmp_path / "downloaded.json").read_text())) == [
        f"{COLLECTION}/{id}.h5ad" for id in DATASETS[1:]
    ]


@pytest.mark.parametrize(
    ("collection", "content", "complaint"),
    [
        ("heart", None, "not an id of a collection"),
        (DATASETS[0], None, r"HTTP Error 404"),
        (DATASETS[0], b"<html>", "not the description of a collection"),
        (
            DATASETS[0],
            b'{"datasets": [{"dataset_id": "../../x", "assets": [{"filetype": "H5AD", "url": "u"}]}]}',
            "'../",
        ),
        (DATASETS[0], b'{"datasets": []}', "has no data set with an h5ad file"),
    ],
)
def test_a_collection_that_is_none_is_one_message(
    script: ModuleType, server: Server, tmp_path: Path, collection: str, content: bytes | None, complaint: str
) -> None:
    if content is not None:
        server.files[f"/collections/{collection}"] = content
    with pytest.raises(ScfmError, match=complaint):
        script.download(tmp_path / "out", [COLLECTION, collection], api=server.url)
    assert not (tmp_path / "out").exists()


def test_files_that_changed_since_are_found(
    script: ModuleType, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    script.download(tmp_path, [COLLECTION], api=server.url)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path), "--verify"])
    assert script.main() == 0
    content = bytearray(stored(tmp_path, 1).read_bytes())
    content[-100] ^= 1
    stored(tmp_path, 1).write_bytes(content)
    stored(tmp_path, 2).unlink()
    assert script.main() == 1
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == [
        f"{COLLECTION}/{DATASETS[number]}.h5ad:" for number in (1, 2)
    ]
