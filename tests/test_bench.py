"""The loader's benchmark runs, and its numbers come with what they were measured on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scfm.bench import bench


def test_loader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "loader.json"
    bench("loader", cells=300, genes=100, max_genes=80, cells_per_batch=64, epochs=2, out=str(out))
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == result
    assert result["bench"] == "loader"
    assert result["cells_per_second"]["best"] >= result["cells_per_second"]["median"] > 0
    assert result["cells_per_cpu_second"]["median"] > 0
    assert 85 < result["genes_per_cell"] < 115
    assert 50 < result["tokens_per_cell"] <= 81
    assert {"commit", "machine", "versions", "max_genes", "mask_ratios", "threads"} <= result.keys()
