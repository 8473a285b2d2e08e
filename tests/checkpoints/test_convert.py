"""`scfm convert` as a user meets it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from scgpt_folders import same
from scgpt_models import a_model
from torch import Tensor

import scfm
from scfm.checkpoints.native import ModelFiles, read_model, read_weights, write_model
from scfm.cli import main

EMBEDDING = "backbone.gene_embedding.embedding.weight"


def convert(*arguments: Any) -> int:
    return main(["convert", *map(str, arguments)])


@pytest.fixture
def native(tmp_path: Path) -> Path:
    files, weights = a_model("batches")
    write_model(tmp_path / "model", weights, files)
    return tmp_path / "model"


def test_there_and_back(native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(native, "--to", "scgpt", "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    for said in (
        "layout flash: ",
        "parts: encoder 3, value_encoder 6, batch_encoder 3, input_norm 9, transformer 24,",
        "note: scGPT norms a whole batch by the domain of its first cell",
        f"written: {tmp_path}/out",
    ):
        assert said in printed
    assert convert(tmp_path / "out", "--to", "native", "--out", tmp_path / "again") == 0
    for name in ("config.json", "conditions.json", "training_data.json", "vocab.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (native / name).read_bytes()
    assert (tmp_path / "again/model.safetensors").read_bytes() == (native / "model.safetensors").read_bytes()


@pytest.mark.golden
def test_options_reach_the_converter(shared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(shared / "golden/scgpt/checkpoint_tiny", folder)
    state = torch.load(folder / "best_model.pt", weights_only=True)
    norm = {f"bn.{name}": torch.rand(32) for name in ("weight", "bias", "running_mean", "running_var")}
    norm["bn.num_batches_tracked"] = torch.tensor(5)
    classes = {"cls_decoder.out_layer.weight": torch.rand(2, 32), "cls_decoder.out_layer.bias": torch.rand(2)}
    old = state | norm | classes | {"mystery": torch.zeros(1)}
    torch.save(old, folder / "best_model.pt")
    args = json.loads((folder / "args.json").read_text()) | {"n_layers_cls": 1}
    (tmp_path / "args.json").write_text(json.dumps(args))
    (folder / "args.json").unlink()
    (tmp_path / "labels.txt").write_text("B cell\nT cell\n")
    command = [folder, "--to", "native", "--args", tmp_path / "args.json"]
    assert convert(*command, "--out", tmp_path / "refused") == 2
    assert not (tmp_path / "refused").exists()
    options = ["--allow", "input_norm", "cls_decoder", "--drop", "mystery", "--preset", "finetuned"]
    options += ["--labels", tmp_path / "labels.txt"]
    assert convert(*command, *options, "--out", tmp_path / "model") == 0
    files = read_model(tmp_path / "model")
    assert (files.model.input_norm, files.tokens.max_genes, files.tokens.cls_value) == ("batch", 63, 0)
    assert [head.labels for head in files.heads if head.kind == "cls"] == [["B cell", "T cell"]]
    weights = read_weights(tmp_path / "model")
    assert torch.equal(weights["backbone.input_norm.running_mean"], norm["bn.running_mean"][None])
    assert convert(tmp_path / "model", "--to", "scgpt", "--out", tmp_path / "back") == 0
    del old["mystery"]
    assert same(torch.load(tmp_path / "back/best_model.pt", weights_only=True), old)
    scfm.load(tmp_path / "model")


@pytest.mark.golden
def test_the_layout_can_be_changed(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shared / "golden/scgpt/checkpoint_tiny"
    assert convert(folder / "best_model_torch_names.pt", "--to", "scgpt", "--out", tmp_path / "flash") == 0
    assert capsys.readouterr().out.count("layout torch: 55 tensors, 31,329 parameters") == 1
    states = [torch.load(place / "best_model.pt", weights_only=True) for place in (folder, tmp_path / "flash")]
    assert same(*states)


@pytest.mark.golden
def test_gene_tables_tell_ensembl_ids(shared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(shared / "golden/scgpt/checkpoint_tiny", folder)
    tokens = json.loads((folder / "vocab.json").read_text())
    renamed = {{"g000": "TP53", "g001": "CD3D"}.get(token, token): i for token, i in tokens.items()}
    (folder / "vocab.json").write_text(json.dumps(renamed))
    table = shared / "data/gene_vocab/hgnc_complete.parquet"
    assert convert(folder, "--to", "native", "--out", tmp_path / "model", "--genes", table) == 0
    vocabulary = read_model(tmp_path / "model").vocabulary
    assert [gene.ensembl for gene in vocabulary.entries[:3]] == ["ENSG00000141510", "ENSG00000167286", None]
    assert vocabulary.match(["ENSG00000141510.18"], ["whatever"]).tolist() == [0]
    assert convert(tmp_path / "model", "--to", "scgpt", "--out", tmp_path / "back") == 0
    assert json.loads((tmp_path / "back/vocab.json").read_text()) == renamed


def added(native: Path, out: Path, names: list[str]) -> tuple[ModelFiles, dict[str, Tensor]]:
    genes = out.with_suffix(".txt")
    genes.write_text("\n".join(names))
    assert convert(native, "--to", "native", "--out", out, "--add_genes", genes) == 0
    return read_model(out), read_weights(out)


def test_added_genes_start_from_the_mean(native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_weights(native)
    files, weights = added(native, tmp_path / "more", ["NEW1", "G03", "ENSG00000000003", "NEW2", "TP53"])
    assert "added 2 genes" in capsys.readouterr().out
    ids = [gene.id for gene in files.vocabulary.entries]
    assert ids[18:] == ["G18", "TP53", "NEW1", "NEW2", "<pad>", "<cls>"]
    mean = before[EMBEDDING][:20].mean(0)
    torch.testing.assert_close(weights[EMBEDDING][20:22], torch.stack([mean, mean]))
    kept = [*range(20), 22, 23]
    assert torch.equal(weights[EMBEDDING][kept], before[EMBEDDING])
    assert same(*({name: tensor for name, tensor in w.items() if name != EMBEDDING} for w in (weights, before)))
    assert "## Added genes\n2 genes joined the vocabulary after training, each with the mean of the 20" in files.card
    assert files.card.startswith("# a card")
    assert files.training_data["added_genes"] == ["NEW1", "NEW2"]
    scfm.load(tmp_path / "more")
    assert convert(tmp_path / "more", "--to", "scgpt", "--out", tmp_path / "scgpt") == 0
    assert convert(tmp_path / "scgpt", "--to", "native", "--out", tmp_path / "again") == 0
    assert same(read_weights(tmp_path / "again"), weights)


@pytest.mark.golden
def test_genes_added_to_an_imported_model_leave_scgpts_ids_as_they_were(shared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "permuted"
    shutil.copytree(shared / "golden/scgpt/checkpoint_tiny", folder)
    tokens = json.loads((folder / "vocab.json").read_text())
    shifted = {token: (i + 3) % 200 for token, i in tokens.items()}  # special tokens first
    (folder / "vocab.json").write_text(json.dumps(shifted))
    assert convert(folder, "--to", "native", "--out", tmp_path / "model") == 0
    files, weights = added(tmp_path / "model", tmp_path / "more", ["NEW1", "NEW2"])
    assert files.vocabulary.pad == 199
    assert convert(tmp_path / "more", "--to", "scgpt", "--out", tmp_path / "back") == 0
    assert json.loads((tmp_path / "back/vocab.json").read_text()) == shifted | {"NEW1": 200, "NEW2": 201}
    back = torch.load(tmp_path / "back/best_model.pt", weights_only=True)["encoder.embedding.weight"]
    original = torch.load(folder / "best_model.pt", weights_only=True)["encoder.embedding.weight"]
    assert torch.equal(back[:200], original)
    assert torch.equal(back[200], weights[EMBEDDING][197])


def test_modalities_of_added_genes(tmp_path: Path) -> None:
    files, weights = a_model("modality")
    write_model(tmp_path / "model", weights, files)
    more, _ = added(tmp_path / "model", tmp_path / "more", ["p_CD4", "NEW"])
    assert more.gene_tables["modality"] == [1] * 20 + [0, 1] + [2, 3]


def test_what_cannot_be_done_is_said(native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    (tmp_path / "genes.txt").write_text("G01\nTP53\n")
    (tmp_path / "weights.pt").write_bytes(b"no weights")
    for arguments, message in (
        ([tmp_path / "nowhere", "--to", "native"], "nowhere: there is no such checkpoint"),
        ([native, "--to", "native"], "is a native model directory already; there is nothing to convert"),
        ([native, "--to", "scgpt", "--allow", "dab"], "--allow: has no meaning for"),
        ([native, "--to", "scgpt", "--labels", "l.txt", "--genes", "t"], "--labels, --genes: has no meaning for"),
        ([native, "--to", "native", "--drop", "x"], "--drop: has no meaning for"),
        ([native, "--to", "native", "--add_genes", tmp_path / "genes.txt"], "has all of these 2 genes already"),
        ([tmp_path / "weights.pt", "--to", "native"], "weights.pt: is damaged or no torch file"),
        ([tmp_path, "--to", "native", "--labels", tmp_path / "none"], "none: cannot be read as a list of names"),
    ):
        assert convert(*arguments, "--out", out) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()
    assert convert(native, "--to", "scgpt", "--out", native) == 2
    assert "exists already and is left as it is" in capsys.readouterr().err
    weights = read_weights(native)
    del weights["heads.gep.out.bias"]
    write_model(tmp_path / "torn", weights, read_model(native))
    assert convert(tmp_path / "torn", "--to", "scgpt", "--out", out) == 2
    assert "missing: heads.gep.out.bias" in capsys.readouterr().err
