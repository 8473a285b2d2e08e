"""The loader's benchmark runs, and its numbers come with what they were measured on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scfm.bench.loader import loader


def test_loader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "loader.json"
    loader(cells=300, genes=100, max_genes=80, cells_per_batch=64, epochs=2, out=str(out))
    result = json.loads(out.read_text())
    printed = capsys.readouterr()
    assert json.loads(printed.out) == result
    assert printed.err.startswith("loader: ")
    assert result["bench"] == "loader"
    assert result["cells_per_second"]["best"] >= result["cells_per_second"]["median"] > 0
    assert result["cells_per_cpu_second"]["median"] > 0
    assert 85 < result["genes_per_cell"] < 115
    assert 50 < result["tokens_per_cell"] <= 81
    assert 0 < result["bytes_per_cell_zstd"] < result["bytes_per_cell"] < 100 * 2.3 + 100
    assert {"commit", "machine", "versions", "device", "max_genes", "mask_ratios", "threads"} <= result.keys()


def test_filled_packs_are_rounded_up_and_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    """One pack of 64 cells is filled to the next 64th of its budget."""
    loader(cells=64, genes=100, max_genes=80, cells_per_batch=64, tokens_per_pack=6400, epochs=1)
    result = json.loads(capsys.readouterr().out)
    tokens = 64 * result["tokens_per_cell"]
    assert result["empty_when_filled"] == pytest.approx(1 - tokens / (-(-tokens // 100) * 100), abs=0.002)
