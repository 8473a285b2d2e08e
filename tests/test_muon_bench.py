"""The comparison of Muon with AdamW reads what `scfm pretrain` writes."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from runs import write_shards


def test_a_run_gives_its_losses_and_its_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts" / "bench"))
    bench = importlib.import_module("muon_vs_adamw")
    monkeypatch.setattr(bench, "LOG_EVERY", 2)
    runs = [bench.run(str(write_shards(tmp_path / "shards")), "muon", 1e-3, seed=0, steps=4)]
    assert runs[0]["gep"] > 0
    assert runs[0]["seconds_per_step"] > 0
    assert bench.table(runs)[2].startswith("| muon | 0.001 |")
