"""The native model directory: what is saved comes back, and what does not fit is named."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from scfm.checkpoints.native import ModelFiles, load_model, load_weights, read_model, save_model
from scfm.data.tokens import TokenConfig
from scfm.data.vocabulary import Gene, Vocabulary
from scfm.errors import ScfmError
from scfm.model.heads import HeadSpec
from scfm.recipe import ModelConfig


def some_files() -> ModelFiles:
    return ModelFiles(
        model=ModelConfig(width=16, heads=2, layers=2, hidden=16, cell_conditions=["batch"]),
        tokens=TokenConfig(max_genes=30, mask_ratios=(0.25, 0.5)),
        value_kind="counts",
        vocabulary=Vocabulary.from_genes(Gene.of(None, f"G{i:02}") for i in range(20)),
        heads=[HeadSpec("gep", "gep"), HeadSpec("annotation", "cls", 2, ["B cell", "T cell"])],
        cell_conditions={"batch": ["a", "b", "c"]},
        gene_conditions={"pathway": ["none", "glycolysis"]},
        training_data={"stage": "pretraining"},
        cell_hashes=np.array([3, 5, 2**63], np.uint64),
        card="# a card",
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    files = some_files()
    save_model(tmp_path / "model", files.build(), files)
    return tmp_path / "model"


def test_what_is_saved_comes_back(model: Path) -> None:
    torch.manual_seed(0)
    files, network = some_files(), some_files().build()
    loaded, read = load_model(model)
    assert {name: tensor.tolist() for name, tensor in loaded.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in network.state_dict().items()
    }
    np.testing.assert_array_equal(read.cell_hashes, files.cell_hashes)
    plain = [json.dumps(asdict(replace(one, cell_hashes=None))) for one in (read, files)]
    assert plain[0] == plain[1]


def test_a_model_runs_wherever_it_was_trained(tmp_path: Path) -> None:
    """The attention backend is a matter of the run: one that only a GPU has does not tie the model to GPUs."""
    files = some_files()
    files.model.backend = "flash"
    save_model(tmp_path / "model", files.build(), files)
    assert read_model(tmp_path / "model").model.backend == "auto"
    assert files.model.backend == "flash"


def test_weights_are_named_by_backbone_and_head(model: Path) -> None:
    kinds = {
        ".".join(name.split(".")[: 1 if name.startswith("backbone") else 2])
        for name in load_file(model / "model.safetensors")
    }
    assert kinds == {"backbone", "heads.gep", "heads.annotation"}


def test_every_weight_that_does_not_fit_is_listed(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["backbone.surprise"] = torch.zeros(1)
    del weights["heads.gep.out.bias"]
    weights["backbone.gene_embedding.norm.bias"] = torch.zeros(3)
    with pytest.raises(ScfmError) as caught:
        load_weights(some_files().build(), weights, "somewhere")
    assert str(caught.value).splitlines() == [
        "somewhere: the weights do not fit the model:",
        "  missing: heads.gep.out.bias",
        "  shape: backbone.gene_embedding.norm.bias is (3,), the model has (16,)",
        "  unexpected: backbone.surprise",
    ]


def test_a_prefix_leaves_the_other_weights_alone(model: Path) -> None:
    network = some_files().build()
    before = network.heads["gep"].out.weight.clone()
    load_weights(network, load_file(model / "model.safetensors"), "model", prefix="backbone.")
    assert torch.equal(network.heads["gep"].out.weight, before)
    assert torch.equal(network.backbone.unknown_flag, load_file(model / "model.safetensors")["backbone.unknown_flag"])


def test_nothing_is_overwritten(model: Path, tmp_path: Path) -> None:
    files = some_files()
    with pytest.raises(ScfmError, match="is not empty"):
        save_model(model, files.build(), files)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.png").touch()
    with pytest.raises(ScfmError, match="not a model directory and is left as it is"):
        save_model(tmp_path / "photos", files.build(), files, replace=True)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["holiday.png"]


def test_replacing_leaves_one_whole_model(model: Path) -> None:
    files = replace(some_files(), card="# newer")
    save_model(model, files.build(), files, replace=True)
    assert read_model(model).card == "# newer"
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_an_embedding_of_another_vocabulary_is_refused(model: Path) -> None:
    Vocabulary.from_genes(Gene.of(None, f"X{i:02}") for i in range(20)).save(model / "vocab.json")
    with pytest.raises(ScfmError, match=r"vocab\.json: is not the vocabulary that the model was trained with"):
        read_model(model)


def test_a_key_of_the_future_is_not_ignored(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["model"]["telepathy"] = True
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ScfmError, match=r"unknown keys \['telepathy'\]"):
        read_model(model)


def test_a_model_of_before_there_were_gene_tables_is_read(model: Path) -> None:
    conditions = json.loads((model / "conditions.json").read_text())
    del conditions["gene_tables"]
    (model / "conditions.json").write_text(json.dumps(conditions))
    assert read_model(model).gene_tables == {}


def test_damage_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ScfmError, match="is not a model directory"):
        read_model(tmp_path)
    (model / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ScfmError, match=r"model\.safetensors: cannot be read as safetensors"):
        load_model(model)
    save_file({}, model / "model.safetensors")
    with pytest.raises(ScfmError, match=r"missing: backbone\."):
        load_model(model)
    (model / "conditions.json").unlink()
    with pytest.raises(ScfmError, match=r"conditions\.json: cannot be read"):
        load_model(model)
