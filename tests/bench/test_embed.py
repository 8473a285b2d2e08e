"""The benchmark of embedding: fresh weights or a model's, float32 and bf16 beside each other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scfm.bench.embed import bench_embed, embed, embeddings, model_of
from scfm.checkpoints.native import save_model
from scfm.model import precision
from scfm.recipe import DataConfig, ModelConfig, ObjectiveConfig, Recipe

SIZES = {"cells": 20, "genes": 25, "vocabulary": 50}


def recipe() -> Recipe:
    return Recipe(
        data=DataConfig(cells_per_batch=8, tokens_per_pack=200, max_genes=30),
        model=ModelConfig(width=16, heads=2, layers=1, hidden=16),
        objectives=[ObjectiveConfig("gep")],
    )


def test_embed_prints_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: True)  # emulated where there are no such products
    out = tmp_path / "embed.json"
    embed(recipe(), "bf16", **SIZES, repeats=2, out=str(out))
    result = json.loads(out.read_text())
    printed = capsys.readouterr()
    assert json.loads(printed.out) == result
    assert printed.err.startswith("embed: ")
    assert result["cells_per_second"].keys() == {"fp32", "bf16"}
    for speed in result["cells_per_second"].values():
        assert speed["best"] >= speed["median"] > 0
    assert 0.99 < result["cosine_to_fp32"]["min"] <= result["cosine_to_fp32"]["median"]
    assert result["cosine_to_fp32"]["min"] < 1 - 1e-9  # bf16 it was
    assert {"commit", "versions", "device", "attention", "model", "weights"} <= result.keys()


def test_float32_alone_is_not_compared() -> None:
    result = bench_embed(recipe(), **SIZES, repeats=1)
    assert result["cells_per_second"].keys() == {"fp32"}
    assert "cosine_to_fp32" not in result


def test_a_model_directory_gives_the_embeddings_of_its_weights(tmp_path: Path) -> None:
    fresh, store = model_of(recipe(), **SIZES)
    save_model(tmp_path / "model", fresh.network, fresh.files)
    again = recipe()
    again.from_model = str(tmp_path / "model")
    saved, cells = model_of(again, cells=20, genes=25, vocabulary=999)
    expected = embeddings(fresh, store, "fp32", 200)
    np.testing.assert_array_equal(embeddings(saved, cells, "fp32", 200), expected)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, rtol=1e-6)
