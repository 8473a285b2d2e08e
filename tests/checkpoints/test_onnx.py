"""`scfm convert --to onnx`: the file computes what the model does, and says what it is."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cells import made_up_cells
from untrained import untrained_model

import scfm
from scfm.checkpoints import onnx as exporter
from scfm.checkpoints.native import ModelFiles, save_model
from scfm.cli import main
from scfm.data.tokens import TokenConfig
from scfm.data.vocabulary import Vocabulary
from scfm.recipe import ModelConfig, PerformerConfig

onnxruntime = pytest.importorskip("onnxruntime", reason="needs scfm[onnx]")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of models and of what `scfm convert` made of them, by the model's name."""
    home = tmp_path_factory.mktemp("onnx")
    model = untrained_model()
    scgpt = ModelFiles(
        ModelConfig(width=16, heads=2, layers=1, hidden=16, input_norm="domain", domain="batch"),
        model.files.tokens,
        "counts",
        model.files.vocabulary,
        [],
        cell_conditions={"batch": ["batch0", "batch1"]},
    )
    scbert = ModelFiles(
        ModelConfig("scbert", 16, 2, 1, 16, attention="full", cell_embedding="mean",
                    performer=PerformerConfig(head_width=8, features=16)),
        TokenConfig("all", 60, "log2", 13, cls_value=0.0, mask_value=13.0),
        "counts",
        model.files.vocabulary,
        [],
    )  # fmt: skip
    torch.manual_seed(1)
    for name, files in (("scgpt", scgpt), ("scbert", scbert)):
        save_model(home / name, files.build(), files)
        assert main(["convert", str(home / name), "--to", "onnx", "--out", str(home / f"{name}-onnx")]) == 0
    return {name: home / name for name in ("scgpt", "scbert")}


@pytest.mark.parametrize("name", ["scgpt", "scbert"])
def test_onnxruntime_embeds_as_scfm_does(converted: dict[str, Path], name: str) -> None:
    adata = made_up_cells(40)
    model = scfm.load(converted[name])
    expected = model.embed(adata).obsm["X_scfm"]
    session = onnxruntime.InferenceSession(converted[name].with_name(f"{name}-onnx") / "model.onnx")
    found = np.zeros_like(expected)
    conditions = model.conditions_of(adata)
    for pack in model.packs(model.store(adata), conditions, tokens_per_pack=700):
        found[pack.cell_id] = session.run(["cell"], exporter.inputs_of(pack, model.files))[0]
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(expected[0] - expected[1]).max() > 1e-3


@pytest.mark.parametrize("name", ["scgpt", "scbert"])
def test_the_file_says_what_it_is(converted: dict[str, Path], name: str) -> None:
    folder = converted[name].with_name(f"{name}-onnx")
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "vocab.json", "README.md"}
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    said = session.get_modelmeta().custom_metadata_map
    files = scfm.load(converted[name]).files
    vocabulary = Vocabulary.load(folder / "vocab.json")
    assert said["scfm.vocabulary_hash"] == vocabulary.hash == files.vocabulary.hash
    assert (said["scfm.version"], said["scfm.n_bins"]) == (scfm.__version__, str(files.tokens.n_bins))
    assert vocabulary.entries[int(said["scfm.cls"])].id == "<cls>"
    assert json.loads(said["scfm.tokens"])["values"] == files.tokens.values
    shapes = {given.name: given.shape for given in session.get_inputs()}
    assert shapes["genes"] == ["cells", "tokens"]
    assert ("domain" in shapes) == (name == "scgpt")
    card = (folder / "README.md").read_text()
    assert ("place of its batch in [batch0, batch1]" in card) == (name == "scgpt")


def test_a_file_that_computes_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = untrained_model()
    model.save_pretrained(tmp_path / "model")

    def wrong(encoder: Any, example: Any, path: Path, metadata: Any) -> None:
        path.touch()

    monkeypatch.setattr(exporter, "export", wrong)
    monkeypatch.setattr(exporter, "compare", lambda *_: 0.01)
    assert main(["convert", str(tmp_path / "model"), "--to", "onnx", "--out", str(tmp_path / "out")]) == 2
    assert "differs from the model by 0.01" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_missing_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    untrained_model().save_pretrained(tmp_path / "model")
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else there(name))
    assert main(["convert", str(tmp_path / "model"), "--to", "onnx", "--out", str(tmp_path / "out")]) == 2
    assert "needs onnxscript; pip install 'scfm[onnx]'" in capsys.readouterr().err
