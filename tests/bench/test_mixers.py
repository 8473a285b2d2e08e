"""The benchmark of scBERT's mixers: what it prints, draws and fits, and the written-out peer it is compared with."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from importlib.util import module_from_spec, spec_from_file_location
from io import StringIO
from pathlib import Path

import pytest

from scfm.bench.attention import attention
from scfm.bench.mixers import bench_mixers, exponent, growth_of, main, peak_of_process
from scfm.errors import ScfmError

TINY = {"lengths": [32, 16], "heads": 2, "head_width": 8, "repeats": 2}


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure memory in this process: starting one takes seconds."""

    def here(command: list[str]) -> float:
        with redirect_stdout(StringIO()) as printed:
            main(command[3:])
        return float(printed.getvalue())

    monkeypatch.setattr("scfm.bench.mixers.peak_of_process", here)


@pytest.mark.usefixtures("fast")
def test_mixers_print_and_draw_what_they_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "mixers.json", tmp_path / "mixers.png"
    attention(**TINY, mixer="all", out=str(out), plot=str(plot))
    result, printed = json.loads(out.read_text()), capsys.readouterr()
    assert json.loads(printed.out) == result
    assert "one cell of 16, 32 genes, 2 heads of 8" in printed.err
    assert result["lengths"] == [16, 32]
    assert result["mixers"].keys() == {"favor", "linear", "softmax"}
    for row in result["mixers"].values():
        assert len(row["seconds"]) == len(row["peak_mib"]) == 2
        assert all(seconds["median"] >= seconds["best"] > 0 for seconds in row["seconds"])
        assert "exponent" in row
    assert {"commit", "versions", "device", "clock", "precision", "features"} <= result.keys()
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("fast")
def test_one_mixer_at_one_length_has_no_exponent() -> None:
    row = bench_mixers("linear", [16], 2, 8, repeats=1)["mixers"]["linear"]
    assert "exponent" not in row


def test_the_exponent_is_that_of_a_power_law() -> None:
    assert exponent([2, 4, 8], [3 * n**1.5 for n in (2, 4, 8)]) == pytest.approx(1.5)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_is_what_a_call_adds_at_its_peak() -> None:
    found = []
    growth = growth_of(lambda: found.append(bytearray(b"x" * 2**26)))
    assert 64 <= growth <= 160  # MiB: the array, and while it is made what it is made of
    assert peak_of_process([sys.executable, "-c", "print(12.5)"]) == 12.5
    with pytest.raises(ScfmError, match="stopped with 3"):
        peak_of_process([sys.executable, "-c", "raise SystemExit(3)"])


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ScfmError, match="--lengths: 0 must be at least 1"):
        bench_mixers("favor", [0, 16], 2, 8)


def test_the_written_out_peer_computes_what_compat_does() -> None:
    path = Path(__file__).parents[2] / "scripts/bench/favor_vs_written_out.py"
    spec = spec_from_file_location("favor_vs_written_out", path)
    assert spec is not None
    assert spec.loader is not None
    peer = module_from_spec(spec)
    spec.loader.exec_module(peer)
    off = peer.difference(genes=60)
    assert off["output"] < 1e-5
    assert off["worst gradient"] < 1e-3
