"""The benchmark of attention: FLOPs by hand, errors that fit the type, and what cannot run said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scfm.bench.attention import Shape, attention, bench_attention
from scfm.errors import ScfmError

TINY = {"cells": 2, "tokens": 24, "heads": 2, "head_width": 8, "repeats": 2}


def test_attention_prints_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "attention.json"
    attention(**TINY, known=0.5, out=str(out))
    result = json.loads(out.read_text())
    printed = capsys.readouterr()
    assert json.loads(printed.out) == result
    assert "flash_cpu" in printed.err
    assert result["bench"] == "attention"
    assert result["backends"].keys() == {"flash_cpu", "dense"}
    assert result["not_run"]["flash"] == "does not run on cpu"
    for row in result["backends"].values():
        for part in ("forward", "forward_backward"):
            assert row[part]["ms"]["median"] >= row[part]["ms"]["best"] > 0
            assert row[part]["tflops"] > 0
            assert row[part]["speed_to_dense"] > 0
    assert result["backends"]["dense"]["forward"]["speed_to_dense"] == 1
    assert {"commit", "versions", "device", "clock", "precision", "known_tokens"} <= result.keys()


@pytest.mark.parametrize(("precision", "least", "most"), [("32", 0, 1e-5), ("bf16", 1e-4, 2e-2)])
def test_precision_shows_in_the_errors(precision: str, least: float, most: float) -> None:
    result = bench_attention(**TINY, known=0.5, precision=precision)
    for row in result["backends"].values():
        assert least < row["error"] < most
        assert least < row["gradient_error"] < most


@pytest.mark.parametrize("known", [0.0, 0.5, 1.0])
def test_pairs_are_those_of_the_mask(known: float) -> None:
    shape = Shape(cells=2, tokens=9, known=1 + round(known * 8), heads=2, width=8)
    sees = shape.layout(torch.device("cpu")).padded[1]
    assert shape.pairs == int(sees.sum())
    assert bench_attention(2, 9, 2, 8, known, repeats=1)["pairs"] == shape.pairs


def test_a_large_shape_has_no_errors_and_wrong_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scfm.bench.attention.MOST_LOGITS", 10)
    assert "error" not in bench_attention(**TINY, known=0.5)["backends"]["flash_cpu"]
    with pytest.raises(ScfmError, match="--head-width: 0 must be at least 1"):
        bench_attention(**(TINY | {"head_width": 0}), known=0.5)
    with pytest.raises(ScfmError, match=r"--known: 1\.5"):
        bench_attention(**TINY, known=1.5)
