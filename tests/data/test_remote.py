"""Shards behind a URL: fetched whole, checked, kept within bounds, evicted only when nobody uses them."""

from __future__ import annotations

import functools
import http.server
import multiprocessing
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from scfm.bench.cells import synthetic_block, synthetic_vocabulary
from scfm.data.access import choose
from scfm.data.cache import ShardCache
from scfm.data.loader import PackLoader
from scfm.data.order import CellOrder
from scfm.data.remote import find_shards
from scfm.data.shards import Codec, ShardWriter, manifest_hash, open_shards, read_manifest
from scfm.data.store import CellStore
from scfm.data.tokens import TokenConfig, Tokeniser
from scfm.data.transport import compress
from scfm.errors import ScfmError

CELLS, SHARDS = 120, 6
KINDS = ["a", "b", "c"]


def written(folder: Path, codec: Codec = "packed") -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, synthetic_vocabulary(300), "counts", {"kind": KINDS}, codec=codec)
    for _ in range(SHARDS):
        writer.write(synthetic_block(rng, CELLS, 40, 300), {"kind": rng.integers(0, 3, CELLS)})
    writer.finish()
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return written(tmp_path / "shards")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def url(shards: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(shards.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/shards"
        server.shutdown()


@pytest.fixture
def in_memory(shards: Path) -> Iterator[str]:
    filesystem = fsspec.filesystem("memory")
    for path in shards.rglob("*"):
        if path.is_file():
            filesystem.pipe_file(f"/corpus/{path.relative_to(shards)}", path.read_bytes())
    yield "memory://corpus"
    filesystem.rm("/corpus", recursive=True)


def batches_of(store: CellStore, mode: Any = "auto") -> list[Any]:
    access = choose(store, mode)
    tokeniser = Tokeniser(TokenConfig(max_genes=30), store.vocabulary, store.value_kind)
    order = CellOrder(range(store.n_cells), 24, seed=0, block=8, window=5, region=access.region)
    loader = PackLoader(store, order, tokeniser, tokens_per_pack=900, reader=access.reader, threads=2)
    return [(pack.genes.tolist(), pack.cell_id.tolist()) for packs in loader.batches(1) for pack in packs]


def room_for(shards: Path, n: float) -> float:
    return n * max(shard["bytes"] for shard in read_manifest(shards)["shards"]) / 1e9


def held(cache: Path) -> int:
    total = 0
    for path in cache.iterdir():
        if path.suffix in (".arrow", ".part", ".plain"):
            with suppress(FileNotFoundError):  # renamed or evicted just now
                total += path.stat().st_size
    return total


@pytest.mark.parametrize("mode", ["map", "read"])
@pytest.mark.parametrize("where", ["url", "in_memory"])
def test_batches_are_those_of_the_local_directory(
    shards: Path, where: str, mode: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    found = find_shards(request.getfixturevalue(where), str(tmp_path / "cache"))
    assert found.manifest == read_manifest(shards)
    assert batches_of(found.open(), mode) == batches_of(open_shards(shards), mode)


def test_opening_fetches_no_shard(url: str, tmp_path: Path) -> None:
    store = find_shards(url, str(tmp_path / "cache")).open()
    assert store.n_cells == CELLS * SHARDS
    assert list((tmp_path / "cache").glob("*.arrow")) == []


def test_an_epoch_stays_within_the_cache_and_fetches_each_shard_once_or_twice(
    shards: Path, in_memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched, most, cache = [], 0, tmp_path / "cache"
    fetch = ShardCache._fetch

    def counted(self: ShardCache, location: str, shard: Any, path: Path) -> None:
        nonlocal most
        fetch(self, location, shard, path)
        fetched.append(shard["file"])
        most = max(most, held(cache))

    monkeypatch.setattr(ShardCache, "_fetch", counted)
    store = find_shards(in_memory, str(cache), room_for(shards, 4.5)).open()
    cells = [cell for _, ids in batches_of(store) for cell in ids if cell >= 0]
    assert sorted(cells) == list(range(CELLS * SHARDS))
    assert most <= room_for(shards, 4.5) * 1e9
    assert set(fetched) == {shard["file"] for shard in read_manifest(shards)["shards"]}
    assert len(fetched) <= 2 * SHARDS + 1  # a region may begin within a shard


def test_shards_that_are_there_are_not_fetched_again(url: str, shards: Path, tmp_path: Path) -> None:
    first = find_shards(url, str(tmp_path / "cache")).open()
    lengths = first.n_genes(np.arange(first.n_cells))
    for path in (shards / "shards").iterdir():
        path.unlink()
    again = find_shards(url, str(tmp_path / "cache")).open()
    np.testing.assert_array_equal(again.n_genes(np.arange(again.n_cells)), lengths)


def test_obs_codes_come_with_their_shard(url: str, shards: Path, tmp_path: Path) -> None:
    local, fetched = open_shards(shards), find_shards(url, str(tmp_path / "cache")).open()
    rows = np.random.default_rng(0).permutation(local.n_cells)[:50]
    np.testing.assert_array_equal(fetched.obs["kind"].codes[rows], local.obs["kind"].codes[rows])
    np.testing.assert_array_equal(np.asarray(fetched.obs["kind"].codes), np.asarray(local.obs["kind"].codes))


def test_what_is_in_use_is_not_evicted(shards: Path, in_memory: str, tmp_path: Path) -> None:
    records, cache = read_manifest(shards)["shards"], ShardCache(tmp_path / "cache", int(room_for(shards, 2.2) * 1e9))
    with cache.using(in_memory, records[0]) as first:
        with cache.using(in_memory, records[1]):
            pass
        with cache.using(in_memory, records[2]) as third:
            assert first.is_file()
            assert len(list(cache.directory.glob("*.arrow"))) == 2
            with pytest.raises(ScfmError, match=r"data\.cache_gb: .*00003\.arrow needs .* hold shards in use"):
                cache.using(in_memory, records[3]).__enter__()
            assert third.is_file()
    with cache.using(in_memory, records[3]):  # the one used least recently went
        assert {path.name for path in cache.directory.glob("*.arrow")} == {
            f"{records[i]['sha256']}.arrow" for i in (0 if first.is_file() else 2, 3)
        }


def hold(cache: ShardCache, location: str, shard: Any, held: Any, enough: Any) -> None:
    with cache.using(location, shard):
        held.set()
        enough.wait(30)


def test_another_process_keeps_what_it_uses(shards: Path, tmp_path: Path) -> None:
    records, cache = read_manifest(shards)["shards"], ShardCache(tmp_path / "cache", int(room_for(shards, 1.5) * 1e9))
    context = multiprocessing.get_context("fork")
    ready, enough = context.Event(), context.Event()
    other = context.Process(target=hold, args=(cache, f"file://{shards}", records[0], ready, enough))
    other.start()
    assert ready.wait(30)
    with pytest.raises(ScfmError, match=r"data\.cache_gb"):
        cache.using(f"file://{shards}", records[1]).__enter__()
    other.kill()  # and its lock goes with it
    other.join()
    with cache.using(f"file://{shards}", records[1]) as path:
        assert path.is_file()


def test_many_threads_fetch_a_shard_once(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched, fetch = [], ShardCache._fetch
    monkeypatch.setattr(ShardCache, "_fetch", lambda *of: (fetched.append(of), fetch(*of)))
    cache, record = ShardCache(tmp_path / "cache", 10**9), read_manifest(shards)["shards"][0]

    def use() -> None:
        with cache.using(f"file://{shards}", record) as path:
            assert path.stat().st_size == record["bytes"]

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: path.unlink(), "is not there"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), r"bytes arrived, but the manifest says"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), "what arrived is damaged"),
    ],
)
def test_what_arrives_damaged_is_named_and_not_kept(
    url: str, shards: Path, tmp_path: Path, damage: Any, complaint: str
) -> None:
    damage(shards / "shards/00002.arrow")
    store = find_shards(url, str(tmp_path / "cache")).open()
    with pytest.raises(ScfmError, match=rf"http://.*/shards/00002\.arrow: .*{complaint}.*, 3 times in a row"):
        batches_of(store)
    assert sorted(path.suffix for path in (tmp_path / "cache").glob("*.part")) == []


def test_a_fetch_that_fails_once_is_tried_again(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.local import LocalFileSystem

    failures, get = iter([True, False]), LocalFileSystem.get_file

    def flaky(self: Any, remote: str, local: str, **how: Any) -> None:
        if next(failures):
            raise TimeoutError
        get(self, remote, local, **how)

    monkeypatch.setattr(LocalFileSystem, "get_file", flaky)
    with ShardCache(tmp_path / "cache", 10**9).using(f"file://{shards}", read_manifest(shards)["shards"][0]) as path:
        assert path.is_file()


def test_a_place_without_shards_is_named(url: str, tmp_path: Path) -> None:
    with pytest.raises(ScfmError, match=r"http://.*/nothing: not a shard directory"):
        find_shards(url.replace("shards", "nothing"), str(tmp_path))
    with pytest.raises(ScfmError, match=r"nosuch://x: cannot be read"):
        find_shards("nosuch://x", str(tmp_path))


def test_damage_cannot_be_skipped_where_shards_are_fetched(url: str, tmp_path: Path) -> None:
    with pytest.raises(ScfmError, match=r"data\.skip_damaged"):
        find_shards(url, str(tmp_path)).open(skip_damaged=True)


@pytest.mark.parametrize("codec", ["list", "packed"])
def test_compressed_shards_are_read_through_the_cache(tmp_path: Path, codec: Codec) -> None:
    plain = written(tmp_path / "plain", codec)
    compress(str(plain), out=str(tmp_path / "sent"))
    sizes = [sum(path.stat().st_size for path in (tmp_path / d / "shards").iterdir()) for d in ("sent", "plain")]
    assert sizes[0] < sizes[1]
    assert {path.suffix for path in (tmp_path / "sent/shards").iterdir()} == {".zst"}
    manifests = [read_manifest(tmp_path / place) for place in ("plain", "sent")]
    assert manifest_hash(manifests[1]) == manifests[1]["hash"] == manifests[0]["hash"]
    for location in (str(tmp_path / "sent"), f"file://{tmp_path / 'sent'}"):
        store = find_shards(location, str(tmp_path / "cache")).open()
        assert batches_of(store) == batches_of(open_shards(plain))
    for path in (tmp_path / "cache").glob("*.arrow"):
        assert path.read_bytes() in [shard.read_bytes() for shard in (plain / "shards").iterdir()]


def test_compressed_shards_can_be_sent_anywhere(shards: Path, tmp_path: Path) -> None:
    compress(str(shards), out="memory://sent")
    assert batches_of(find_shards("memory://sent", str(tmp_path)).open()) == batches_of(open_shards(shards))
    fsspec.filesystem("memory").rm("/sent", recursive=True)


def test_a_directory_of_compressed_shards_alone_says_so(shards: Path, tmp_path: Path) -> None:
    compress(str(shards), out=str(tmp_path / "sent"))
    with pytest.raises(ScfmError, match=r"00000\.arrow: the shard is missing"):
        open_shards(tmp_path / "sent")


def test_compress_refuses_a_damaged_shard_and_a_taken_place(shards: Path, tmp_path: Path) -> None:
    compress(str(shards), out=str(tmp_path / "sent"))
    with pytest.raises(ScfmError, match=r"sent: holds a shard directory already"):
        compress(str(shards), out=str(tmp_path / "sent"))
    path = shards / "shards/00001.arrow"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ScfmError, match=r"00001\.arrow: is damaged"):
        compress(str(shards), out=str(tmp_path / "other"))
    assert not (tmp_path / "other/manifest.json").exists()


def test_regions_keep_shards_together() -> None:
    order = CellOrder(range(1000), 20, seed=1, block=4, window=10, region=100)
    for epoch in (0, 1):
        seen = np.concatenate([order.batch(epoch, k) for k in range(len(order))])
        assert sorted(seen) == list(range(1000))
        for k in range(len(order)):
            stages = [order.rows_of_stage(epoch, stage) for stage in order.stages_of(k)]
            assert np.isin(order.batch(epoch, k), np.concatenate(stages)).all()
            assert all(len(np.unique(stage // 100)) <= 4 for stage in stages)  # of ten


def test_the_file_of_a_context_stays(shards: Path, tmp_path: Path) -> None:
    store = find_shards(f"file://{shards}", str(tmp_path / "cache")).open()
    with ExitStack() as stack:
        block, file, codes = store.blocks[0].held(stack)  # type: ignore[attr-defined]
        assert (block.n_cells, len(codes["kind"])) == (CELLS, CELLS)
        assert file.path.is_file()
