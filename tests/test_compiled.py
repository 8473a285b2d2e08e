"""Compiled loops: what is kept on the disk is never the code of other types, other sources or another numba."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import types

from scfm.compiled import FilePerSignature
from scfm.data.packing import _deal_greedily

CALLED = """
from scfm.compiled import compiled
SCALE = {scale}

@compiled
def weight(x):
    return x * SCALE
"""

CALLING = """
from scfm.compiled import compiled
from scfm_test_called import {name}

@compiled
def total(values):
    found = values[0] * 0
    for value in values:
        found += {each}
    return found
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write two modules and import them anew, as another process would."""
    monkeypatch.syspath_prepend(str(tmp_path))
    times = iter(range(1_700_000_000, 1_800_000_000))

    def write(scale: int = 2, name: str = "weight", each: str = "weight(value)") -> Any:
        files = {
            "scfm_test_called": CALLED.format(scale=scale),
            "scfm_test_calling": CALLING.format(name=name, each=each),
        }
        for module, text in files.items():
            path = tmp_path / f"{module}.py"
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
                at = next(times)
                os.utime(path, (at, at))
            sys.modules.pop(module, None)
        importlib.invalidate_caches()
        return importlib.import_module("scfm_test_calling").total

    yield write
    for module in ("scfm_test_called", "scfm_test_calling"):
        sys.modules.pop(module, None)


def hits(function: Any) -> int:
    return sum(function.stats.cache_hits.values())


def test_code_is_kept_for_the_next_run(modules: Any) -> None:
    values = np.arange(5)
    first = modules()
    assert (first(values), hits(first)) == (20, 0)
    second = modules()
    assert (second(values), hits(second)) == (20, 1)
    assert second(values.astype(np.float32)) == 20.0
    assert hits(second) == 1


@pytest.mark.parametrize(
    "change",
    [{"scale": 3}, {"each": "weight(value) + value"}],
    ids=["a constant of the file that is called", "the file itself"],
)
def test_code_of_changed_sources_is_not_used(modules: Any, change: dict[str, Any]) -> None:
    values = np.arange(5)
    assert modules()(values) == 20
    changed = modules(**change)
    assert (changed(values), hits(changed)) == (30, 0)


def test_a_constant_from_another_file_is_looked_at(modules: Any) -> None:
    """Its file is none that the function calls; numba itself would go on with the old value."""
    values = np.arange(5)
    by_constant = {"name": "SCALE", "each": "value * SCALE"}
    assert modules(**by_constant)(values) == 20
    assert modules(scale=3, **by_constant)(values) == 30
    back = modules(**by_constant)
    assert back(values) == 20


def test_code_of_another_numba_is_not_used(modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert modules()(np.arange(5)) == 20
    other = modules()
    other._cache._cache_file._version = "0.1"
    assert (other(np.arange(5)), hits(other)) == (20, 0)


def test_code_can_be_thrown_away(modules: Any, tmp_path: Path) -> None:
    function = modules()
    function(np.arange(5))
    function._cache.flush()
    assert not list((tmp_path / "__pycache__").glob("scfm_test_calling.*.nbc"))
    assert list((tmp_path / "__pycache__").glob("scfm_test_called.*.nbc"))


def test_two_that_save_at_the_same_moment_keep_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write waits for one of the other's, which is when numba's own files fall out of step with their index."""
    together, plain = threading.Barrier(2, timeout=5), FilePerSignature._open_for_write

    @contextmanager
    def in_step(self: FilePerSignature, path: str) -> Any:
        with plain(self, path) as file:
            yield file
            together.wait()

    monkeypatch.setattr(FilePerSignature, "_open_for_write", in_step)
    keys = [((kind[:],), ("processor",), "code") for kind in (types.int32, types.float32)]
    writers = [
        threading.Thread(target=FilePerSignature(str(tmp_path), "f", (1, 2)).save, args=(key, str(key))) for key in keys
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    for key in keys:
        assert FilePerSignature(str(tmp_path), "f", (1, 2)).load(key) == str(key)
        assert FilePerSignature(str(tmp_path), "f", (1, 3)).load(key) is None
        assert FilePerSignature(str(tmp_path), "f", (1, 2)).load((*key[:2], "other code")) is None


def test_processes_that_compile_at_once_count_right(modules: Any, tmp_path: Path) -> None:
    modules()
    kinds = ["int32", "float32", "int64", "float64"]
    context = multiprocessing.get_context("fork")
    for _ in range(2):  # compiled by all, then read by all
        together, answers = context.Barrier(len(kinds)), context.Queue()
        processes = [context.Process(target=counted, args=(kind, together, answers)) for kind in kinds]
        for process in processes:
            process.start()
        found = dict(answers.get(timeout=120) for _ in kinds)
        for process in processes:
            process.join()
        assert found == dict.fromkeys(kinds, 20.0)


def counted(kind: str, together: Any, answers: Any) -> None:
    from scfm_test_calling import total

    together.wait()
    answers.put((kind, float(total(np.arange(5).astype(kind)))))


def test_every_compiled_loop_is_kept_this_way() -> None:
    assert isinstance(_deal_greedily._cache._cache_file, FilePerSignature)
    scfm = Path(__file__).parents[1] / "scfm"
    others = [path.name for path in scfm.rglob("*.py") if "njit" in path.read_text() and path.name != "compiled.py"]
    assert others == []
