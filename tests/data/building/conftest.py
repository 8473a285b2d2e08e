"""Fixtures of the tests that stop builds: sources, what one build makes of them in one go, and a build half done."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from corpora import SIZES, corpus, interrupt, prepared, profiles, unchanged

from scfm.data.building import build as build_module
from scfm.data.building import workers as workers_module


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus") / "files", SIZES)


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "VALUES_PER_UNIT", 2_000)


@pytest.fixture(scope="module")
def undisturbed(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the sources in one go, with units of the usual size."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    prepared(sources, out)
    assert unchanged(out, *(("abc"[i], profiles(n, i)) for i, n in enumerate(SIZES)))
    return out


@pytest.fixture
def stopped(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_units: None) -> Path:
    """A build of a copy of the sources, stopped after all of its units; return where it is to stand."""
    shutil.copytree(sources, tmp_path / "files")
    with monkeypatch.context() as patch:
        patch.setattr(build_module.Build, "_make_shards", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepared(tmp_path / "files", tmp_path / "out")
    return tmp_path / "out"
