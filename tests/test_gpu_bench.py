"""The GPU check runs where there is no GPU, on tiny shapes, and loses nothing where a part goes wrong."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).parents[1] / "scripts" / "bench"


@pytest.fixture
def gpu_record(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gpu_record")


def test_every_part_runs_on_tiny_shapes(tmp_path: Path) -> None:
    """In a process of its own, as it is used: it sets alarms, and compiles."""
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(BENCH / "gpu.py"), str(out), "--device", "cpu", "--tiny", "--deadline", "200"]
    environment = os.environ | {"PYTHONPATH": str(BENCH.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    rows = {part: {row["item"]: row for row in what["rows"]} for part, what in found["parts"].items()}
    assert list(rows) == [
        "numerics", "matmuls", "end_to_end", "beside_dense", "attention_speed", "no_waiting", "largest_pack"
    ]  # fmt: skip
    wrong = [row for what in rows.values() for row in what.values() if "error" in row or row.get("ok") is False]
    assert not wrong
    assert rows["numerics"]["block, flash_cpu"]["graphs"] == [1, 1, 1]
    assert rows["largest_pack"]["largest, kept"]["fits"] == 480
    assert "all parts ran" in done.stdout


def test_a_failure_is_written_down_and_the_next_part_runs(gpu_record: ModuleType, tmp_path: Path) -> None:
    record = gpu_record.Record(tmp_path / "gpu.json", torch.device("cpu"), tiny=False, deadline=60)

    def broken() -> dict[str, object]:
        raise ValueError("a kernel")

    def large() -> dict[str, object]:
        raise torch.OutOfMemoryError("out of memory. Tried a lot")

    with record.running("first", until=60):
        assert record.row("broken", broken) == {}
        assert record.row("large", large) == {}
        assert record.row("late", lambda: {"x": 1}, needs=100) == {}
        raise RuntimeError("the part itself")
    with record.running("slow", until=0.3):
        record.row("endless", lambda: [None for _ in iter(int, 1)])
    with record.running("second", until=60):
        assert record.row("fine", lambda: {"x": 1.0}) == {"x": 1.0}
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    broken_row, large_row, late_row = parts["first"]["rows"]
    assert "ValueError: a kernel" in broken_row["error"]
    assert "in broken" in broken_row["traceback"]
    assert large_row["out_of_memory"] == "out of memory"
    assert "left_out" in late_row
    assert "the part itself" in parts["first"]["error"]
    assert parts["slow"]["out_of_time"]
    assert parts["second"]["rows"][0]["x"] == 1.0
    assert record.failures == ["first", "first: broken", "slow: endless"]
