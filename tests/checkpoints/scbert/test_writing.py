"""Models go to scBERT's file and come back as they were; what it cannot hold is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scbert_cases import kernel_of
from scbert_models import BINS, CLASSES, FORMS, NAMES, a_model, vocabulary_of, write_checkpoint
from scgpt_folders import same
from scgpt_models import a_model as a_model_of_scgpt
from torch import Tensor

from scfm.checkpoints.native import ModelFiles, read_model, read_weights, write_model
from scfm.checkpoints.scbert.reading import read_checkpoint, read_scbert, to_native
from scfm.checkpoints.scbert.writing import to_scbert, write_scbert
from scfm.checkpoints.scgpt.writing import to_scgpt
from scfm.data.vocabulary import SPECIALS, Gene, Vocabulary, is_ensembl
from scfm.errors import ScfmError
from scfm.model.heads import HeadSpec

FILES = ("config.json", "conditions.json", "training_data.json", "vocab.json", "README.md", "model.safetensors")


def exported(folder: Path, files: ModelFiles, weights: dict[str, Tensor], **options: Any) -> Path:
    write_scbert(folder, to_scbert(files, weights, **options))
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_native_to_scbert_and_back(tmp_path: Path, form: str) -> None:
    files, weights = a_model(form)
    files.cell_hashes = np.arange(5, dtype=np.uint64)
    write_model(tmp_path / "model", weights, files)
    out = exported(tmp_path / "out", files, weights)
    back, back_weights, report = read_scbert(out)
    write_model(tmp_path / "back", back_weights, back)
    for name in (*FILES, "cells.hash"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "model" / name).read_bytes(), name
    assert report.notes == ["scfm.json says what scfm exported here: this is that model again"]
    with_labels = ["labels.txt"] if FORMS[form][1] is CLASSES else []
    listed = sorted(path.name for path in out.iterdir())
    assert listed == sorted(["cells.hash", "genes.txt", "scbert.pth", "scfm.json", *with_labels])


@pytest.mark.parametrize("form", FORMS)
def test_an_export_is_complete_without_scfm_json(tmp_path: Path, form: str) -> None:
    """All but what no file of scBERT tells: Ensembl ids, the mode, the card."""
    files, weights = a_model(form)
    out = exported(tmp_path / "out", files, weights)
    (out / "scfm.json").unlink()
    labels = (out / "labels.txt").read_text().splitlines() if (out / "labels.txt").exists() else None
    kernel = files.model.performer.kernel
    back, again, _ = read_scbert(out, vocabulary=out / "genes.txt", labels=labels, kernel=kernel)
    performer = replace(files.model.performer, mode="compat", scaling="norms")
    assert back.model == replace(files.model, performer=performer, gene_table="scbert.pth", dropout=0.0)
    assert back.heads == files.heads
    table = "backbone.gene_embedding.weight"
    assert same({**again, table: again[table][:20]}, {**weights, table: weights[table][:20]})
    assert torch.equal(again[table][back.vocabulary.cls], weights[table][files.vocabulary.cls])
    assert not again[table][back.vocabulary.pad].any()


@pytest.mark.golden
@pytest.mark.parametrize("name", ["base_nog2v", "base_g2v", "rezero", "reversible", "finetune_head"])
def test_scbert_to_native_and_back(shared: Path, tmp_path: Path, name: str) -> None:
    """Bit for bit, where gene2vec has values that float32 holds."""
    folder = shared / "golden/scbert" / name
    state = load_file(folder / "state_dict.safetensors")
    kernel = kernel_of(json.loads((folder / "case.json").read_text())["meta"]["config"])
    if "pos_emb.emb.weight" in state:
        rounded = state["pos_emb.emb.weight"].float().double()
        assert not torch.equal(rounded, state["pos_emb.emb.weight"])
        state["pos_emb.emb.weight"] = rounded
    path, listed = write_checkpoint(tmp_path / "theirs.pth", state)
    files, weights, _ = read_scbert(path, vocabulary=listed, kernel=kernel)
    write_model(tmp_path / "model", weights, files)
    out = exported(tmp_path / "out", read_model(tmp_path / "model"), read_weights(tmp_path / "model"))
    assert same(read_checkpoint(out / "scbert.pth").state, state)
    assert (out / "genes.txt").read_text().split() == NAMES
    assert same(read_scbert(out)[1], weights)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["tiny_pretrain_1.pth", "tiny_pretrain_1_ddp_prefix.pth", "tiny_finetune_best.pth"])
def test_rounding_happens_once(shared: Path, tmp_path: Path, name: str) -> None:
    path = shared / "golden/scbert/checkpoint" / name
    original = read_checkpoint(path).state
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    files, weights, _ = read_scbert(path, vocabulary=tmp_path / "names.txt")
    export = to_scbert(files, weights)
    table = original["pos_emb.emb.weight"]
    assert same(export.state, original | {"pos_emb.emb.weight": table.float().double()})
    assert "pos_emb.emb.weight is float64, as scBERT keeps it, with the values of float32" in export.report.notes
    again = exported(tmp_path / "out", files, weights)
    (again / "scfm.json").unlink()
    _, _, report = read_scbert(again, vocabulary=again / "genes.txt")
    assert "pos_emb.emb.weight is float64 in scBERT and float32 here, which holds its values exactly" in report.notes


def test_a_float32_table_stays_one(tmp_path: Path) -> None:
    state = to_scbert(*a_model("compat")).state
    state["pos_emb.emb.weight"] = state["pos_emb.emb.weight"].float()
    files, weights, report = to_native(state, vocabulary_of([f"G{i}" for i in range(20)]))
    assert not any("float64" in note for note in report.notes)
    assert same(to_scbert(files, weights).state, state)


def test_a_table_of_zeros_is_left_out(tmp_path: Path) -> None:
    """As scBERT has it without gene2vec, whether or not the model came from there."""
    files, weights = a_model("compat", gene_table="empty.npy")
    weights["backbone.gene_embedding.weight"].zero_()
    export = to_scbert(files, weights)
    assert "pos_emb.emb.weight" not in export.state
    assert "g2v_position_emb=False" in export.report.notes[0]
    write_scbert(tmp_path / "out", export)
    assert same(read_scbert(tmp_path / "out")[1], weights)


# the order of genes


def test_an_export_in_another_order(tmp_path: Path) -> None:
    """Rows of genes and columns of the fine-tuning head follow the names, whichever of a gene's names are given."""
    files, weights = a_model("classes")
    plain = to_scbert(files, weights)
    order = [*range(19, 9, -1), *range(10)]
    mixed = [plain.genes[i] if i % 2 else files.vocabulary.entries[i].id for i in order]
    export = to_scbert(files, weights, order=named(mixed))
    assert export.genes == [plain.genes[i] for i in order]
    rows = [*order, 20]
    expected = plain.state | {
        "pos_emb.emb.weight": plain.state["pos_emb.emb.weight"][rows],
        "to_out.fc1.weight": plain.state["to_out.fc1.weight"][:, rows],
    }
    assert same(export.state, expected)
    write_scbert(tmp_path / "out", export)
    assert (tmp_path / "out/genes.txt").read_text().split() == export.genes
    back, again, _ = read_scbert(tmp_path / "out")
    assert back.vocabulary.hash == files.vocabulary.hash
    assert same(again, weights)


def named(names: list[str]) -> Vocabulary:
    genes = [Gene.of(name, None) if is_ensembl(name) else Gene.of(None, name) for name in names]
    return Vocabulary([*genes, *map(Gene, SPECIALS)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: names[:-2], r"2 genes are not in the list, e\.g\. G18, TP53"),
        (lambda names: [*names, "MORE"], r"1 genes are not in the model, e\.g\. MORE"),
        (
            lambda names: [*names[:-1], "MORE"],
            r"1 genes are not in the model, e\.g\. MORE; 1 genes are not in the list",
        ),
        (lambda names: [*names, "ENSG00000000003"], r"two names mean the same gene"),
    ],
)
def test_an_order_must_name_the_genes_of_the_model(change: Any, message: str) -> None:
    files, weights = a_model("classes")
    names = change(to_scbert(files, weights).genes)
    with pytest.raises(ScfmError, match=rf"--vocabulary: scBERT's order must name the genes of the model: {message}"):
        to_scbert(files, weights, order=named(names))


# what scBERT cannot hold


def test_what_scbert_cannot_hold_is_listed() -> None:
    cells = HeadSpec("kind", "cls", 2, ["A", "B"])
    files, weights = a_model("correct", heads=[BINS, CLASSES, cells], mixer="linear")
    with pytest.raises(ScfmError) as caught:
        to_scbert(files, weights)
    assert str(caught.value).splitlines() == [
        "scBERT cannot hold this model:",
        "  model.mixer linear: scBERT has favor",
        "  head kind is of the kind cls; --drop 'heads.kind.*' leaves it behind",
        "  2 heads, where scBERT has one, to_out; --drop 'heads.masked_bin.*' or 'heads.annotation.*'",
    ]
    files, weights = a_model("correct", heads=[BINS, CLASSES, cells])
    export = to_scbert(files, weights, drop=["heads.kind.*", "heads.annotation.*"])
    assert {name for name in export.state if name.startswith("to_out")} == {"to_out.weight", "to_out.bias"}
    assert len(export.report.left_behind) == 8 + 10
    with pytest.raises(ScfmError, match=r"no head of bins \(masked_bin\) and none of classes that reads genes"):
        to_scbert(files, weights, drop=["heads.*"])
    with pytest.raises(ScfmError, match=r"only whole heads can be left behind"):
        to_scbert(files, weights, drop=["heads.kind.*", "heads.annotation.out.*"])


def test_models_of_the_other_kind() -> None:
    with pytest.raises(ScfmError, match="a model of the kind scgpt is none of scBERT's"):
        to_scbert(*a_model_of_scgpt("full"))
    with pytest.raises(ScfmError, match="a model of the kind scbert is none of scGPT's"):
        to_scgpt(*a_model("correct"))


def test_what_scbert_computes_in_another_way_is_said() -> None:
    files, weights = a_model("correct")
    assert any("trained in the mode correct" in note for note in to_scbert(files, weights).report.notes)
    files, weights = a_model("compat")
    said = to_scbert(files, weights).report.notes
    assert not any("in the mode" in note or "in another way" in note for note in said)
    files.tokens = replace(files.tokens, cls_value=-2.0, max_genes=10)
    said = to_scbert(files, weights).report.notes
    assert "scBERT reads cells in another way: data.cls_value, data.max_genes is not as there" in said
    assert "kernel_fn=torch.nn.GELU()" in to_scbert(*a_model("gelu")).report.notes[0]


# folders


def test_an_export_that_was_changed_is_not_read_as_the_old_model(tmp_path: Path) -> None:
    files, weights = a_model("compat")
    out = exported(tmp_path / "out", files, weights)
    names = (out / "genes.txt").read_text()
    (out / "genes.txt").write_text("\n".join(reversed(names.split())))
    with pytest.raises(ScfmError, match=r"genes\.txt: is not what scfm exported; remove scfm\.json to read the folder"):
        read_scbert(out)
    (out / "genes.txt").write_text(names)
    options: list[dict[str, Any]] = [{"vocabulary": out / "genes.txt"}, {"kernel": "relu"}, {"drop": ["norm.*"]}]
    for given in options:
        with pytest.raises(ScfmError, match=r"scfm\.json: says what scfm exported here, so no option is needed"):
            read_scbert(out, **given)
    state = torch.load(out / "scbert.pth", weights_only=True)["model_state_dict"]
    write_checkpoint(out / "scbert.pth", {name: tensor + 1 for name, tensor in state.items()})
    with pytest.raises(ScfmError, match=r"scbert\.pth: is not what scfm exported; remove scfm\.json to read"):
        read_scbert(out / "scbert.pth")
    (out / "scfm.json").unlink()
    trained_on, _, _ = read_scbert(out / "scbert.pth", vocabulary=out / "genes.txt")
    assert trained_on.training_data["converted"]["beside"]["epoch"] == 4


def test_a_folder_that_holds_anything_is_left_as_it_is(tmp_path: Path) -> None:
    files, weights = a_model("compat")
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(ScfmError, match=r"is not empty; choose another directory"):
        write_scbert(tmp_path, to_scbert(files, weights))
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
